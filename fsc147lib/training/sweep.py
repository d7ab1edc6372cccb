"""A grid of runs over any options of `train`; a finished run is not run again.

Each run is a process of `train` with a folder of its own; `logs/` holds its output.  `sweep.json` follows each run.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

from ..evaluation.answering import EvaluateConfig, evaluate
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
    """One combination of a grid: the words of `train`, the values of the grid's options, and all options."""

    name: str
    words: list[str]
    options: dict
    config: TrainConfig

    def row(self, seconds: float, error: str | None = None) -> dict:
        """The run's row of `run_sweep`, read from its folder."""
        row = {"name": self.name, "options": self.options, "finished": False, "error": error, "seconds": seconds}
        try:
            need_same_run(self.config)
            _, summary, epochs = read_run(self.config.out)
        except ConfigError:
            return row
        if summary["last"]["epoch"] < self.config.epochs:
            return row
        curve = [{"epoch": line["epoch"], **line["val"]} for line in epochs]
        return {**row, "finished": True, "best": summary["best"], "last": summary["last"], "curve": curve}


def grid_runs(config: SweepConfig) -> list[GridRun]:
    """Every combination of the grid, checked as `train` checks its options: SystemExit, its message printed."""
    axes = {name: values.split(",") for name, _, values in (axis.partition("=") for axis in config.grid)}
    runs = []
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = ",".join(f"{key}={value}" for key, value in point.items()).replace(" ", "+").replace("/", "-")
        words = [*config.train, "--out", str(config.out / name)]
        for key, value in point.items():
            flag = key.replace("_", "-")
            if value in ("True", "False"):
                words.append(f"--{flag}" if value == "True" else f"--no-{flag}")
            else:
                words += [f"--{flag}", *value.split()]
        settings = parse_options(TrainConfig, words, "train")
        options = json.loads(settings.to_json())
        runs.append(GridRun(name, words, {key: options[key] for key in point}, settings))
    return runs


def run_sweep(config: SweepConfig) -> list[dict]:
    """Train the runs that are not finished; `fsc147lib sweep` calls this.

    Returns:
        The rows of `sweep.json`, in the grid's order: `name`, `options` (of the grid), `finished`, `error` (None, or
        the last printed line of a failed run), `seconds` (of all its processes); of a finished run `best` and `last`
        (validation metrics with their epoch), `curve` (metrics of each epoch) and `splits` (`answer_split` of each).
    """
    runs, path = grid_runs(config), config.out / "sweep.json"
    spent = {row["name"]: row["seconds"] for row in json.loads(path.read_text())["runs"]} if path.is_file() else {}
    rows = {run.name: run.row(spent.get(run.name, 0.0)) for run in runs}

    def write() -> None:
        write_json(path, {"train": config.train, "grid": config.grid, "runs": list(rows.values())})

    write()
    waiting = [run for run in runs if not rows[run.name]["finished"]]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    for run, seconds, error in processes(waiting, config.out / "logs", config.parallel):
        rows[run.name] = run.row(rows[run.name]["seconds"] + seconds, error)
        write()
        print(f"{run.name}: {error or 'MAE {mae:.2f}'.format(**rows[run.name]['best'])}, {seconds:.0f} s", flush=True)
    for run in runs:
        if config.splits and rows[run.name]["finished"]:
            rows[run.name]["splits"] = {split: answer_split(run.config, split) for split in config.splits}
            write()
    return list(rows.values())


def processes(runs: list[GridRun], logs: Path, parallel: int) -> Iterator[tuple[GridRun, float, str | None]]:
    """Train runs, `parallel` at once.  Yields each at its end, with its seconds and its error; an end ends them all."""
    threads = max(1, (os.cpu_count() or 1) // max(1, min(parallel, len(runs))))
    waiting = list(runs)
    active: dict[str, tuple[GridRun, subprocess.Popen, float]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < parallel:
                run = waiting.pop(0)
                active[run.name] = run, start(run, logs / f"{run.name}.txt", threads), time.perf_counter()
            time.sleep(0.1)
            for run, process, began in [entry for entry in active.values() if entry[1].poll() is not None]:
                del active[run.name]
                printed = (logs / f"{run.name}.txt").read_text(errors="replace").strip()
                ended = printed.splitlines()[-1] if printed else f"ended with status {process.returncode}"
                yield run, time.perf_counter() - began, ended if process.returncode else None
    finally:
        for _, process, _ in active.values():
            process.terminate()
            process.wait()


def start(run: GridRun, log: Path, threads: int) -> subprocess.Popen:
    """Start a run, or go on with it from its last whole epoch."""
    command = [sys.executable, "-m", "fsc147lib", "train", *run.words]
    if (run.config.out / "last").is_dir():
        command.append("--resume")
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **os.environ}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def answer_split(config: TrainConfig, split: str) -> dict:
    """Answers of a run's last weights on a split: the `metrics`, and each image's `error` and `kl`."""
    found = evaluate(EvaluateConfig(
        config.data, str(config.out / "last"), split, batch_size=64, category=config.category,
        max_pixels=config.max_pixels, precision=config.precision,
    ))  # fmt: skip
    images = {key: [image.row()[key] for image in found.images] for key in ("error", "kl")}
    return {"metrics": found.metrics, **images}
