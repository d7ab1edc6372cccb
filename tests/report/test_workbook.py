"""The notebooks' own rules, and the runner behind `make run`."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

from fsc147lib.data import DataError
from fsc147lib.report import runner, workbook

HERE = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("FSC147_DATA", "FSC147_MODEL", "FSC147_OUT"):
        monkeypatch.delenv(name, raising=False)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


# --- Notebooks


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@each_notebook
def test_a_notebook_is_short_small_and_executed(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(len(cell.source.splitlines()) <= 15 for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/jpeg" in output.get("data", {})]
    text = path.read_text()
    assert len(text) < 1_000_000 and str(Path.home()) not in text and "/tmp/" not in text


@each_notebook
def test_a_notebook_starts_with_the_library_and_uses_names_that_are_there(path):
    sources = [cell.source for cell in code_cells(path)]
    assert sum("workbook.settings(DATA, MODEL)" in source for source in sources) == 1
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert imports[0].module.startswith("fsc147lib") and "import" not in sources[0].split("\n", 1)[1]
    for node in imports:
        if node.module.startswith("fsc147lib"):
            exec(ast.unparse(node), modules := {})
            for used in nodes:
                if isinstance(used, ast.Attribute) and ast.unparse(used.value) in modules:
                    assert hasattr(modules[ast.unparse(used.value)], used.attr), ast.unparse(used)


# --- Settings


def test_settings_draw_the_default_data_once(tmp_path, monkeypatch):
    monkeypatch.setattr(workbook, "PICTURES", {"train": 2, "val": 1, "test": 1})
    first = workbook.settings(out=tmp_path)
    (first.data / "marker").touch()
    assert workbook.settings(out=tmp_path) == first and (first.data / "marker").exists() and first.model == "tiny"


def test_the_environment_wins(root, tmp_path, monkeypatch):
    monkeypatch.setenv("FSC147_DATA", str(root))
    monkeypatch.setenv("FSC147_MODEL", "Qwen/Qwen3-VL-2B-Instruct")
    monkeypatch.setenv("FSC147_OUT", str(tmp_path / "out"))
    found = workbook.settings("elsewhere", "tiny")
    assert (found.data, found.model, found.out) == (root, "Qwen/Qwen3-VL-2B-Instruct", tmp_path / "out")


def test_results_are_in_one_place_for_the_runner_and_for_a_kernel(root, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    found = []
    for folder in (tmp_path, tmp_path / "notebooks"):  # the runner starts in the first, a kernel in the other
        monkeypatch.chdir(folder)
        found.append(workbook.settings(root).runs.resolve())
    assert found[0] == found[1] and found[0].is_relative_to(tmp_path / "runs")


@pytest.mark.parametrize(("gib", "parameters", "expected"), [
    (14.0, 2.1e9, {"lora": 16, "gradient_checkpointing": True, "batch_size": 16}),
    (21.5, 2.1e9, {"lora": 16, "batch_size": 8}),
    (38.5, 2.1e9, {"gradient_checkpointing": True, "batch_size": 16}),
    (78.0, 2.1e9, {"batch_size": 16}),
    (78.0, 8.8e9, {"lora": 16, "gradient_checkpointing": True, "batch_size": 16}),
    (14.0, 2e6, {"batch_size": 16}),
])  # fmt: skip
def test_a_card_s_memory_picks_the_options(tmp_path, monkeypatch, capsys, gib, parameters, expected):
    monkeypatch.setattr(workbook.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workbook, "count_parameters", lambda name: parameters)
    for free in (gib, 0):  # another kernel holds the card
        monkeypatch.setattr(workbook, "gpu_memory", lambda free=free: (int(gib * 2**30), int(free * 2**30)))
        assert workbook.Settings(tmp_path, "model", tmp_path).fit() == expected
    roomy, full = re.findall(r"[0-9.]+ GiB of the GPU are free.*", capsys.readouterr().out)
    assert roomy.endswith(" free.") and "are needed" in full and "kernel of another notebook" in full


def test_a_new_run_never_takes_an_older_ones_folder(tmp_path):
    where = workbook.Settings(tmp_path / "root", "runs/a/best", tmp_path)
    for expected in ("both-1", "both-2"):
        folder = where.new_run("both")
        assert folder.name == expected
        folder.mkdir(parents=True)
    (where.runs / "both-10").mkdir()
    assert where.new_run("both").name == "both-11" and where.new_run("counts").name == "counts-1"
    assert where.runs != workbook.Settings(tmp_path / "root", "runs/b/best", tmp_path).runs


def test_the_pair_is_the_newest_finished_one_else_the_shipped_one(tmp_path):
    where = workbook.Settings(tmp_path / "root", "tiny", tmp_path)

    def write(name, epoch):
        (where.runs / name).mkdir(parents=True)
        (where.runs / name / "config.json").write_text('{"epochs": 3}')
        (where.runs / name / "summary.json").write_text(json.dumps({"last": {"epoch": epoch}}))
        (where.runs / name / "metrics.jsonl").touch()

    write("counts-1", 3)
    assert where.pair() == {"counts": "tiny", "both": "tiny-dual"}
    write("both-2", 3)
    write("both-10", 3)
    write("both-11", 2)  # stopped
    (where.runs / "both-12").mkdir()
    assert where.pair() == {name: str(where.runs / run / "last") for name, run in
                            (("counts", "counts-1"), ("both", "both-10"))}  # fmt: skip


def test_a_large_split_is_sampled_and_a_missing_test_split_told(root, tmp_path, capsys):
    where = workbook.Settings(root, "tiny", tmp_path)
    whole = where.samples("train", 1000)
    few = where.samples("train", 3)
    assert [sample.name for sample in few] == [whole[i * len(whole) // 3].name for i in range(3)]
    assert f"train: 3 of {len(whole)} images" in capsys.readouterr().out


def test_a_wrong_folder_fails_in_the_first_cell(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        workbook.settings(tmp_path / "nowhere", out=tmp_path)


# --- The runner


def run(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    runner.run_notebook(path, path.parent / "out")


@pytest.mark.slow
def test_a_notebook_is_executed_and_written(tmp_path):
    bar = "for _ in readers.progress_bar([1, 2], disable=False, leave=False):\n    pass"
    sources = ("from fsc147lib import readers\nx = 6 * 7", "print(x)", bar)
    link = nbformat.v4.new_markdown_cell("[next](02_b.ipynb), `open x.ipynb`")
    run(tmp_path / "a.ipynb", *map(nbformat.v4.new_code_cell, sources), link)
    _, printed, drawn, _ = nbformat.read(tmp_path / "out" / "a.ipynb", as_version=4).cells
    assert printed.outputs[0].text == "42\n"
    assert [output.name for output in drawn.outputs] == ["stdout"]  # stderr would be a red box
    page = (tmp_path / "out" / "a.html").read_text()
    assert "42" in page and 'href="02_b.html"' in page and "open x.ipynb" in page
    assert "02_b.ipynb" in (tmp_path / "out" / "a.ipynb").read_text()
    assert not code_cells(tmp_path / "a.ipynb")[1].outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "reason"),
    [("raise RuntimeError('the reason')", "the reason"), ("import os; os._exit(1)", "Kernel died")],
)
def test_a_failing_notebook_is_named_and_what_ran_is_kept(tmp_path, cell, reason):
    with pytest.raises(workbook.WorkbookError, match=f"(?s)a.ipynb failed.*{reason}"):
        run(tmp_path / "a.ipynb", *map(nbformat.v4.new_code_cell, ("print('before')", cell)))
    assert "before" in (tmp_path / "out" / "a.html").read_text()


def test_the_table_shows_the_files_numbers(tmp_path):
    metrics = {"mae": 20.0, "rmse": 30.0, "kl": 1.2, "mass_on_objects": 0.3, "of_your_own": 1}
    where = workbook.Settings(tmp_path, "tiny", tmp_path)
    tested = [{"name": "both losses", **metrics}, {"name": "counts alone", **metrics, "mae": 5.25}]
    tested += [{"name": "always the training mean", "mae": 12.5, "rmse": 15.0}]
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": tested}))
    rows = [{"name": "attention, trained", "overhead_low": 0.01, "overhead_median": 0.023, "overhead_high": 0.04}]
    (tmp_path / "overhead.json").write_text(json.dumps({"rows": rows}))
    _, text = runner.summarise(where, {"01_inspect_data": 12.0})
    for number in ("20.00", "5.25", "12.50", "2.3%", "01_inspect_data"):
        assert number in text
