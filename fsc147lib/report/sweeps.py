"""The table and the figure of a sweep: runs that differ in their seed alone are one line, with mean and range."""

from collections.abc import Iterable, Sequence

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
    "seconds": ("s a run", "{seconds[0]:.0f}"),
    "error": ("failed", "{error}"),
}

SPLIT_COLUMNS = {
    "runs": ("runs", "{runs}"),
    "mae": ("MAE (range)", "{mae[0]:.2f} ({mae[1]:.2f} to {mae[2]:.2f})"),
    "better": ("better by (95 %)", "{better[1]:.2f} ({better[0]:.2f} to {better[2]:.2f})"),
    "exact": ("exactly right", "{exact[0]:.0%}"),
    "kl": ("KL", "{kl[0]:.2f}"),
}


def _by_options(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """The rows of `run_sweep` that differ in their seed alone, under their other options."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = ", ".join(f"{key} {value}" for key, value in row["options"].items() if key != "seed")
        groups.setdefault(name or "all", []).append(row)
    return groups


def _mean_and_range(values: Iterable[float | None]) -> tuple[float, float, float] | None:
    known = [value for value in values if value is not None]  # KL of empty scenes alone is None
    return (float(np.mean(known)), min(known), max(known)) if known else None


def sweep_groups(rows: Sequence[dict]) -> list[dict]:
    """The rows of `run_sweep` that differ in their seed alone, put together.

    Returns:
        Of each group `name` (its options), `runs` (how many have finished), `error` (of one that failed), and over
        the finished ones `best`, `last` (MAE), `kl` (of the last epoch), `seconds` (each mean, lowest, highest; None
        of no run) and `curves` (each [epochs + 1] MAE).
    """
    found = []
    for name, members in _by_options(rows).items():
        finished = [row for row in members if row["finished"]]
        found.append({
            "name": name, "runs": len(finished), "error": next((row["error"] for row in members if row["error"]), None),
            "best": _mean_and_range(row["best"]["mae"] for row in finished),
            "last": _mean_and_range(row["last"]["mae"] for row in finished),
            "kl": _mean_and_range(row["last"]["kl"] for row in finished),
            "seconds": _mean_and_range(row["seconds"] for row in finished),
            "curves": [[line["mae"] for line in row["curve"]] for row in finished],
        })  # fmt: skip
    return found


def sweep_table(rows: Sequence[dict]) -> str:
    """The groups of a sweep as text, with mean and range over seeds."""
    return table(sweep_groups(rows), COLUMNS)


def splits_table(rows: Sequence[dict], split: str) -> str:
    """What the last weights of a sweep's runs answered on a split (`--splits`), a line for each group.

    `better by` is how much smaller the error is than the first group's, over the seeds that both have and the same
    pictures, with its 95 % bootstrap interval.
    """
    first, lines = None, []
    for name, members in _by_options(row for row in rows if split in row.get("splits", {})).items():
        found = {row["options"].get("seed"): row["splits"][split] for row in members}
        line: dict = {"name": name, "runs": len(found)}
        for key in ("mae", "exact", "kl"):
            line[key] = _mean_and_range(answers["metrics"][key] for answers in found.values())
        if both := [seed for seed in found if first and seed in first]:
            line["better"] = paired_difference([first[s]["error"] for s in both], [found[s]["error"] for s in both])
        first = first or found
        lines.append(line)
    return table(lines, SPLIT_COLUMNS, head=split)


def epoch_curves(runs: dict[str, Sequence[dict]], baseline: float) -> Figure:
    """Validation MAE and alignment of several runs (name -> its `TrainResult.epochs`), epoch by epoch.

    `baseline`, the MAE of always the training mean, is drawn as a line.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for place, key, label in ((axes[0], "mae", "validation MAE, objects"), (axes[1], "kl", "KL(P || A), nats")):
        for name, epochs in runs.items():
            place.plot([line["epoch"] for line in epochs], [line["val"][key] for line in epochs], "o-", label=name)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.set(xlabel="epoch", title=label)
    axes[0].axhline(baseline, linestyle="--", color="black", linewidth=1, label="always the training mean")
    for place in axes:  # at last: limits that are set no longer make room for what is drawn
        place.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def sweep_figure(rows: Sequence[dict]) -> Figure:
    """Validation MAE by epoch, best MAE and last KL of each group of finished runs: means, with their ranges."""
    groups = [group for group in sweep_groups(rows) if group["runs"]]
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 1.5 + max(2.5, 0.35 * len(groups))), layout="constrained")
    for i, group in enumerate(groups):
        curves = np.array(group["curves"])  # [runs, epochs + 1]
        epochs = np.arange(curves.shape[1])
        axes[0].plot(epochs, curves.mean(axis=0), ".-", color=f"C{i}", label=f"{group['name']} ({group['runs']})")
        axes[0].fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=f"C{i}", alpha=0.15)
        for place, key in ((axes[1], "best"), (axes[2], "kl")):
            mean, low, high = group[key] or (np.nan,) * 3
            place.barh(i, mean, xerr=[[mean - low], [high - mean]], color=f"C{i}", capsize=3)
    names = axes[0].get_legend_handles_labels()[1]
    axes[0].set(xlabel="epoch", ylabel="validation MAE, objects", title="mean over runs, with their range")
    axes[0].legend(frameon=False, fontsize=9)
    for place, label in ((axes[1], "best validation MAE, objects"), (axes[2], "KL(P || A) at the end, nats")):
        place.set(xlabel=label)
        place.set_yticks(range(len(groups)), labels=names if place is axes[1] else [])
        place.invert_yaxis()
    return figure
