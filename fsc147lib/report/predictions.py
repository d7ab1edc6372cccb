"""Pictures of predictions: photograph, map and distribution; calibration; numbers that are said."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..data import Sample
from ..model import Prediction
from .figures import ATTENTION_COLOUR, COUNT_COLOUR, GREY, LABEL, grid, show_dots, show_map, show_scale


def view_figure(
    sample: Sample, maps: Sequence[dict], prediction: Prediction | None = None, true: int | None = None, title: str = ""
) -> Figure:
    """Photograph with dots, maps (each the arguments of `show_map`), and a distribution over counts; three a row.

    `true` is the true count, if known; `title` replaces count and category.
    """
    pictures = 1 + len(maps) + (prediction is not None)
    figure, axes = grid(-(-pictures // 3), min(3, pictures), 3.6, 2.8)
    photograph, *places = axes.flat
    show_dots(photograph, sample, title, boxes=False)
    for place, one in zip(places, maps, strict=False):
        show_scale(show_map(place, sample.image, **one), place, "")
    if prediction is not None:
        places[len(maps)].axis("on")
        show_distribution(places[len(maps)], prediction, true)
    return figure


def save_prediction(prediction: Prediction, path: Path) -> None:
    """Draw picture, map of the own answer, and distribution over counts to a file; its ending says the format."""
    heatmap = {"values": prediction.heatmap, "title": prediction.map_title}
    title = f"{prediction.sample.category}: {prediction.answer!r:.60}"
    figure = view_figure(prediction.sample, [heatmap], prediction, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show_distribution(axes, prediction: Prediction, true: int | None = None) -> None:
    """Probability of each number, with the 90 % interval, the model's own answer and the true count, if given."""
    distribution, (low, high) = prediction.distribution, prediction.interval(0.9)
    axes.axvspan(low - 0.5, high + 0.5, color=COUNT_COLOUR, alpha=0.12, label=f"90 %: {low} to {high}")
    axes.stairs(distribution, np.arange(len(distribution) + 1) - 0.5, fill=True, color=COUNT_COLOUR)
    shown = [*prediction.interval(0.999), low, high]
    marks = ("own answer", prediction.count, ATTENTION_COLOUR, "-"), ("true count", true, "black", ":")
    for name, number, colour, style in marks:
        if number is not None:
            axes.axvline(number, color=colour, linestyle=style, linewidth=1.2, label=f"{name} {number}")
            shown.append(number)
    axes.set(xlabel="number", ylabel="probability", ylim=(0, None))
    axes.set_xlim(max(0, min(shown) - 1) - 0.5, max(shown) + 1.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    silent = "" if prediction.covered > 0.99 else f"; a number is said with {prediction.covered:.0%}"
    axes.set_title(f"mode {prediction.mode}, mean {prediction.mean:.1f}{silent}", fontsize=LABEL)
    axes.legend(frameon=False, fontsize=LABEL)


def calibration_figure(rows: Sequence[dict]) -> Figure:
    """Share of true counts in an interval, against the probability that it claims: rows of `calibration`.

    Whiskers are 95 % intervals.
    """
    figure, axes = plt.subplots(figsize=(4, 3.6), layout="constrained")
    keys = ("claimed", "inside", "low", "high")
    claimed, inside, low, high = (100 * np.array([row[key] for row in rows]) for key in keys)
    spread = np.abs([low - inside, high - inside])
    axes.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="as often as claimed")
    axes.errorbar(claimed, inside, spread, fmt="o-", color=COUNT_COLOUR, capsize=3, label="measured")
    axes.set(xlabel="probability that the interval claims, %", ylabel="truth lies in it, %", ylim=(0, 102))
    axes.set_xlim(min(40, *claimed) - 3, 102)
    axes.legend(frameon=False, fontsize=LABEL)
    return figure


def answer_bars(histogram: dict[int, tuple[int, int]]) -> Figure:
    """Images with each true number, upwards, and answers with it, downwards: of `metrics.answer_histogram`."""
    numbers, (true, said) = list(histogram), np.array(list(histogram.values())).T
    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    axes.bar(numbers, true, color=GREY, label=f"true: {sum(true > 0)} numbers")
    spoken = f"said: {sum(said > 0)}, never said: {sum(said[true > 0] == 0)}"
    axes.bar(numbers, -said, color=COUNT_COLOUR, label=spoken)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set(xlabel="number", ylabel="images")
    axes.legend(frameon=False, fontsize=LABEL)
    return figure
