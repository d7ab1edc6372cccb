"""A grid of runs over any of `train`'s options, several at once; what is finished is not run again.

Each run is a process of `train` with a folder of its own below the sweep's, its output in `logs/`, and a row of
`sweep.json`, which is written after each run.  Left out: what a run does (`loop`), table and figure (`report.sweeps`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

from ..evaluation.answering import EvaluateConfig, evaluate
from ..files import write_json
from ..options import ConfigError, need, parse_options
from .loop import TrainConfig
from .run import need_same_run, read_run


@dataclass(frozen=True)
class SweepConfig:
    """Train once for each combination of values: sweep --grid seed=0,1 attention_weight=0,1 -- --data ROOT."""

    train: tyro.conf.Positional[tuple[str, ...]] = ()
    """After --: options of train that all runs share."""
    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,... of options of train; a value of several words in quotes: "attention_layers=1 2,2 3"."""
    out: Path = Path("runs/sweep")
    """Folder of the sweep: a folder for each run, logs/, sweep.json."""
    parallel: int = 1
    """Runs at once."""
    splits: tuple[str, ...] = ()
    """Splits that the last weights of each run answer at the end, image by image: test and test_seen, for example."""

    def __post_init__(self):
        need(self, "parallel", self.parallel >= 1, "at least 1")
        axes = [all(axis.partition("=")) for axis in self.grid]
        need(self, "grid", axes and all(axes), "NAME=VALUE,VALUE,... for each option")


@dataclass
class GridRun:
    """One run of a grid: its options that differ from others', as words and as values, and all of them."""

    name: str
    words: list[str]
    options: dict
    config: TrainConfig

    def row(self) -> dict:
        """What is known of the run from its folder: `options`, `best` and `last` validation, a `curve` of all."""
        row = {"name": self.name, "options": self.options, "finished": False, "error": None, "seconds": 0.0}
        try:
            need_same_run(self.config)
            _, summary, epochs = read_run(self.config.out)
        except ConfigError:
            return row
        if summary["last"]["epoch"] < self.config.epochs:
            return row
        curve = [{"epoch": line["epoch"], **line["val"]} for line in epochs]
        return {**row, "finished": True, "best": summary["best"], "last": summary["last"], "curve": curve}

    def start(self, log: Path, threads: int) -> subprocess.Popen:
        """Start the run, or go on with it from its last whole epoch."""
        words = [*self.words, "--resume"] if (self.config.out / "last").is_dir() else self.words
        environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **os.environ}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            command = [sys.executable, "-m", "fsc147lib", "train", *words]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def answers(self, split: str) -> dict:
        """What the last weights answer of a split: the `metrics`, and of each image its `error` and `kl`."""
        config = self.config
        found = evaluate(EvaluateConfig(
            config.data, str(config.out / "last"), split, batch_size=64, category=config.category,
            max_pixels=config.max_pixels, precision=config.precision,
        ))  # fmt: skip
        images = {key: [image.row()[key] for image in found.images] for key in ("error", "kl")}
        return {"metrics": found.metrics, **images}


def grid_runs(config: SweepConfig) -> list[GridRun]:
    """Every combination of the grid, checked as `train` checks its options: SystemExit, its message printed."""
    axes = [(name, values.split(",")) for name, _, values in (axis.partition("=") for axis in config.grid)]
    runs = []
    for values in product(*(values for _, values in axes)):
        point = dict(zip((name for name, _ in axes), values, strict=True))
        name = ",".join(f"{key}={value.replace(' ', '+').replace('/', '-')}" for key, value in point.items())
        words = [*config.train]
        for key, value in point.items():
            flag = key.replace("_", "-")
            switches = {"True": [f"--{flag}"], "False": [f"--no-{flag}"]}
            words += switches.get(value, [f"--{flag}", *value.split()])
        words += ["--out", str(config.out / name)]
        settings = parse_options(TrainConfig, words, "train")
        options = json.loads(settings.to_json())
        runs.append(GridRun(name, words, {key: options[key] for key in point}, settings))
    return runs


def run_sweep(config: SweepConfig) -> list[dict]:
    """Train what is not finished yet; `python -m fsc147lib sweep` calls this.

    Returns:
        The rows of `sweep.json`, in the grid's order: `name`, `options` (the grid's), `finished`, `error` (None, or
        the last line that a failed run has printed), `seconds` (of all its processes); of a finished run `best`
        and `last` (validation metrics with their epoch), `curve` (those of each epoch) and, where asked for, `splits`
        (of each `GridRun.answers`).
    """
    runs, path = grid_runs(config), config.out / "sweep.json"
    before = {row["name"]: row["seconds"] for row in json.loads(path.read_text())["runs"]} if path.is_file() else {}
    rows = {run.name: {**run.row(), "seconds": before.get(run.name, 0.0)} for run in runs}

    def write() -> None:
        write_json(path, {"train": config.train, "grid": config.grid, "runs": list(rows.values())})

    write()
    waiting = [run for run in runs if not rows[run.name]["finished"]]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    for run, seconds, error in processes(waiting, config.out / "logs", config.parallel):
        rows[run.name] = {**run.row(), "seconds": rows[run.name]["seconds"] + seconds, "error": error}
        write()
        print(f"{run.name}: {error or 'MAE {mae:.2f}'.format(**rows[run.name]['best'])}, {seconds:.0f} s", flush=True)
    for run in runs:
        if config.splits and rows[run.name]["finished"]:
            rows[run.name]["splits"] = {split: run.answers(split) for split in config.splits}
            write()
    return list(rows.values())


def processes(runs: list[GridRun], logs: Path, parallel: int) -> Iterator[tuple[GridRun, float, str | None]]:
    """Run some at once; yields each that ended, its seconds and what went wrong.  Interrupted, it ends them all."""
    threads = max(1, (os.cpu_count() or 1) // max(1, min(parallel, len(runs))))
    started: list[subprocess.Popen] = []

    def finish(run: GridRun) -> tuple[GridRun, float, str | None]:
        log, began, error = logs / f"{run.name}.txt", time.perf_counter(), None
        process = run.start(log, threads)
        started.append(process)
        if status := process.wait():
            printed = log.read_text(errors="replace").strip()
            error = printed.splitlines()[-1] if printed else f"ended with status {status}"
        return run, time.perf_counter() - began, error

    pool = ThreadPoolExecutor(parallel)
    try:
        for ended in as_completed([pool.submit(finish, run) for run in runs]):
            yield ended.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.terminate()
            process.wait()
