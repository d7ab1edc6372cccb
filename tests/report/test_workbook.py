"""The notebooks' own rules, and the runner behind `make run`."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from tqdm import tqdm

from fsc147lib.report import runner, workbook

HERE = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("FSC147_DATA", "FSC147_MODEL", "FSC147_OUT"):
        monkeypatch.delenv(name, raising=False)


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_small_and_executed(path):
    assert path.stat().st_size < 1_000_000
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(len(cell.source.splitlines()) <= 15 for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/jpeg" in output.get("data", {})]
    text = path.read_text()
    assert str(Path.home()) not in text and "/tmp/" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_cell_names_data_and_model(path):
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert sum("workbook.settings(DATA, MODEL)" in source for source in sources) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_and_starts_with_the_library(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    imports = [node for cell in cells for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.ImportFrom)]
    assert imports[0].module.startswith("fsc147lib") and "import" not in cells[0].source.split("\n", 1)[1]
    for node in imports:
        if node.module.startswith("fsc147lib"):
            room = __import__(node.module, fromlist=["__all__"])
            assert {alias.name for alias in node.names} <= set(room.__all__), ast.unparse(node)
            exec(ast.unparse(node), modules := {})
            for used in (node for cell in cells for node in ast.walk(ast.parse(cell.source))):
                if isinstance(used, ast.Attribute) and ast.unparse(used.value) in modules:
                    assert hasattr(modules[ast.unparse(used.value)], used.attr), ast.unparse(used)


def test_settings_draw_the_default_data_once(tmp_path, monkeypatch):
    monkeypatch.setattr(workbook, "PICTURES", {"train": 2, "val": 1, "test": 1})
    first = workbook.settings(out=tmp_path)
    marker = first.data / "marker"
    marker.touch()
    assert workbook.settings(out=tmp_path) == first and marker.exists()
    assert first.model == "tiny"


def test_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("FSC147_DATA", str(tmp_path))
    monkeypatch.setenv("FSC147_MODEL", "Qwen/Qwen3-VL-2B-Instruct")
    monkeypatch.setenv("FSC147_OUT", str(tmp_path / "out"))
    found = workbook.settings("elsewhere", "tiny")
    assert (found.data, found.model, found.out) == (tmp_path, "Qwen/Qwen3-VL-2B-Instruct", tmp_path / "out")


def test_results_are_in_one_place_for_the_runner_and_for_a_kernel(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    found = []
    for folder in (tmp_path, tmp_path / "notebooks"):  # the runner starts in the first, a kernel in the other
        monkeypatch.chdir(folder)
        found.append(workbook.settings(tmp_path).runs.resolve())
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
    monkeypatch.setattr(workbook, "gpu_memory", lambda: (int(gib * 2**30), int(gib * 2**30)))
    monkeypatch.setattr(workbook, "count_parameters", lambda name: parameters)
    assert workbook.Settings(tmp_path, "model", tmp_path).fit() == {"limit": 160, **expected}
    assert " GiB of the GPU are free.\n" in capsys.readouterr().out


def test_a_card_that_another_kernel_holds_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workbook.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workbook, "gpu_memory", lambda: (14 * 2**30, 3 * 2**30))
    monkeypatch.setattr(workbook, "count_parameters", lambda name: 2.1e9)
    workbook.Settings(tmp_path, "model", tmp_path).fit()
    printed = capsys.readouterr().out
    assert "3.0 GiB of the GPU are free, 10.5 are needed" in printed and "kernel of another notebook" in printed


def test_notebook_4_before_3_says_what_to_run(tmp_path):
    with pytest.raises(workbook.WorkbookError, match="run 03_dual_loss_finetuning.ipynb first"):
        workbook.settings(tmp_path, out=tmp_path).trained()


def test_a_new_run_never_takes_an_older_ones_folder(tmp_path):
    where = workbook.Settings(tmp_path / "root", "runs/a/best", tmp_path)
    for expected in ("both-1", "both-2"):
        folder = where.new_run("both")
        assert folder.name == expected
        (folder / "best").mkdir(parents=True)
    (where.runs / "both-10" / "best").mkdir(parents=True)
    assert where.new_run("both").name == "both-11" and where.new_run("counts").name == "counts-1"
    assert where.trained() == where.runs / "both-10" / "best"
    assert where.runs != workbook.Settings(tmp_path / "root", "runs/b/best", tmp_path).runs


def notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.slow
def test_a_notebook_is_executed_and_written(tmp_path):
    bar = "import sys\nfrom tqdm import tqdm\nfor i in tqdm([1, 2], file=sys.stdout, leave=False):\n    pass\n"
    path = notebook(tmp_path / "a.ipynb", "x = 6 * 7", "print(x)", bar, bar + "print('read')")
    with tqdm(disable=True) as progress:
        assert runner.run_notebook(path, tmp_path / "out", progress) > 0
    assert "42" in (tmp_path / "out" / "a.html").read_text()
    assert nbformat.read(tmp_path / "out" / "a.ipynb", as_version=4).cells[1].outputs[0].text == "42\n"
    assert nbformat.read(tmp_path / "out" / "a.ipynb", as_version=4).cells[2].outputs == []
    assert nbformat.read(tmp_path / "out" / "a.ipynb", as_version=4).cells[3].outputs[0].text.strip() == "read"
    assert not nbformat.read(path, as_version=4).cells[1].outputs


@pytest.mark.slow
def test_links_between_notebooks_lead_from_page_to_page(tmp_path):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("[next](02_b.ipynb), `open x.ipynb`")])
    nbformat.write(book, tmp_path / "a.ipynb")
    with tqdm(disable=True) as progress:
        runner.run_notebook(tmp_path / "a.ipynb", tmp_path / "out", progress)
    page = (tmp_path / "out" / "a.html").read_text()
    assert 'href="02_b.html"' in page and "open x.ipynb" in page
    assert "02_b.ipynb" in (tmp_path / "out" / "a.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "reason"),
    [("raise RuntimeError('the reason')", "the reason"), ("import os; os._exit(1)", "Kernel died")],
)
def test_a_failing_notebook_is_named_and_what_ran_is_kept(tmp_path, cell, reason):
    path = notebook(tmp_path / "a.ipynb", "print('before')", cell)
    with tqdm(disable=True) as progress, pytest.raises(workbook.WorkbookError, match=f"(?s)a.ipynb failed.*{reason}"):
        runner.run_notebook(path, tmp_path / "out", progress)
    assert "before" in (tmp_path / "out" / "a.html").read_text()


def test_the_table_shows_the_files_numbers(tmp_path):
    metrics = {"mae": 20.0, "rmse": 30.0, "kl": 1.2, "mass_on_objects": 0.3}
    where = workbook.Settings(tmp_path, "tiny", tmp_path)
    tested = [{"name": "both losses", **metrics}, {"name": "counts alone", **metrics, "mae": 5.25}]
    tested += [{"name": "always the training mean", "mae": 12.5, "rmse": 15.0}]
    where.comparison.write_text(json.dumps({"rows": tested}))
    rows = [{"name": "attention, trained", "overhead_low": 0.01, "overhead_median": 0.023, "overhead_high": 0.04}]
    where.overhead.write_text(json.dumps({"rows": rows}))
    text = runner.summary_text(runner.summarise(where, {"01_inspect_data": 12.0}))
    for number in ("20.00", "5.25", "12.50", "2.3%", "01_inspect_data"):
        assert number in text


def waiting_policy(policy=None):
    """How threads wait in a process that starts with the library, as OpenMP says it; `policy` is the user's choice."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = subprocess.run(
        [sys.executable, "-c", "import fsc147lib, torch"], capture_output=True, text=True, env=environment, check=True
    )
    return re.search(r"OMP_WAIT_POLICY\s*=\s*'(\w+)'", done.stderr)[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU OpenMP")
def test_threads_wait_passively_unless_the_user_has_set_it():
    assert waiting_policy() == "PASSIVE"
    assert waiting_policy("ACTIVE") == "ACTIVE"


def test_the_readme_s_speeds_agree_with_one_another_and_with_the_recorded_ones():
    text = (HERE / "README.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[0] == "plain transformers loop")
    told = [tuple(map(float, line[1:])) for line in lines[start : start + 6]]
    plain, trainer, compiled, cached = (told[i][0] for i in (0, 1, 4, 5))
    assert [times for _, times in told] == pytest.approx([speed / trainer for speed, _ in told], abs=0.05)
    assert f"**{compiled / trainer:.1f} and {cached / trainer:.1f} times as fast as `Trainer`**" in text
    assert f"{compiled / plain:.1f} and {cached / plain:.1f} times as fast as the plain loop" in text
    for card in ("h100", "h200"):
        rows = json.loads((HERE / f"notebooks/recorded/throughput-{card}-2b.json").read_text())["rows"]
        assert "{:.0f} and {:.0f}".format(*(row["images_per_second"] for row in rows[-2:])) in text
