"""Training runs side by side: tables and curves of a sweep, and the command `compare`."""

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
    """Lay training runs side by side; differences are between the first and each of the others."""

    runs: Positional[tuple[Path, ...]]
    """Folders of two runs or more, such as runs/a runs/b."""
    figure: Path | None = None
    """Draw the curves of validation MAE and alignment here."""

    def __post_init__(self):
        need(self, "runs", len(self.runs) >= 2, "two folders of runs or more")


def compare_runs(config: CompareConfig) -> str:
    """Describe the runs and draw their curves if asked to; `fsc147lib compare` calls this.

    Raises:
        ConfigError: a folder holds no run with a finished epoch.
    """
    names = [folder.name for folder in config.runs]
    if len(set(names)) < len(names):  # runs/a/both and runs/b/both
        names = [str(folder) for folder in config.runs]
    options, summaries, epochs = zip(*(read_run(folder) for folder in config.runs), strict=True)
    images = [images_of_best(folder, summary) for folder, summary in zip(config.runs, summaries, strict=True)]
    baselines, best = summaries[0]["baselines"], [summary["best"] for summary in summaries]
    if config.figure is not None:
        config.figure.parent.mkdir(parents=True, exist_ok=True)
        epoch_curves(dict(zip(names, epochs, strict=True)), baselines["mean"]["mae"]).savefig(config.figure, dpi=110)
    title = f"validation of the best epoch; {options[0]['data']}"
    columns = {f"{name}, epoch {metrics['epoch']}": metrics for name, metrics in zip(names, best, strict=True)}
    parts = [options_table(names, options), metrics_table(title, columns, baselines), differences(names, images)]
    return "\n\n".join(parts)


def images_of_best(folder: Path, summary: dict) -> dict[str, dict[str, str]]:
    """Rows of best/validation.csv by image name; {} without that file, or if a crash left another epoch's."""
    path = folder / "best" / "validation.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    same = np.isclose(np.mean([float(row["error"]) for row in rows.values()]), summary["best"]["mae"])
    return rows if same else {}


def options_table(names: Sequence[str], options: Sequence[dict]) -> str:
    """The options in which runs differ, a line each."""
    rows = [["options that differ", *names]]
    for option in dict.fromkeys(name for run in options for name in run if name not in MAY_CHANGE - {"data"}):
        values = [json.dumps(run.get(option)) for run in options]
        if len(set(values)) > 1:
            rows.append([option, *values])
    return aligned(rows if len(rows) > 1 else [*rows, ["none"] + [""] * len(names)])


def differences(names: Sequence[str], images: Sequence[dict]) -> str:
    """Differences of each run's best epoch to the first run's, image by image, with 95 % intervals."""
    lines = ["on the same validation images, 95 % bootstrap intervals over images:"]
    first = images[0]
    for name, rows in zip(names[1:], images[1:], strict=True):
        if not first or first.keys() != rows.keys():
            lines.append(f"{name} and {names[0]}: not the same images, or no best/validation.csv of both")
            continue
        for key, words in (("error", "MAE"), ("kl", "KL")):
            known = [image for image in first if first[image].get(key)]  # an empty scene has no KL
            values = ([float(run[image][key]) for image in known] for run in (rows, first))
            low, middle, high = paired_difference(*values)
            verdict = "no clear difference" if low <= 0 <= high else "better" if middle < 0 else "worse"
            lines.append(f"{name} - {names[0]}: {words} {middle:+.3f} ({low:+.3f} to {high:+.3f}), {verdict}")
    return "\n".join(lines)


def by_options(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows of `run_sweep` by their options: a group's runs differ in their seed alone."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = ", ".join(f"{key} {value}" for key, value in row["options"].items() if key != "seed")
        groups.setdefault(name or "all", []).append(row)
    return groups


def mean_and_range(values: Iterable[float | None], form: str = ".2f") -> str:
    """Mean, lowest and highest value as text; None (KL of empty scenes alone) is left out."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):{form}} ({min(known):{form}} to {max(known):{form}})" if known else ""


def sweep_table(rows: Sequence[dict]) -> str:
    """The rows of `run_sweep`, a line for each group, with mean and range over seeds, and errors below."""
    lines = [["variant", "runs", "best MAE (range)", "last MAE (range)", "last KL (range)", "s a run"]]
    for name, members in by_options(rows).items():
        done = [row for row in members if row["finished"]]
        best, last = (mean_and_range(row[epoch]["mae"] for row in done) for epoch in ("best", "last"))
        kl = mean_and_range((row["last"]["kl"] for row in done), ".3f")
        seconds = f"{np.mean([row['seconds'] for row in done]):.0f}" if done else ""
        lines.append([name, str(len(done)), best, last, kl, seconds])
    return "\n".join([aligned(lines), *(f"{row['name']} failed: {row['error']}" for row in rows if row["error"])])


def splits_table(rows: Sequence[dict], split: str) -> str:
    """Answers of a sweep's runs on a split (`--splits`), a line for each group.

    `better by` is the first group's error minus this one's, over the seeds of both and the same images, with its 95 %
    bootstrap interval.
    """
    lines, first = [[split, "runs", "MAE (range)", "better by (95 %)", "exactly right", "KL"]], None
    for name, members in by_options(row for row in rows if split in row.get("splits", {})).items():
        found = {row["options"].get("seed"): row["splits"][split] for row in members}
        metrics = [run["metrics"] for run in found.values()]
        kl = [run["kl"] for run in metrics if run["kl"] is not None]
        better = ""
        if shared := [seed for seed in found if first and seed in first]:
            low, middle, high = paired_difference(*([run[seed]["error"] for seed in shared] for run in (first, found)))
            better = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        exact = f"{np.mean([run['exact'] for run in metrics]):.0%}"
        mae = mean_and_range(run["mae"] for run in metrics)
        lines.append([name, str(len(found)), mae, better, exact, f"{np.mean(kl):.2f}" if kl else ""])
        first = first or found
    return aligned(lines)


def epoch_curves(runs: dict[str, Sequence[dict]], baseline: float) -> Figure:
    """Validation MAE and KL by epoch of runs, name -> `TrainResult.epochs`; a line at `baseline`, the MAE of always
    the training mean."""
    figure = group_curves({name: [[{**line, **line["val"]} for line in run]] for name, run in runs.items()})
    place = figure.axes[0]
    place.axhline(baseline, linestyle="--", color="black", linewidth=1, label="always the training mean")
    place.set_ylim(0, 1.05 * max(baseline, place.get_ylim()[1]))
    place.legend(frameon=False, fontsize=9)
    return figure


def sweep_figure(rows: Sequence[dict]) -> Figure:
    """Validation MAE and KL by epoch of the rows of `run_sweep`: mean over seeds, and their range as a band."""
    groups: dict[str, list] = {}
    for name, members in by_options(row for row in rows if row["finished"]).items():
        groups[f"{name} ({len(members)})"] = [row["curve"] for row in members]
    return group_curves(groups)


def group_curves(groups: dict[str, list[list[dict]]]) -> Figure:
    """Validation MAE and KL by epoch of groups of runs, each a list of "epoch", "mae", "kl"."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3 + 0.1 * len(groups)), layout="constrained")
    for place, key, label in ((axes[0], "mae", "validation MAE, objects"), (axes[1], "kl", "KL(P || A), nats")):
        for name, runs in groups.items():
            values = np.array([[line[key] for line in run] for run in runs], dtype=float)  # [runs, epochs + 1]
            epochs = [line["epoch"] for line in runs[0]]
            place.plot(epochs, values.mean(axis=0), "o-", label=name)
            place.fill_between(epochs, values.min(axis=0), values.max(axis=0), alpha=0.15)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.set(xlabel="epoch", title=label)
        place.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    return figure
