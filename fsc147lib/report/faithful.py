"""Figures of occlusion and of the faithfulness of maps."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..data import Sample
from ..evaluation.faithfulness import Faithfulness
from ..model import Occlusion
from .figures import ATTENTION_COLOUR, GREY, LABEL, show_dots, show_map, show_scale

Models = dict[str, dict[str, Faithfulness]]
"""Name of a model -> what `measure_maps` returned for it."""

BESIDE = {"frameon": False, "fontsize": LABEL, "loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend's place


def occlusion_figure(samples: Sequence[Sample], found: dict[str, Occlusion], shown: int = 0) -> Figure:
    """For each model, the fall of the expected count when a window is hidden.

    Above, the falls as a map over sample number `shown`; below, the falls of all windows of all samples against the
    number of objects in the window.

    Args:
        found: name of a model -> what `occlude` returned for the samples.
    """
    figure, axes = plt.subplots(2, 1 + len(found), figsize=(3.8 * (1 + len(found)), 6.4), layout="constrained")
    show_dots(axes[0, 0], samples[shown], boxes=False)
    axes[1, 0].axis("off")
    limit = max(float(np.nanmax(np.abs(one.count[shown]))) for one in found.values())
    for (upper, lower), (name, one) in zip(axes[:, 1:].T, found.items(), strict=True):
        falls = np.einsum("w,wrc->rc", one.count[shown], one.windows) / one.windows.sum(axis=0)  # [14, 14]
        title = f"{name}: said {one.answers[shown]!r:.30}"
        drawn = show_map(upper, samples[shown].image, falls, title, limit, signed=True)
        show_scale(drawn, upper, "fall of the expected count")
        objects = np.unique(one.objects)
        means = [np.nanmean(one.count[one.objects == number]) for number in objects]
        lower.plot(objects, objects, color="black", linewidth=1, label="one off for each object hidden")
        lower.scatter(one.objects, one.count, s=8, alpha=0.35, color=GREY)
        lower.plot(objects, means, "o-", color=ATTENTION_COLOUR, label="mean fall")
        lower.set(xlabel="objects under the window", ylabel="fall of the expected count", title=name)
        lower.xaxis.get_major_locator().set_params(integer=True)
        lower.legend(frameon=False, fontsize=LABEL)
    return figure


def curves_figure(models: Models) -> Figure:
    """Mean log-probability of the answer against the share of tokens hidden (left) and shown (right).

    A row for each model, a curve for each kind of map, whose order decides which tokens come first.
    """
    size = (11, 3.1 * len(models))
    figure, axes = plt.subplots(len(models), 2, figsize=size, squeeze=False, layout="constrained", sharey=True)
    for row, (model, found) in zip(axes, models.items(), strict=True):
        for i, title in enumerate(("hidden (deletion)", "shown (insertion)")):
            row[i].set(xlabel=f"tokens {title}, %", ylabel="log p(answer), nats", title=model)
            for name, one in found.items():
                if one.curves is not None:
                    curve = one.curves[:, i].mean(axis=0)
                    style = "k--" if name == "random order" else "-"
                    row[i].plot(np.linspace(0, 100, len(curve)), curve, style, label=name)
    axes[0, 1].legend(**BESIDE)
    return figure


def redrawn_figure(models: Models) -> Figure:
    """Mean rank correlation of each kind of map with the trained model's map, against the layers that are re-drawn."""
    size = (5.2 * len(models), 3)
    figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for place, (model, found) in zip(axes[0], models.items(), strict=True):
        for name, one in found.items():
            if one.similarity:
                values = [1.0, *(similarity.mean() for similarity in one.similarity.values())]
                place.plot(["none", *one.similarity], values, "o-", label=name)
        place.axhline(0, color="black", linewidth=0.8)
        place.set(xlabel="re-drawn up to", ylabel="rank correlation with before", title=model)
    place.legend(**BESIDE)
    return figure
