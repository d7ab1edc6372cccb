"""The table and the figure of a sweep: runs that differ in their seed alone are one line, with mean and range."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..evaluation import paired_difference
from .timing import table

COLUMNS = {
    "runs": ("runs", "{runs}"),
    "best": ("best MAE (range)", "{best[0]:.2f} ({best[1]:.2f} to {best[2]:.2f})"),
    "last": ("last MAE (range)", "{last[0]:.2f} ({last[1]:.2f} to {last[2]:.2f})"),
    "kl": ("last KL (range)", "{kl[0]:.3f} ({kl[1]:.3f} to {kl[2]:.3f})"),
    "seconds": ("s a run", "{seconds:.0f}"),
    "error": ("failed", "{error}"),
}

SPLIT_COLUMNS = {
    "runs": ("runs", "{runs}"),
    "last": ("MAE (range)", "{last[0]:.2f} ({last[1]:.2f} to {last[2]:.2f})"),
    "better": ("better by (95 %)", "{better[0]:.2f} ({better[1]:.2f} to {better[2]:.2f})"),
    "exact": ("exactly right", "{exact:.0%}"),
    "kl": ("KL", "{kl:.2f}"),
}


def _group_name(row: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in row["options"].items() if key != "seed") or "all"


def sweep_groups(rows: Sequence[dict]) -> list[dict]:
    """The rows of `run_sweep` that differ in their seed alone, put together.

    Returns:
        Of each group `name` (its options), `runs` (how many have finished), `error` (of one that failed), and over
        the finished ones `best`, `last` (MAE), `kl` (of the last epoch; each mean, lowest, highest), `seconds`
        (mean), `curves` (each [epochs + 1] MAE).
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(_group_name(row), []).append(row)
    found = []
    for name, members in groups.items():
        finished = [row for row in members if row["finished"]]
        errors = [row["error"] for row in members if row["error"]]
        group = {"name": name, "runs": len(finished), "error": errors[0] if errors else None, "curves": []}
        for key, part, metric in (("best", "best", "mae"), ("last", "last", "mae"), ("kl", "last", "kl")):
            values = [row[part][metric] for row in finished if row[part][metric] is not None]  # KL of empty scenes
            group[key] = (float(np.mean(values)), min(values), max(values)) if values else None
        if finished:
            group["seconds"] = float(np.mean([row["seconds"] for row in finished]))
            group["curves"] = [[line["mae"] for line in row["curve"]] for row in finished]
        found.append(group)
    return found


def epoch_curves(runs: dict[str, Sequence[dict]], baseline: float | None = None) -> Figure:
    """Validation MAE and alignment of several runs (name -> its `TrainResult.epochs`), epoch by epoch.

    `baseline`, the MAE of always the training mean, is drawn as a line if given.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for place, key, label in ((axes[0], "mae", "validation MAE, objects"), (axes[1], "kl", "KL(P || A), nats")):
        for name, epochs in runs.items():
            place.plot([line["epoch"] for line in epochs], [line["val"][key] for line in epochs], "o-", label=name)
        if key == "mae" and baseline is not None:
            place.axhline(baseline, linestyle="--", color="black", linewidth=1, label="always the training mean")
        place.set(xlabel="epoch", title=label, ylim=(0, None))
        place.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def sweep_table(rows: Sequence[dict]) -> str:
    """The groups of a sweep as text, with mean and range over seeds."""
    return table(sweep_groups(rows), COLUMNS)


def splits_table(rows: Sequence[dict], split: str) -> str:
    """What the last weights of a sweep's runs answered on a split (`--splits`), a line for each group.

    `better by` is how much smaller the error is than the first group's, over the seeds that both have and the same
    pictures, with its 95 % bootstrap interval.
    """
    groups: dict[str, dict] = {}
    for row in rows:
        if split in row.get("splits", {}):
            groups.setdefault(_group_name(row), {})[row["options"].get("seed")] = row["splits"][split]
    first, lines = next(iter(groups.values()), {}), []
    for name, found in groups.items():
        values = {key: [answers["metrics"][key] for answers in found.values()] for key in ("mae", "exact", "kl")}
        maes, means = values["mae"], {key: float(np.mean(value)) for key, value in values.items()}
        line = {"name": name, "runs": len(found), "last": (means["mae"], min(maes), max(maes)), **means}
        if both := [seed for seed in found if seed in first and found is not first]:
            ends = paired_difference([first[s]["error"] for s in both], [found[s]["error"] for s in both])
            line["better"] = [ends[1], ends[0], ends[2]]
        lines.append(line)
    return table(lines, SPLIT_COLUMNS, head=split)


def sweep_figure(rows: Sequence[dict]) -> Figure:
    """Validation MAE by epoch, best MAE and last KL of each group of finished runs: means, with their ranges."""
    groups = [group for group in sweep_groups(rows) if group["runs"]]
    figure, axes = plt.subplots(1, 3, figsize=(14, 1.5 + max(2.5, 0.35 * len(groups))), layout="constrained")
    names = [f"{group['name']} ({group['runs']})" for group in groups]
    for i, (name, group) in enumerate(zip(names, groups, strict=True)):
        curves = np.array(group["curves"])  # [runs, epochs + 1]
        epochs = np.arange(curves.shape[1])
        axes[0].plot(epochs, curves.mean(axis=0), ".-", color=f"C{i}", label=name)
        axes[0].fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=f"C{i}", alpha=0.15)
        for place, key in ((axes[1], "best"), (axes[2], "kl")):
            mean, low, high = group[key] or (np.nan,) * 3
            place.barh(i, mean, xerr=[[mean - low], [high - mean]], color=f"C{i}", capsize=3)
    axes[0].set(xlabel="epoch", ylabel="validation MAE, objects", title="mean over runs, with their range")
    axes[0].legend(frameon=False, fontsize=9)
    for place, label in ((axes[1], "best validation MAE, objects"), (axes[2], "KL(P || A) at the end, nats")):
        place.set(xlabel=label)
        place.set_yticks(range(len(groups)), labels=names if place is axes[1] else [])
        place.invert_yaxis()
    return figure
