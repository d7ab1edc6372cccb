"""Whether probabilities of counts can be believed: how often the truth lies in the interval that claims to hold it.

Left out: where the probabilities come from (`model.answers`).
"""

from collections.abc import Sequence

import numpy as np

from ..model import Prediction
from .metrics import bootstrap_interval

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def calibration(predictions: Sequence[Prediction], counts: Sequence[int], levels=LEVELS) -> list[dict]:
    """How often true counts lie in the predictions' central intervals that are to hold so much probability.

    Returns:
        For each level: `level`; `claimed`, the mean probability of the intervals, which end at whole numbers and so
        hold somewhat more; `inside`, how often the truth lies in them, with `low` and `high`, its 95 % bootstrap
        interval; `width`, the mean of how many numbers they span.  `inside` below `claimed`: it is too sure.
    """
    rows = []
    for level in levels:
        ends = [prediction.interval(level) for prediction in predictions]
        held = [p.distribution[low : high + 1].sum() for p, (low, high) in zip(predictions, ends, strict=True)]
        inside = [low <= count <= high for count, (low, high) in zip(counts, ends, strict=True)]
        low, rate, high = bootstrap_interval(inside)
        width = float(np.mean([high - low + 1 for low, high in ends]))
        row = {"level": level, "claimed": float(np.mean(held)), "inside": rate, "low": low, "high": high}
        rows.append({**row, "width": width})
    return rows


def calibration_table(rows: list[dict]) -> str:
    """The rows of `calibration` as text."""
    lines = [f"{'interval':>8}{'claimed':>10}{'truth inside (95 % interval)':>32}{'numbers in it':>16}"]
    for row in rows:
        inside = "{inside:.0%} ({low:.0%} to {high:.0%})".format(**row).replace("%", " %")
        lines.append(f"{row['level']:>8.0%}{row['claimed']:>10.0%}{inside:>32}{row['width']:>16.1f}")
    return "\n".join(lines)
