"""The pages keep to the code: links, files and names that they mention are there, and the example root is clean."""

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from fsc147lib.data import check

HERE = Path(__file__).resolve().parents[1]
PAGES = sorted([*HERE.glob("*.md"), *(HERE / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        found = [place for place in (HERE / name, HERE / "fsc147lib" / name) if place.exists()]
        assert found or name == "my_method.py", name


def test_every_name_that_is_imported_from_transformers_is_listed():
    page = (HERE / "docs" / "transformers.md").read_text()
    for path in (HERE / "fsc147lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                for alias in node.names:
                    assert f"`{alias.name}`" in page or f"`{alias.name}." in page, f"{alias.name} of {path.name}"


def test_the_data_page_s_example_is_a_clean_root(tmp_path):
    blocks = [
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", (HERE / "docs/data.md").read_text(), re.S)
    ]
    (annotations,) = [block for block in blocks if "1.jpg" in block]
    (splits,) = [block for block in blocks if "train" in block]
    names = [name for listed in splits.values() for name in listed]
    (tmp_path / "images_384_VarV2").mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (320, 128), (60 * i, 90, 30)).save(tmp_path / "images_384_VarV2" / name)
    entries = {name: annotations["1.jpg"] for name in names}
    (tmp_path / "annotation_FSC147_384.json").write_text(json.dumps(entries))
    (tmp_path / "Train_Test_Val_FSC_147.json").write_text(json.dumps(splits))
    (tmp_path / "ImageClasses_FSC147.txt").write_text("".join(f"{name}\tapples\n" for name in names))
    report = check(tmp_path)
    assert report.clean, str(report)
    assert report.splits["train"]["images"] == 2 and report.splits["train"]["mean"] == 2


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
