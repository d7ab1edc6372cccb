"""`make run`: executes the notebooks in order, and sums up their results.

Notebooks, HTML and `summary.json` go to `runs/workbook/`.  Kernels import `workbook` alone, which takes less time.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from tqdm import tqdm

from ..files import write_json, write_text
from .timing import table
from .workbook import COLUMNS, Settings, WorkbookError, settings


def run_notebook(path: Path, out: Path, progress: tqdm) -> float:
    """Execute a notebook in its own folder and write it, with its HTML, to `out`; returns the seconds it took.

    Raises:
        WorkbookError: names the notebook and quotes the failed cell; the cells that ran are written.
    """
    notebook, started = nbformat.read(path, as_version=4), time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=None,
        extra_arguments=["--IPKernelApp.log_level=40"],  # or each kernel warns of its unencrypted local socket
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_executed=lambda **_: progress.update(),
        coalesce_streams=True,  # or each print stays an output of its own
    )
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:  # a kernel dies where the memory is full
        raise WorkbookError(f"{path.name} failed:\n{error}") from error
    finally:
        notebook.metadata.pop("widgets", None)  # large, and dead in a page, where a picture stands beside each
        write_text(out / path.name, nbformat.writes(notebook))
        page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
        write_text(out / f"{path.stem}.html", re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", page))  # from page to page
    return time.perf_counter() - started


def summarise(where: Settings, seconds: dict[str, float]) -> dict:
    """The numbers of a run of all notebooks, from the files that they wrote."""
    rows = {row["name"]: row for row in json.loads(where.overhead.read_text())["rows"]}
    overhead = {key: rows["attention, trained"][f"overhead_{key}"] for key in ("low", "median", "high")}
    about = {"data": str(where.data), "model": where.model, "test": json.loads(where.comparison.read_text())["rows"]}
    return {**about, "attention_loss_overhead": overhead, "seconds": seconds}


def summary_text(summary: dict) -> str:
    """The summary as the last lines of `make run`."""
    overhead = "overhead of the attention loss: {median:.1%} (95 % interval {low:.1%} to {high:.1%})"
    times = [f"{name:<28}{spent:>8.0f} s" for name, spent in summary["seconds"].items()]
    rows = table(summary["test"], COLUMNS, head="test split")
    return "\n".join([rows, overhead.format(**summary["attention_loss_overhead"]), *times])


def main() -> int:
    """Run the workbook from the project's folder: `python -m fsc147lib.report.runner`."""
    out, paths = Path("runs/workbook"), sorted(Path("notebooks").glob("[0-9]*.ipynb"))
    if not paths:
        print("there are no notebooks here: run this in the project's folder", file=sys.stderr)
        return 2
    for bars in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(bars, "1")  # in the kernels: a bar in a page is noise
    for name in ("FSC147_DATA", "FSC147_MODEL", "FSC147_OUT"):  # kernels run in another folder
        value = os.environ.get(name)
        if value and (name == "FSC147_OUT" or Path(value).exists()):
            os.environ[name] = str(Path(value).resolve())
    cells = sum(cell.cell_type == "code" for path in paths for cell in nbformat.read(path, as_version=4).cells)
    seconds = {}
    with tqdm(total=cells, unit="cell", disable=False) as progress:
        for path in paths:
            progress.set_description(path.stem)
            try:
                seconds[path.stem] = run_notebook(path, out, progress)
            except WorkbookError as error:
                print(f"\n{error}", file=sys.stderr)
                return 1
    where = settings()
    summary = summarise(where, seconds)
    write_json(out / "summary.json", summary)
    print(summary_text(summary))
    print(f"\nexecuted notebooks, HTML and summary.json are in {out}/, what they made in {where.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
