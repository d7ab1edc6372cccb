"""Tables and curves of training runs side by side: the command `compare`, and the runs of a sweep."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from tyro.conf import Positional

from ..evaluation import metrics_table, paired_difference
from ..evaluation.tables import aligned
from ..options import need
from ..training.run import MAY_CHANGE, read_run


@dataclass(frozen=True)
class CompareConfig:
    """Compare the best epochs of training runs; differences are those of each run to the first."""

    runs: Positional[tuple[Path, ...]]
    """Folders of two runs or more, such as runs/a runs/b."""
    figure: Path | None = None
    """Draw the curves of validation MAE and alignment here."""

    def __post_init__(self):
        need(self, "runs", len(self.runs) >= 2, "two folders of runs or more")


def compare_runs(config: CompareConfig) -> str:
    """Tables of the runs' options, metrics and differences, as text; draws their curves if asked to.

    Raises:
        ConfigError: a folder holds no run with a finished epoch.
    """
    names = [folder.name for folder in config.runs]
    if len(set(names)) < len(names):  # runs/a/both and runs/b/both
        names = [str(folder) for folder in config.runs]
    options, summaries, epochs = zip(*(read_run(folder) for folder in config.runs), strict=True)
    best, baselines = [summary["best"] for summary in summaries], summaries[0]["baselines"]
    if config.figure is not None:
        config.figure.parent.mkdir(parents=True, exist_ok=True)
        curves = {name: [lines] for name, lines in zip(names, epochs, strict=True)}
        epoch_curves(curves, baselines["mean"]["mae"]).savefig(config.figure, dpi=110)
    rows = [["options that differ", *names]]
    for option in dict.fromkeys(name for run in options for name in run if name not in MAY_CHANGE - {"data"}):
        values = [json.dumps(run.get(option)) for run in options]
        if len(set(values)) > 1:
            rows.append([option, *values])
    columns = {f"{name}, epoch {metrics['epoch']}": metrics for name, metrics in zip(names, best, strict=True)}
    title = f"validation of the best epoch; {options[0]['data']}"
    images = [images_of_best(folder, metrics["mae"]) for folder, metrics in zip(config.runs, best, strict=True)]
    differences = ["on the same validation images, 95 % bootstrap intervals over images:"]
    for name, own in zip(names[1:], images[1:], strict=True):
        differences += difference(f"{name} - {names[0]}", own, images[0])
    rows = rows if len(rows) > 1 else [*rows, ["none"] + [""] * len(names)]
    return "\n\n".join([aligned(rows), metrics_table(title, columns, baselines), "\n".join(differences)])


def image_rows(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a table of images (CSV) by image name; {} without the file."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def images_of_best(folder: Path, mae: float) -> dict[str, dict[str, str]]:
    """Rows of a run's best/validation.csv; {} if its MAE is not `mae`: then a crash left another epoch's file."""
    rows = image_rows(folder / "best" / "validation.csv")
    return rows if rows and np.isclose(np.mean([float(row["error"]) for row in rows.values()]), mae) else {}


def against_before(out: Path) -> str:
    """MAE and KL of a run's last validation minus those before training, with 95 % intervals over images."""
    return "\n".join(difference("last - before", *map(image_rows, (out / "last/validation.csv", out / "before.csv"))))


def difference(names: str, own: dict[str, dict], first: dict[str, dict]) -> list[str]:
    """A line each for MAE and KL: mean difference of two runs over the same images, with its 95 % interval."""
    if not own or own.keys() != first.keys():
        return [f"{names}: not the same images, or a table of images is missing"]
    lines = []
    for key, words in (("error", "MAE"), ("kl", "KL")):
        known = [image for image in first if first[image][key] not in (None, "")]  # an empty scene has no KL
        low, middle, high = paired_difference(*([float(run[image][key]) for image in known] for run in (own, first)))
        verdict = "no clear difference" if low <= 0 <= high else "better" if middle < 0 else "worse"
        lines.append(f"{names}: {words} {middle:+.3f} ({low:+.3f} to {high:+.3f}), {verdict}")
    return lines


# --- Sweeps: the runs of a group differ in their seed alone


def by_options(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Group the rows of `run_sweep` by their options without the seed; a group's name is these options."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = ", ".join(f"{key} {value}" for key, value in row["options"].items() if key != "seed")
        groups.setdefault(name or "all", []).append(row)
    return groups


def mean_and_range(values: Iterable[float | None], form: str = ".2f") -> str:
    """ "mean (lowest to highest)" of the values that are not None; "" without any."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):{form}} ({min(known):{form}} to {max(known):{form}})" if known else ""


def sweep_table(rows: Sequence[dict]) -> str:
    """A line for each group of `run_sweep`'s rows, with means and ranges over seeds; failed runs below."""
    lines = [["variant", "runs", "best MAE (range)", "last MAE (range)", "last KL (range)", "s a run"]]
    for name, members in by_options(rows).items():
        done = [row for row in members if row["finished"]]
        best, last = (mean_and_range(row[epoch]["mae"] for row in done) for epoch in ("best", "last"))
        kl = mean_and_range((row["last"]["kl"] for row in done), ".3f")
        seconds = f"{np.mean([row['seconds'] for row in done]):.0f}" if done else ""
        lines.append([name, str(len(done)), best, last, kl, seconds])
    return "\n".join([aligned(lines), *(f"{row['name']} failed: {row['error']}" for row in rows if row["error"])])


def sweep_figure(rows: Sequence[dict]) -> Figure:
    """`epoch_curves` of the finished rows of `run_sweep`, a curve for each group."""
    groups = by_options(row for row in rows if row["finished"])
    return epoch_curves({f"{name} ({len(runs)})": [row["curve"] for row in runs] for name, runs in groups.items()})


def epoch_curves(groups: dict[str, list[Sequence[dict]]], baseline: float | None = None) -> Figure:
    """Validation MAE and KL by epoch: a curve for the mean of each group of runs, and a band over their range.

    Args:
        groups: name -> runs; a run is `TrainResult.epochs`, or the `curve` of a row of `run_sweep`.
        baseline: MAE of always answering the training mean, drawn as a line.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3 + 0.1 * len(groups)), layout="constrained")
    for place, key, label in ((axes[0], "mae", "validation MAE, objects"), (axes[1], "kl", "KL(P || A), nats")):
        for name, runs in groups.items():
            values = np.array([[line.get("val", line)[key] for line in run] for run in runs], dtype=float)  # [R, E]
            epochs = [line["epoch"] for line in runs[0]]
            place.plot(epochs, values.mean(axis=0), "o-", label=name)
            place.fill_between(epochs, values.min(axis=0), values.max(axis=0), alpha=0.15)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.set(xlabel="epoch", title=label)
    if baseline is not None:
        axes[0].axhline(baseline, linestyle="--", color="black", linewidth=1, label="always the training mean")
    for place in axes:
        place.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    return figure
