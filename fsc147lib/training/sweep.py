"""Sweeps: train each combination of some options once, in a process and folder of its own; `sweep.json` lists them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tyro

from ..files import write_json
from ..options import ConfigError, need, parse_options
from .run import need_same_run, read_run
from .setup import TrainConfig


@dataclass(frozen=True)
class SweepConfig:
    """Train once for each combination of values: sweep --grid seed=0,1 attention_weight=0,1 -- --data ROOT."""

    train: tyro.conf.Positional[tuple[str, ...]] = ()
    """After --: options of train that all runs share."""
    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,... of options of train; quote a value of several words: "attention_layers=1 2,2 3"."""
    out: Path = Path("runs/sweep")
    """Folder of the sweep: a folder for each run, logs/, sweep.json."""
    parallel: int = 1
    """Number of runs at the same time."""

    def __post_init__(self):
        need(self, "parallel", self.parallel >= 1, "at least 1")
        axes = [all(axis.partition("=")) for axis in self.grid]
        need(self, "grid", axes and all(axes), "NAME=VALUE,VALUE,... for each option")


class GridRun(NamedTuple):
    """One combination of a grid."""

    name: str
    words: list[str]  # of the command `train`
    options: dict  # of the grid, with their values
    config: TrainConfig


def grid_runs(config: SweepConfig) -> list[GridRun]:
    """All combinations of the grid.  The parser of `train` checks them, and exits (SystemExit) on a wrong value."""
    axes = {name: values.split(",") for name, _, values in (axis.partition("=") for axis in config.grid)}
    runs = []
    for values in product(*axes.values()):
        name = ",".join(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        name = name.replace(" ", "+").replace("/", "-")
        words = [*config.train, "--out", str(config.out / name)]
        for key, value in zip(axes, values, strict=True):
            flag = key.replace("_", "-")
            if value == "True":
                words.append(f"--{flag}")
            elif value == "False":
                words.append(f"--no-{flag}")
            else:
                words += [f"--{flag}", *value.split()]
        settings = parse_options(TrainConfig, words, "train")
        options = json.loads(settings.to_json())
        runs.append(GridRun(name, words, {key: options[key] for key in axes}, settings))
    return runs


def row_of(run: GridRun, seconds: float, error: str | None = None) -> dict:
    """The run's row of `run_sweep`, read from its folder."""
    row = {"name": run.name, "options": run.options, "finished": False, "error": error, "seconds": seconds}
    try:
        need_same_run(run.config)
        _, summary, epochs = read_run(run.config.out)
    except ConfigError:
        return row
    if summary["last"]["epoch"] < run.config.epochs:
        return row
    curve = [{"epoch": line["epoch"], **line["val"]} for line in epochs]
    return {**row, "finished": True, "best": summary["best"], "last": summary["last"], "curve": curve}


def run_sweep(config: SweepConfig) -> list[dict]:
    """Train the runs of a grid that are not finished; the command `sweep`.

    Returns:
        The rows of `sweep.json`, in the grid's order: `name`, `options` (of the grid), `finished`, `error` (None, or
        the last printed line of a failed run), `seconds` (of all its processes); of a finished run also `best` and
        `last` (validation metrics with their epoch) and `curve` (validation metrics of each epoch).
    """
    runs, path = grid_runs(config), config.out / "sweep.json"
    spent = {row["name"]: row["seconds"] for row in json.loads(path.read_text())["runs"]} if path.is_file() else {}
    rows = {run.name: row_of(run, spent.get(run.name, 0.0)) for run in runs}
    unfinished = [run for run in runs if not rows[run.name]["finished"]]

    def write() -> None:
        write_json(path, {"train": config.train, "grid": config.grid, "runs": list(rows.values())})

    write()
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished before", flush=True)
    for run, seconds, error in processes(unfinished, config.out / "logs", config.parallel):
        rows[run.name] = row_of(run, rows[run.name]["seconds"] + seconds, error)
        write()
        print(f"{run.name}: {error or 'MAE {mae:.2f}'.format(**rows[run.name]['best'])}, {seconds:.0f} s", flush=True)
    return list(rows.values())


def processes(runs: list[GridRun], logs: Path, parallel: int) -> Iterator[tuple[GridRun, float, str | None]]:
    """Train runs, `parallel` at a time; yields each when it ends, with its seconds and its error, or None.

    An exception ends the runs with SIGTERM, on which they save.
    """
    waiting = list(runs)
    active: dict[subprocess.Popen, tuple[GridRun, float]] = {}
    threads = max(1, (os.cpu_count() or 1) // max(1, min(parallel, len(runs))))
    try:
        while waiting or active:
            while waiting and len(active) < parallel:
                run = waiting.pop(0)
                active[start(run, logs / f"{run.name}.txt", threads)] = run, time.perf_counter()
            time.sleep(0.1)
            for process in [process for process in active if process.poll() is not None]:
                run, began = active.pop(process)
                printed = (logs / f"{run.name}.txt").read_text(errors="replace").split("\n")
                error = next(filter(str.strip, reversed(printed)), f"ended with status {process.returncode}")
                yield run, time.perf_counter() - began, error if process.returncode else None
    finally:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()


def start(run: GridRun, log: Path, threads: int) -> subprocess.Popen:
    """Start the process of a run, which resumes from a checkpoint if there is one; its output goes to `log`."""
    resume = ["--resume"] if (run.config.out / "last").is_dir() else []
    command = [sys.executable, "-m", "fsc147lib", "train", *run.words, *resume]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **os.environ}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
