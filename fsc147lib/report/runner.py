"""`make run`: execute the notebooks in order and print a summary of their results.

Notebooks, HTML pages and summary.json go to runs/workbook/.
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

from ..files import write_json, write_text
from .timing import table
from .workbook import COLUMNS, Settings, WorkbookError, settings


def run_notebook(path: Path, out: Path) -> None:
    """Execute a notebook in its own folder; write it and its HTML page to the folder `out`.

    Raises:
        WorkbookError: a cell failed.  The message names the notebook; the cells that ran are written.
    """
    notebook, kernel = nbformat.read(path, as_version=4), ["--IPKernelApp.log_level=40"]  # no warning of its socket
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=None, resources=where, extra_arguments=kernel, coalesce_streams=True)
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:  # a kernel dies where the memory is full
        raise WorkbookError(f"{path.name} failed:\n{error}") from error
    finally:
        notebook.metadata.pop("widgets", None)  # large, and dead in a page, where a picture stands beside each
        write_text(out / path.name, nbformat.writes(notebook))
        page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
        write_text(out / f"{path.stem}.html", re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", page))  # from page to page


def summarise(where: Settings, seconds: dict[str, float]) -> tuple[dict, str]:
    """The results that the notebooks wrote, with the seconds of each: as a dictionary, and as text."""
    rows = {row["name"]: row for row in json.loads((where.out / "overhead.json").read_text())["rows"]}
    overhead = {key: rows["attention, trained"][f"overhead_{key}"] for key in ("low", "median", "high")}
    test = json.loads((where.out / "comparison.json").read_text())["rows"]
    text = "overhead of the attention loss: {median:.1%} (95 % interval {low:.1%} to {high:.1%})".format(**overhead)
    times = [f"{name:<28}{spent:>8.0f} s" for name, spent in seconds.items()]
    about = {"data": str(where.data), "model": where.model, "test": test}
    about |= {"attention_loss_overhead": overhead, "seconds": seconds}
    return about, "\n".join([table(test, COLUMNS, head="test split"), text, *times])


def main() -> int:
    """Run all notebooks, from the project's folder; returns the exit status."""
    out, paths = Path("runs/workbook"), sorted(Path("notebooks").glob("[0-9]*.ipynb"))
    if not paths:
        print("there are no notebooks here: run this in the project's folder", file=sys.stderr)
        return 2
    for bars in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(bars, "1")  # a progress bar in a page is noise
    where, seconds = settings(), {}
    for name in ("FSC147_DATA", "FSC147_MODEL", "FSC147_OUT"):
        if (value := os.environ.get(name)) and Path(value).exists():
            os.environ[name] = str(Path(value).resolve())  # kernels start in another folder
    for path in paths:
        print(f"running {path.name}", flush=True)
        started = time.perf_counter()
        try:
            run_notebook(path, out)
        except WorkbookError as error:
            print(error, file=sys.stderr)
            return 1
        seconds[path.stem] = time.perf_counter() - started
    summary, text = summarise(where, seconds)
    write_json(out / "summary.json", summary)
    print(f"\n{text}\n\nexecuted notebooks, HTML and summary.json are in {out}/, what they made in {where.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
