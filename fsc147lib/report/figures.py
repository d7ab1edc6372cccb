"""Figures of samples, maps, counts, predictions and timings.  The caller computes the numbers."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..data import Sample
from ..evaluation.answering import ImageResult
from ..model import Look, Prediction
from ..model.looking import map_title

NO_TARGET = "nothing to count: no target"
NOTHING = 1e-12  # the largest value of a map that is 0 everywhere
COUNT_COLOUR, ATTENTION_COLOUR, GREY = "#1f6fb4", "#d9541e", "#777777"
MAP_COLOURS, DIFFERENCE_COLOURS = "viridis", "cividis"  # lighter is more, also in grey and for the colour-blind
LABEL = 9  # points of the smallest text


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure for pictures of a width and height in inches, and its hidden axes [rows, columns]."""
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for place in axes.flat:
        place.axis("off")
    return figure, axes


# --- Photographs and maps


def show_dots(axes, sample: Sample, title: str | None = None, boxes: bool = True) -> None:
    """Draw a photograph with its dots and exemplar boxes; without a title, count and category stand above it."""
    axes.imshow(sample.image)
    axes.scatter(*sample.points.T, s=14, c="#ff2d2d", edgecolors="white", linewidths=0.5)
    for x1, y1, x2, y2 in sample.boxes if boxes else ():
        axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="#00e5ff", linewidth=1.6))
    axes.set_title(title or f"{sample.count} {sample.category}", fontsize=LABEL, parse_math=False)  # "$": no formula
    axes.axis("off")


def colour_scale(values: np.ndarray, largest: float | None = None, signed: bool = False) -> ScalarMappable:
    """Colours for a map's values from 0 to `largest` (None: the map's own), by their square root, which keeps small
    values visible; for a signed map linear, from -largest to largest."""
    largest = max(float(np.abs(values).max() if largest is None else largest), NOTHING)
    if signed:
        return ScalarMappable(Normalize(-largest, largest), DIFFERENCE_COLOURS)
    return ScalarMappable(PowerNorm(0.5, 0, largest), MAP_COLOURS)


def show_map(
    axes, image: Image.Image, values: np.ndarray, title: str = "", largest: float | None = None, signed: bool = False
):
    """Draw a map [h, w] over a grey photograph, stretched to the photograph's size and not smoothed.

    `largest` and `signed` are those of `colour_scale`; maps that are compared need the same `largest`.
    Returns matplotlib's image of the map, for `show_scale`.
    """
    colours = colour_scale(values, largest, signed)
    axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
    extent = (0, image.width, image.height, 0)
    shown = axes.imshow(values, colours.cmap, colours.norm, alpha=0.6, extent=extent, interpolation="nearest")
    axes.set_title(title, fontsize=LABEL, parse_math=False)
    axes.axis("off")
    return shown


def show_scale(shown, axes, label: str = "part of the map in a cell", extend: str = "neither") -> None:
    """Draw a map's colour bar beside the axes.  A map of zeros gets none; `extend="max"`: some values lie above."""
    if shown.norm.vmax <= NOTHING:
        return
    bar = shown.figure.colorbar(shown, ax=axes, label=label, extend=extend, fraction=0.03, pad=0.01, aspect=30)
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=LABEL)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))


def gallery(samples: Sequence[Sample], columns: int = 4) -> Figure:
    """Photographs with dots and exemplar boxes, row by row."""
    figure, axes = grid(-(-len(samples) // columns), columns, 3.1, 2.4)
    for place, sample in zip(axes.flat, samples, strict=False):
        show_dots(place, sample)
    return figure


def sample_views(sample: Sample) -> Figure:
    """A photograph with dots and boxes, its density, and its 14x14 target heatmap, side by side."""
    figure, axes = grid(1, 3, 4, 3.2)
    density, image = sample.density, sample.image
    show_dots(axes[0, 0], sample)
    shown = show_map(axes[0, 1], image, density, f"density, sums to {density.sum(dtype=float):.2f}")
    show_scale(shown, axes[0, 1], "objects per pixel")
    title = "14x14 target heatmap, sums to 1" if sample.count else NO_TARGET
    show_scale(show_map(axes[0, 2], image, sample.target, title), axes[0, 2])
    return figure


def map_comparison(
    samples: Sequence[Sample], maps: dict[str, Look | np.ndarray], captions: Sequence[str] = ()
) -> Figure:
    """A row for each sample: photograph, target heatmap, and a column for each kind of map.  All share a colour scale.

    Args:
        maps: heading -> maps [B, 14, 14] in the samples' order, or a `Look` from `mean_map`; a `Look`'s maps are
            titled with the answers that they belong to.
        captions: a title for each photograph; without them, count and category.
    """
    targets = np.stack([sample.target for sample in samples])
    values = [targets, *(np.asarray(getattr(column, "maps", column)) for column in maps.values())]
    largest = float(np.quantile(values, 0.99))  # a picture with one object would darken the others
    width = min(3, 11.5 / (2 + len(maps)))  # a page shrinks wider figures, labels included
    figure, axes = grid(len(samples), 2 + len(maps), width, 0.8 * width)
    for i, (row, sample) in enumerate(zip(axes, samples, strict=True)):
        show_dots(row[0], sample, captions[i] if captions else None, boxes=False)
        titles = ["" if i else "target"] if sample.count else [NO_TARGET]
        for name, column in maps.items():
            parts = [] if i else [name]
            if isinstance(column, Look):
                parts.append(column.titles[i])
            titles.append(": ".join(parts))
        for place, column, title in zip(row[1:], values, titles, strict=True):
            shown = show_map(place, sample.image, column[i], fill(title, int(14 * width)), largest)
    show_scale(shown, axes[:, 1:], extend="max")
    return figure


def layer_head_grid(maps: np.ndarray, image: Image.Image, layers: Sequence[int], title: str = "") -> Figure:
    """Attention maps [L, H, 14, 14] of one image by layer (down) and head (across), on one colour scale.

    Each map is titled with its sum, the attention on the image; `layers` are the numbers of the L layers.
    """
    figure, axes = grid(*maps.shape[:2], 2.2, 1.75)
    for (i, j), place in np.ndenumerate(axes):
        name = f"layer {layers[i]}, head {j}: {100 * maps[i, j].sum():.0f} %"
        shown = show_map(place, image, maps[i, j], name, float(maps.max()))
    show_scale(shown, axes, "attention on a cell")
    figure.suptitle(title, fontsize=LABEL, parse_math=False)
    return figure


# --- Counts


def count_histogram(counts: dict[str, Sequence[int]]) -> Figure:
    """Histogram of the images' counts for each split (name -> counts), on logarithmic axes with room for 0."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    found = np.concatenate(list(counts.values()))
    edges = np.geomspace(max(found.min(), 1), found.max() + 1, 16).round()
    edges = np.unique([found.min(), *edges]) - 0.5  # whole counts, so no empty bins
    for i, (split, values) in enumerate(counts.items()):
        axes.hist(values, edges, histtype="step", linewidth=1.8, color=f"C{i}", label=f"{split} ({len(values)} images)")
        axes.axvline(float(np.median(values)), color=f"C{i}", linestyle=":", linewidth=1)
    axes.set(xlabel="objects in the image (dotted: median)", ylabel="images", yscale="log")
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=LABEL, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def category_bars(samples: Sequence[Sample], most: int = 20) -> Figure:
    """Number of images of each category, for the most frequent categories."""
    names, numbers = np.unique([sample.category for sample in samples], return_counts=True)
    order = np.argsort(numbers)[-most:]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.24 * len(order)), layout="constrained")
    axes.barh(np.arange(len(order)), numbers[order], color=COUNT_COLOUR)
    axes.set_yticks(np.arange(len(order)), names[order], parse_math=False)
    axes.set(xlabel="images")
    return figure


def predictions_against_truth(images: Sequence[ImageResult]) -> Figure:
    """Predicted against true counts, on logarithmic axes with room for 0; answers without a number at the bottom."""
    figure, axes = plt.subplots(figsize=(4.6, 4.3), layout="constrained")
    true, predicted = np.array([(image.count, image.predicted) for image in images], dtype=float).T  # None is NaN
    lost = np.isnan(predicted)
    axes.scatter(true[~lost], predicted[~lost], s=16, alpha=0.6, color=COUNT_COLOUR)
    low, high = 0.8 * np.nanmin([true, predicted]), 1.2 * np.nanmax([true, predicted]) + 0.1
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    if lost.any():
        below = low if low >= 1 else -0.6  # and not on a true 0
        axes.plot(true[lost], [below] * lost.sum(), "rx", label=f"{lost.sum()} unparsed")
        axes.legend(frameon=False, fontsize=LABEL)
    axes.set(xlabel="true count", ylabel="predicted count")
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_yscale("symlog", linthresh=1, linscale=0.3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    return figure


def answer_bars(histogram: dict[int, tuple[int, int]]) -> Figure:
    """For each number, images whose true count it is (bars up) and answers that say it (bars down).

    `histogram` is that of `answer_histogram`: number -> (images, answers).
    """
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


# --- Predictions


def view_figure(
    sample: Sample, maps: Sequence[dict], prediction: Prediction | None = None, true: int | None = None, title: str = ""
) -> Figure:
    """A photograph with dots, maps (each the keyword arguments of `show_map`), and a prediction's distribution over
    counts, which marks the true count if given; three pictures in a row."""
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
    """Save a figure of a photograph, the map of the model's answer, and the distribution over counts."""
    heatmap = {"values": prediction.heatmap, "title": map_title(prediction.answer, "own")}
    title = f"{prediction.sample.category}: {prediction.answer!r:.60}"
    figure = view_figure(prediction.sample, [heatmap], prediction, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show_distribution(axes, prediction: Prediction, true: int | None = None) -> None:
    """Draw the probability of each count, its 90 % interval, the model's answer and, if given, the true count."""
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
    """How often intervals contain the true count, against the probability they claim; whiskers are 95 % intervals.

    `rows` are those of `calibration`.
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


# --- Timings


def overhead_bars(rows: Sequence[dict]) -> Figure:
    """Overhead of each heatmap with its 95 % interval, and peak memory, from the rows of `time_losses`."""
    lost = [f"{row['name']}: out of memory" for row in rows if row["out_of_memory"]]
    rows = [row for row in rows if not row["out_of_memory"]]
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.4), layout="constrained")
    names = [row["name"].replace(", ", "\n").replace("_", "\n").replace(" on ", "\non ") for row in rows]
    kinds = {"count only": COUNT_COLOUR, "heatmap computed": GREY, "heatmap trained": ATTENTION_COLOUR}
    colours = [list(kinds.values())[(row["method"] != "none") + row["trained"]] for row in rows]
    low, middle, high = (np.array([100 * row[f"overhead_{x}"] for row in rows[1:]]) for x in ("low", "median", "high"))
    bars = axes[0].bar(names[1:], middle, yerr=np.abs([middle - low, high - middle]), color=colours[1:], capsize=4)
    axes[0].bar_label(bars, fmt="%.1f", fontsize=LABEL, padding=3)
    axes[0].margins(y=0.12)  # room for the labels
    axes[0].set(ylabel="% of a step", title="overhead: median, and its 95 % interval as a whisker")
    axes[1].bar(names, [(row["peak_memory"] or 0) / 1024 for row in rows], color=colours)
    axes[1].set(ylabel="GiB", title="; ".join(["peak memory", *lost]))
    for place in axes:
        place.tick_params("x", labelsize=LABEL)
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in kinds.items()]
    axes[0].legend(handles=patches, frameon=False, fontsize=LABEL, loc="upper left")
    return figure


def throughput_bars(rows: Sequence[dict]) -> Figure:
    """Images per second of each variant, and its multiple of the first variant; whiskers span the timed turns.

    `rows` are those of `throughput`; variants that failed are left out.
    """
    rows = [row for row in rows if "rates" in row]
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.5 * len(rows)), layout="constrained")
    names = [f"{row['name']} (batch {row['batch_size']})" for row in rows]
    speeds = np.array([row["images_per_second"] for row in rows])
    low, high = ([end(row["rates"]) for row in rows] for end in (min, max))
    colours = [GREY if "transformers" in name else ATTENTION_COLOUR for name in names]
    bars = axes.barh(names, speeds, xerr=np.abs([speeds - low, high - speeds]), color=colours, capsize=3)
    axes.bar_label(bars, [f" {speed:.0f}   {speed / speeds[0]:.1f}x" for speed in speeds], fontsize=LABEL)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set(xlabel="images a second, training")
    return figure
