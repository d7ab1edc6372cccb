"""`compare`: training runs side by side: options that differ, best validation, and differences with intervals.

Left out: grids of runs, whose seeds are put together (`sweeps`).
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from ..evaluation import metrics_table, paired_difference
from ..evaluation.tables import aligned
from ..options import need
from ..training.run import MAY_CHANGE, read_run
from .sweeps import epoch_curves


@dataclass(frozen=True)
class CompareConfig:
    """Lay training runs side by side; differences are between the first and each of the others."""

    runs: Positional[tuple[Path, ...]]
    """Folders of two runs or more, such as runs/a runs/b."""
    figure: Path | None = None
    """Draw the curves of validation MAE and alignment here."""

    def __post_init__(self):
        need(self, "runs", len(self.runs) >= 2, "two folders of runs or more")


@dataclass
class SavedRun:
    """What a run's folder says of it."""

    name: str
    options: dict
    summary: dict
    epochs: list[dict]  # a line of metrics.jsonl for each validation
    images: dict[str, dict[str, str]]  # of the best epoch: name -> error, kl ("" of an empty scene); {} if not kept


def saved_run(folder: Path) -> SavedRun:
    """A run as its folder holds it; ConfigError where that has no finished epoch."""
    options, summary, epochs = read_run(folder)
    path, images = folder / "best" / "validation.csv", {}
    if path.is_file():
        with path.open(newline="") as file:
            images = {row["name"]: row for row in csv.DictReader(file)}
        if not np.isclose(np.mean([float(row["error"]) for row in images.values()]), summary["best"]["mae"]):
            images = {}  # a crash came between best/ and summary.json
    return SavedRun(folder.name, options, summary, epochs, images)


def compare_runs(config: CompareConfig) -> str:
    """Read the runs, draw their curves if asked to, and describe them; `fsc147lib compare` calls this."""
    runs = [saved_run(folder) for folder in config.runs]
    if len({run.name for run in runs}) < len(runs):  # runs/a/both and runs/b/both
        for run, folder in zip(runs, config.runs, strict=True):
            run.name = str(folder)
    if config.figure is not None:
        config.figure.parent.mkdir(parents=True, exist_ok=True)
        mean = runs[0].summary["baselines"]["mean"]["mae"]
        epoch_curves({run.name: run.epochs for run in runs}, mean).savefig(config.figure, dpi=110)
    title = f"validation of the best epoch; {runs[0].options['data']}"
    columns = {f"{run.name}, epoch {run.summary['best']['epoch']}": run.summary["best"] for run in runs}
    parts = [options_table(runs), metrics_table(title, columns, runs[0].summary["baselines"]), differences(runs)]
    return "\n\n".join(parts)


def options_table(runs: list[SavedRun]) -> str:
    """The options in which runs differ, a line each."""
    rows = [["options that differ", *(run.name for run in runs)]]
    for option in dict.fromkeys(name for run in runs for name in run.options if name not in MAY_CHANGE - {"data"}):
        values = [json.dumps(run.options.get(option)) for run in runs]
        if len(set(values)) > 1:
            rows.append([option, *values])
    return aligned(rows if len(rows) > 1 else [*rows, ["none"] + [""] * len(runs)])


def differences(runs: list[SavedRun]) -> str:
    """By how much each run's best epoch differs from the first run's, image by image, with 95 % intervals."""
    first, lines = runs[0], ["on the same validation images, 95 % bootstrap intervals over images:"]
    for run in runs[1:]:
        if not first.images or first.images.keys() != run.images.keys():
            lines.append(f"{run.name} and {first.name}: not the same images, or no best/validation.csv of both")
            continue
        for key, words in (("error", "MAE"), ("kl", "KL")):
            names = [name for name, row in first.images.items() if row[key]]
            pair = ([float(one.images[name][key]) for name in names] for one in (run, first))
            low, middle, high = paired_difference(*pair)
            verdict = "no clear difference" if low <= 0 <= high else "better" if middle < 0 else "worse"
            lines.append(f"{run.name} - {first.name}: {words} {middle:+.3f} ({low:+.3f} to {high:+.3f}), {verdict}")
    return "\n".join(lines)
