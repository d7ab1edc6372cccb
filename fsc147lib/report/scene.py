"""The viewer's numbers: a model's maps and predictions, and the scene of one choice for the page or as a figure."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image

from ..data import GRID, Picture, Sample
from ..evaluation import alignment
from ..model import CountingModel, Look, Prediction, count_without, default_layers, look, mean_map
from ..model.heatmaps import METHODS, Attention
from ..model.prompt import parse_count
from .figures import LABEL, NO_TARGET, colour_scale, view_figure

Cells = tuple[int, ...]
"""Numbers of cells of a 14x14 map, counted row by row from 0."""


class Kept:
    """A model's maps and predictions of some samples, each computed once, when it is first asked for."""

    def __init__(self, model: CountingModel, samples: Sequence[Sample]):
        self.model, self.samples = model, samples
        text = model.network.config.text_config
        self.layers, self.heads = tuple(range(text.num_hidden_layers)), tuple(range(text.num_attention_heads))
        self.default_layers = default_layers(len(self.layers))
        self.predictions: dict[tuple[Sample, Cells], Prediction] = {}
        self.looks: dict[tuple, Look] = {}

    def look(self, samples, method="attention", answer="own", word="all", layers=None, heads=None) -> list[Look]:
        """`model.look` for each sample; for the method "attention", maps [1, L, H, 14, 14] of all layers and heads."""
        layers = self.layers if method == "attention" else layers
        options = method, answer, word, layers, heads
        new = [sample for sample in samples if (sample, *options) not in self.looks]
        if new:
            seen = look(self.model, new, layers, answer=answer, method=method, heads=heads, word=word)
            self.looks |= {(sample, *options): seen[[i]] for i, sample in enumerate(new)}
        return [self.looks[sample, *options] for sample in samples]

    @cached_property
    def rows(self) -> list[dict]:
        """Each sample's true "count", "predicted" count (None: no number), and "kl" of its map (NaN: no objects)."""
        seen = self.look(self.samples)
        maps = torch.cat([mean_map(one, list(self.default_layers)).maps for one in seen])
        kl = alignment(maps, torch.tensor(np.stack([sample.target for sample in self.samples])))["kl"]
        return [
            {"count": sample.count, "predicted": parse_count(one.answers[0]), "kl": value}
            for sample, one, value in zip(self.samples, seen, kl.tolist(), strict=True)
        ]

    def prediction(self, sample: Sample, cells: Cells = ()) -> Prediction:
        """The model's prediction of a sample with some cells hidden."""
        if (sample, cells) not in self.predictions:
            hidden = np.isin(np.arange(GRID * GRID), cells).reshape(GRID, GRID)
            self.predictions[sample, cells] = count_without(self.model, sample, hidden)
        return self.predictions[sample, cells]


@dataclass(frozen=True)
class Choice:
    """A sample and the options of its view: those of `look`, with () for all heads, and the hidden `cells`.

    Without `kept` there is no model, and so no map.
    """

    sample: Sample
    kept: Kept | None = None
    model: str = ""
    method: str = "attention"
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    word: str = "all"
    answer: str = "own"
    cells: Cells = ()

    @property
    def true_count(self) -> int | None:
        """True count; None for a picture that the user brought, which has no dots."""
        return None if isinstance(self.sample, Picture) else self.sample.count

    @property
    def has_heads(self) -> bool:
        """Whether the method reads attention, so that layers and heads can be chosen."""
        return issubclass(METHODS[self.method], Attention)

    def look(self) -> Look:
        """The heatmap [1, 14, 14] that sums to 1."""
        options = (self.method, self.answer, self.word)
        if self.method == "attention":
            (seen,) = self.kept.look([self.sample], *options)
            maps = seen.maps[:, :, list(self.heads or self.kept.heads)]
            return mean_map(replace(seen, maps=maps), list(self.layers))
        if self.has_heads:
            return self.kept.look([self.sample], *options, self.layers, self.heads or None)[0]
        return self.kept.look([self.sample], *options)[0]

    def maps(self) -> dict[str, dict]:
        """Target, map and their difference, if they exist: name -> arguments of `show_map`, values [14, 14]."""
        found: dict[str, dict] = {}
        if self.true_count is not None:
            found["target"] = {"title": "target" if self.true_count else NO_TARGET, "values": self.sample.target}
        if self.kept is not None:
            seen = self.look()
            found["map"] = {"title": f"{self.method}, {seen.titles[0]}", "values": seen.maps[0].numpy()}
        largest = max(one["values"].max() for one in found.values())
        for one in found.values():
            one["largest"] = largest
        if self.true_count and "map" in found:
            difference = found["map"]["values"] - self.sample.target
            found["difference"] = {"title": "map - target", "values": difference, "signed": True}
        return found

    def predictions(self) -> dict[str, Prediction]:
        """Predictions of the whole picture and, with hidden cells, of the rest; {} if none is computed yet."""
        if self.kept is None or (self.sample, ()) not in self.kept.predictions:
            return {}
        found = {"all cells": self.kept.prediction(self.sample)}
        if self.cells:
            found["the rest"] = self.kept.prediction(self.sample, self.cells)
        return found

    def facts(self) -> list[str]:
        """Lines of text about the sample, the answers, the hidden cells and the map."""
        truth, predictions, maps = self.true_count, self.predictions(), self.maps()
        lines = [f"{self.sample.name}: {'' if truth is None else f'{truth} '}{self.sample.category}"]
        for name, said in predictions.items():
            first, last = said.interval()
            subject = self.model if name == "all cells" else f"{len(self.cells)} of {GRID * GRID} cells hidden"
            lines.append(
                f"{subject}: {said.answer!r:.40}, most probable {said.mode} ({said.distribution[said.mode]:.0%}), "
                f"mean {said.mean:.1f}, 90 % between {first} and {last}"
            )
        if self.cells and truth is not None:
            whole, rest = predictions.values()
            change, left = rest.mean - whole.mean, rest.sample.count
            lines.append(f"the mean moves by {change:+.1f}, the dots by {left - truth:+d}: {left} of {truth} are left")
        if "difference" in maps:
            found = alignment(*(torch.tensor(maps[name]["values"])[None] for name in ("map", "target")))
            lines.append(f"KL {found['kl'][0]:.2f} nats, mass on objects {found['mass_on_objects'][0]:.0%}")
        return lines

    def scene(self) -> dict:
        """All that the page draws of this choice, as JSON; canvas.js reads it."""
        predictions = self.predictions()
        counts = [] if self.true_count is None else [said.sample.count for said in predictions.values()]
        panels = {name: overlay(**one) for name, one in self.maps().items()}
        return {
            "panels": {"photograph": {"title": self.sample.category}, **panels},
            "aspect": self.sample.size[1] / self.sample.size[0],
            "dots": (self.sample.points / self.sample.size[::-1]).round(4).tolist(),
            "facts": self.facts(),
            "bars": bars(predictions, dict(zip(("true", "left"), counts, strict=False))) if predictions else None,
            "atlas": self.atlas() if self.kept is not None and self.method == "attention" else None,
            "cells": list(self.cells),
            "can_hide": self.kept is not None,
        }

    def atlas(self) -> dict:
        """One picture of the attention maps of all layers (down) and heads (across), a pixel apart."""
        (seen,) = self.kept.look([self.sample], self.method, self.answer, self.word)
        maps = seen.maps[0].numpy()  # [L, H, 14, 14]
        spaced = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)  # [L, H, 15, 15]
        tiled = spaced.swapaxes(1, 2).reshape(-1, spaced.shape[1] * spaced.shape[3])  # [L * 15, H * 15]
        return {
            "src": colour_url(colour_scale(maps), tiled),
            "masses": maps.sum(axis=(2, 3)).round(3).tolist(),
            "chosen": [[layer, head] for layer in self.layers for head in self.heads or self.kept.heads],
        }

    def figure(self) -> Figure:
        """The view as a figure; hidden cells are grey in the photograph."""
        if self.kept is not None:
            self.kept.prediction(self.sample)
        *_, last = None, *self.predictions().values()
        sample = self.sample if last is None else last.sample
        title = self.sample.category if self.true_count is None else ""
        true = None if self.true_count is None else sample.count
        figure = view_figure(sample, [*self.maps().values()], last, true, title)
        figure.suptitle("\n".join(self.facts()), fontsize=LABEL, parse_math=False)
        return figure


# --- Pictures and numbers as the page takes them


def data_url(image: Image.Image, format: str = "png", **options) -> str:
    """A data URL of a picture."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format};base64,{base64.b64encode(file.getvalue()).decode()}"


@lru_cache(512)
def photo_url(sample: Sample, largest: tuple[int, int] | None = None) -> str:
    """A data URL of a sample's photograph, shrunk to a largest width and height in pixels if given."""
    image = sample.image
    if largest:
        image.thumbnail(largest, reducing_gap=2)
    return data_url(image, "jpeg", quality=85)


def colour_url(colours: ScalarMappable, values: np.ndarray) -> str:
    """A data URL of values [h, w] as coloured pixels; NaN is transparent."""
    return data_url(Image.fromarray(colours.to_rgba(values, bytes=True)))


def overlay(title: str, values: np.ndarray, largest: float | None = None, signed: bool = False) -> dict:
    """A map and its colour bar for the page; takes the arguments of `show_map`."""
    colours = colour_scale(values, largest, signed)
    ticks, ramp = colours.norm.inverse(np.array([0, 0.5, 1])), colours.norm.inverse(np.linspace(0, 1, 256))
    return {
        "title": title, "values": values.ravel().tolist(), "src": colour_url(colours, values),
        "ticks": ticks.tolist(), "bar": colour_url(colours, ramp[None]),
    }  # fmt: skip


def bars(predictions: dict[str, Prediction], marks: dict[str, int]) -> dict:
    """Histograms of distributions over counts, with the same bars, at most 60, that cover each of the `marks` (counts).

    Returns the "first" count, the "width" of a bar in counts, "heights" (name -> probability of each bar), "marks".
    """
    shown = [*marks.values(), *(end for prediction in predictions.values() for end in prediction.interval(0.994))]
    first, last = max(0, min(shown) - 1), max(shown) + 1
    width = -(-(last + 1 - first) // 60)
    edges = np.arange(first, last + width + 1, width) - 0.5
    heights = {
        name: np.histogram(np.arange(len(one.distribution)), edges, weights=one.distribution)[0].round(5).tolist()
        for name, one in predictions.items()
    }
    return {"first": first, "width": width, "heights": heights, "marks": marks}
