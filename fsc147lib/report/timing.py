"""Seconds of a call; the table of a benchmark's rows, and its report with the machine it ran on."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from ..evaluation.answering import to_csv
from ..evaluation.tables import aligned
from ..files import write_json, write_text
from ..training.memory import wait_for

COLUMNS = {  # key of a row -> heading, format
    "seconds_median": ("s per step (quartiles)", "{seconds_median:.3f} ({seconds_low:.3f} to {seconds_high:.3f})"),
    "overhead_median": (
        "overhead (95 % interval)",
        "{overhead_median:.1%} ({overhead_low:.1%} to {overhead_high:.1%})",
    ),
    "overhead_lazy": ("on each K-th step", "{overhead_lazy:.1%} (K = {every})"),
    "batch_size": ("batch", "{batch_size}"),
    "images_per_second": ("images/s", "{images_per_second:.1f}"),
    "over_best_peer": ("of the best peer", "{over_best_peer:.2f}x"),
    "peak_memory": ("peak GiB", "{peak_memory:.2f}"),
    "waiting": ("waiting", "{waiting:.1%}"),
    "validation_per_second": ("validation images/s", "{validation_per_second:.1f}"),
}


def table(rows: Sequence[dict], columns: dict[str, tuple[str, str]] = COLUMNS, head: str = "variant") -> str:
    """A line of text for each row, with its `name` under `head`; columns that no row has a value for are left out.

    `peak_memory` is in MiB in a row, and in GiB in the table.
    """
    shown = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    cells = [[head, *(title for title, _ in shown.values())]]
    for row in rows:
        ended = ": out of memory" if row.get("out_of_memory") else ": failed" if row.get("failed") else ""
        row = {**row, "peak_memory": row["peak_memory"] / 1024} if row.get("peak_memory") is not None else row
        values = ["" if row.get(key) is None else form.format(**row) for key, (_, form) in shown.items()]
        cells.append([row["name"] + ended, *values])
    return aligned(cells)


def write_report(path: str | Path, report: dict, config=None) -> None:
    """Write a report as JSON with command, options (the dataclass `config`) and machine; its `rows` also as .csv."""
    options = asdict(config) if config else {}
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    command = "python -m fsc147lib " + " ".join(sys.argv[1:])
    write_json(path, {"command": command, **options, **machine(), **report})
    keys = dict.fromkeys(key for row in report["rows"] for key in row)
    write_text(Path(path).with_suffix(".csv"), to_csv([{key: row.get(key) for key in keys} for row in report["rows"]]))


def machine() -> dict:
    """Date, versions, processor, GPU, threads and load of this machine."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def read_report(path: str | Path) -> tuple[dict, str]:
    """Read a report of `write_report`; returns it, and a line with its machine, versions, date and command."""
    report = json.loads(Path(path).read_text())
    processor = report["gpu"] or f"{report['threads']} cores of {report['processor']}"
    versions = f"torch {report['torch']}, transformers {report['transformers']}"
    return report, f"{processor}, {versions}, {report['date']}: {report['command']}"


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds of a call, the work of the GPU included."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started
