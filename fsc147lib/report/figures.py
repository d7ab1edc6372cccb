"""Pictures of samples, maps, errors and timings.  The numbers come from the caller."""

import re
from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import LogLocator, MaxNLocator, SymmetricalLogLocator
from PIL import Image

from ..data import Sample
from ..evaluation.answering import ImageResult
from ..model import Look

NO_TARGET = "nothing to count: no target"
NOTHING = 1e-12  # the largest value of a map that is 0 everywhere
COUNT_COLOUR, ATTENTION_COLOUR, GREY = "#1f6fb4", "#d9541e", "#777777"
MAP_COLOURS, DIFFERENCE_COLOURS = "viridis", "cividis"  # lighter is more, also in grey and for the colour-blind
LABEL = 9  # points of the smallest text
COUNT_SCALE = SymmetricalLogScale(None, linthresh=1, linscale=0.3)  # logarithmic, with room for 0


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure for pictures of a width and height in inches, and its axes [rows, columns], which are not drawn."""
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for place in axes.flat:
        place.axis("off")
    return figure, axes


def show_dots(axes, sample: Sample, title: str | None = None, boxes: bool = True) -> None:
    """The photograph with dots and exemplar boxes; its title is count and category unless another is given."""
    axes.imshow(sample.image)
    axes.scatter(*sample.points.T, s=14, c="#ff2d2d", edgecolors="white", linewidths=0.5)
    for x1, y1, x2, y2 in sample.boxes if boxes else ():
        axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="#00e5ff", linewidth=1.6))
    axes.set_title(title or f"{sample.count} {sample.category}", fontsize=LABEL, parse_math=False)  # "$": no formula
    axes.axis("off")


def colour_scale(values: np.ndarray, largest: float | None = None, signed: bool = False) -> ScalarMappable:
    """Colours of a map's values; arguments as of `show_map`."""
    largest = max(float(np.abs(values).max() if largest is None else largest), NOTHING)
    if signed:
        return ScalarMappable(Normalize(-largest, largest), DIFFERENCE_COLOURS)
    return ScalarMappable(PowerNorm(0.5, 0, largest), MAP_COLOURS)


def show_map(
    axes, image: Image.Image, values: np.ndarray, title: str = "", largest: float | None = None, signed: bool = False
):
    """A map over a grey photograph, stretched to its size.

    Args:
        values: [h, w]; cells are drawn as cells, without smoothing.
        largest: the value of the brightest colour; None for the map's largest.  Compared maps need the same.
        signed: a difference, from -largest to largest.

    Returns:
        The drawn map, for `show_scale`.  Colours go with the square root, so that a peak does not darken other cells.
    """
    colours = colour_scale(values, largest, signed)
    axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
    shown = axes.imshow(
        values, cmap=colours.cmap, norm=colours.norm, alpha=0.6, extent=(0, image.width, image.height, 0),
        interpolation="nearest",
    )  # fmt: skip
    axes.set_title(title, fontsize=LABEL, parse_math=False)
    axes.axis("off")
    return shown


def show_scale(shown, axes, label: str = "part of the map in a cell", extend: str = "neither") -> None:
    """A colour bar beside the axes; pointed where some values lie above ("max").  Maps of zeros get none."""
    if shown.norm.vmax <= NOTHING:
        return
    bar = shown.figure.colorbar(shown, ax=axes, label=label, extend=extend, fraction=0.03, pad=0.01, aspect=30)
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=LABEL)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))


def gallery(samples: Sequence[Sample], columns: int = 4) -> Figure:
    """Samples with dots and boxes, row by row."""
    figure, axes = grid(-(-len(samples) // columns), columns, 3.1, 2.4)
    for place, sample in zip(axes.flat, samples, strict=False):
        show_dots(place, sample)
    return figure


def sample_views(sample: Sample) -> Figure:
    """One sample three times: dots and boxes, density, 14x14 target."""
    figure, axes = grid(1, 3, 4, 3.2)
    density, image = sample.density, sample.image
    show_dots(axes[0, 0], sample)
    shown = show_map(axes[0, 1], image, density, f"density, sums to {density.sum(dtype=float):.2f}")
    show_scale(shown, axes[0, 1], "objects per pixel")
    title = "14x14 target heatmap, sums to 1" if sample.count else NO_TARGET
    show_scale(show_map(axes[0, 2], image, sample.target, title), axes[0, 2])
    return figure


def count_histogram(counts: dict[str, Sequence[int]]) -> Figure:
    """Images by their number of objects, for each split; both axes are logarithmic, below 1 linear."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    found = np.concatenate(list(counts.values()))
    edges = np.geomspace(max(found.min(), 1), found.max() + 1, 16).round()
    edges = np.unique([found.min(), *edges]) - 0.5  # whole counts, so no empty bins
    for i, (split, values) in enumerate(counts.items()):
        axes.hist(values, edges, histtype="step", linewidth=1.8, color=f"C{i}", label=f"{split} ({len(values)} images)")
        axes.axvline(float(np.median(values)), color=f"C{i}", linestyle=":", linewidth=1)
    axes.set(xlabel="objects in the image (dotted: median)", ylabel="images", yscale="log")
    axes.set(xscale=COUNT_SCALE, xlim=(edges[0], edges[-1]))
    plain_numbers(axes)
    axes.legend(frameon=False, fontsize=LABEL, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plain_numbers(axes) -> None:
    """On logarithmic axes: 5, 10, 20, 50 instead of powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        log, transform = axis.get_scale() == "log", axis.get_transform()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if log else SymmetricalLogLocator(transform, (1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def category_bars(samples: Sequence[Sample], most: int = 20) -> Figure:
    """The most frequent categories of some samples."""
    names, numbers = np.unique([sample.category for sample in samples], return_counts=True)
    order = np.argsort(numbers)[-most:]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.24 * len(order)), layout="constrained")
    axes.barh(np.arange(len(order)), numbers[order], color=COUNT_COLOUR)
    axes.set_yticks(np.arange(len(order)), names[order], parse_math=False)
    axes.set(xlabel="images")
    return figure


def predictions_against_truth(images: Sequence[ImageResult]) -> Figure:
    """Predicted counts against true ones, on axes logarithmic above 1; answers without a number at the bottom."""
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
    axes.set(xscale=COUNT_SCALE, yscale=COUNT_SCALE, xlabel="true count", ylabel="predicted count")
    plain_numbers(axes)
    return figure


def map_comparison(
    samples: Sequence[Sample], maps: dict[str, Look | np.ndarray], captions: Sequence[str] = ()
) -> Figure:
    """A row for each sample: photograph, target, and a column for each kind of map, all maps on one scale.

    Args:
        maps: title -> [B, 14, 14] in the samples' order, or a `Look` (`mean_map`), whose answers are named.
        captions: a title for each photograph, instead of count and category.
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
    """Attention [L, H, 14, 14] to an image by layer and head, each titled with its mass on the image.

    `layers` are the layers' numbers; `title` is the figure's, for example the answer (`Look.titles`).
    """
    figure, axes = grid(*maps.shape[:2], 2.2, 1.75)
    for (i, j), place in np.ndenumerate(axes):
        name = f"layer {layers[i]}, head {j}: {100 * maps[i, j].sum():.0f} %"
        shown = show_map(place, image, maps[i, j], name, float(maps.max()))
    show_scale(shown, axes, "attention on a cell")
    figure.suptitle(title, fontsize=LABEL, parse_math=False)
    return figure


def overhead_bars(rows: Sequence[dict]) -> Figure:
    """Overhead of each heatmap with its 95 % interval, and peak memory: rows of `time_losses`."""
    lost = [row["name"] for row in rows if row["out_of_memory"]]
    rows = [row for row in rows if not row["out_of_memory"]]
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.4), layout="constrained")
    names = [re.sub(", |_| (?=on )", "\n", row["name"]) for row in rows]
    kinds = {"count only": COUNT_COLOUR, "heatmap computed": GREY, "heatmap trained": ATTENTION_COLOUR}
    colours = [list(kinds.values())[(row["method"] != "none") + row["trained"]] for row in rows]
    low, middle, high = (np.array([100 * row[f"overhead_{x}"] for row in rows[1:]]) for x in ("low", "median", "high"))
    places = axes[0].bar(names[1:], middle, yerr=np.abs([middle - low, high - middle]), color=colours[1:], capsize=4)
    axes[0].bar_label(places, fmt="%.1f", fontsize=LABEL, padding=3)
    axes[0].margins(y=0.12)  # room for the labels
    axes[0].set(ylabel="% of a step", title="overhead: median, and its 95 % interval as a whisker")
    axes[1].bar(names, [(row["peak_memory"] or 0) / 1024 for row in rows], color=colours)
    axes[1].set(ylabel="GiB", title="; ".join(["peak memory", *(f"{name}: out of memory" for name in lost)]))
    plt.setp([*axes[0].get_xticklabels(), *axes[1].get_xticklabels()], fontsize=LABEL)
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in kinds.items()]
    axes[0].legend(handles=patches, frameon=False, fontsize=LABEL, loc="upper left")
    return figure


def overhead_against_every(rows: Sequence[dict]) -> Figure:
    """Overhead of each trained heatmap that is applied on each K-th step only: rows of `time_losses`.

    A dot is the method's default K; an overhead below 0 stands in the legend alone.
    """
    figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
    every = 2 ** np.arange(8)
    for row in rows:
        if not row["trained"] or row["out_of_memory"]:
            continue
        percent = 100 * row["overhead_median"]
        if percent <= 0:
            axes.plot([], [], label=f"{row['name']}: {percent:.1f} %, lost in the noise")
            continue
        (line,) = axes.plot(every, percent / every, label=row["name"])
        axes.plot(row["every"], percent / row["every"], "o", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="K: steps from one heatmap to the next", ylabel="% of a step")
    plain_numbers(axes)
    axes.set_xticks(every, labels=[str(k) for k in every])
    axes.legend(frameon=False, fontsize=LABEL)
    return figure


def loss_curves(rows: Sequence[dict], width: int = 20) -> Figure:
    """Count losses by step, each the mean of the last `width`, and their distances: rows of "name" and "losses"."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    means = {row["name"]: np.convolve(row["losses"], np.ones(width) / width, "valid") for row in rows}
    *_, (reference, last) = means.items()
    for name, mean in means.items():
        for place, values in zip(axes, (mean, mean - last), strict=True):
            place.plot(np.arange(width, width + len(mean)), values, label=name, linewidth=1.2)
    axes[0].set(xlabel="step", ylabel="count loss (nats per token)")
    axes[1].set(xlabel="step", ylabel=f"minus that of {reference}")
    axes[0].legend(frameon=False, fontsize=LABEL)
    return figure


def lazy_curves(runs: dict[str, list[dict]], overhead: float) -> Figure:
    """Alignment and error of runs that trained a heatmap on each K-th step, after equal steps and after equal time.

    Args:
        runs: K -> its validations, with "step", "kl" and "mae".
        overhead: of a step that trains the heatmap, 0.76 for 76 %; time is counted in steps without it.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
    for every, lines in runs.items():
        step, kl, mae = (np.array([line[key] for line in lines]) for key in ("step", "kl", "mae"))
        time = step * (1 + overhead / int(every))
        for place, x, y in zip(axes, (step, time, time), (kl, kl, mae), strict=True):
            place.plot(x, y, ".-", label=f"K = {every}")
    axes[0].set(xlabel="steps", ylabel="KL(P || A), nats", title="alignment after equal steps")
    for place, label, title in ((axes[1], "KL(P || A), nats", "alignment"), (axes[2], "MAE, objects", "error")):
        place.set(xlabel="time (steps of the count loss)", ylabel=label, title=f"{title} after equal time")
    axes[0].legend(frameon=False, fontsize=LABEL)
    return figure


def throughput_bars(rows: Sequence[dict]) -> Figure:
    """Images a second of each variant, and its multiple of the first: rows of `throughput`; whiskers span the turns."""
    rows = [row for row in rows if "rates" in row]  # others failed
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.5 * len(rows)), layout="constrained")
    names = [f"{row['name']} (batch {row['batch_size']})" for row in rows]
    speeds = np.array([row["images_per_second"] for row in rows])
    low, high = ([end(row["rates"]) for row in rows] for end in (min, max))
    colours = [GREY if "transformers" in name else ATTENTION_COLOUR for name in names]
    places = axes.barh(names, speeds, xerr=np.abs([speeds - low, high - speeds]), color=colours, capsize=3)
    axes.bar_label(places, [f" {speed:.0f}   {speed / speeds[0]:.1f}x" for speed in speeds], fontsize=LABEL)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set(xlabel="images a second, training")
    return figure
