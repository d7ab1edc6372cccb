"""What a model says of samples, and what the viewer shows of one choice: for the page, or the same as a figure.

Left out: choosing (`viewer`), drawing in the page (`canvas`), and how anything is computed (`model`, `evaluation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from matplotlib.figure import Figure

from ..data import GRID, Picture, Sample
from ..evaluation import alignment
from ..model import CountingModel, Look, Prediction, count_without, default_layers, look, mean_map
from ..model.heatmaps import METHODS, Attention
from ..model.prompt import parse_count
from .canvas import bars, colour_url, overlay
from .figures import LABEL, NO_TARGET, colour_scale
from .predictions import view_figure

Cells = tuple[int, ...]
"""Some of the 196 cells of a map, numbered row by row."""


class Kept:
    """A model's maps and predictions, each computed when it is first asked for.

    Attributes:
        layers, heads: all numbers of this model's.
        default_layers: those whose attention is averaged unless others are chosen.
        predictions: of a sample and its hidden cells.
    """

    def __init__(self, model: CountingModel, samples: Sequence[Sample]):
        self.model, self.samples = model, samples
        text = model.network.config.text_config
        self.layers, self.heads = tuple(range(text.num_hidden_layers)), tuple(range(text.num_attention_heads))
        self.default_layers = default_layers(len(self.layers))
        self.predictions: dict[tuple[Sample, Cells], Prediction] = {}
        self._looks: dict[tuple, Look] = {}

    def look(self, samples, method="attention", answer="own", word="all", layers=None, heads=None) -> list[Look]:
        """What `look` sees of each sample: of attention the mass [1, L, H, 14, 14] of all layers and heads."""
        layers = self.layers if method == "attention" else layers
        options = method, answer, word, layers, heads
        new = [sample for sample in samples if (sample, *options) not in self._looks]
        if new:
            seen = look(self.model, new, layers, answer=answer, method=method, heads=heads, word=word)
            self._looks |= {(sample, *options): seen[[i]] for i, sample in enumerate(new)}
        return [self._looks[sample, *options] for sample in samples]

    @cached_property
    def rows(self) -> list[dict]:
        """Of each sample "count", "predicted" (None: no number), and "kl" of its attention (NaN: nothing to count)."""
        seen = self.look(self.samples)
        maps = torch.cat([mean_map(one, list(self.default_layers)).maps for one in seen])
        kl = alignment(maps, torch.tensor(np.stack([sample.target for sample in self.samples])))["kl"]
        return [
            {"count": sample.count, "predicted": parse_count(one.answers[0]), "kl": value}
            for sample, one, value in zip(self.samples, seen, kl.tolist(), strict=True)
        ]

    def prediction(self, sample: Sample, cells: Cells = ()) -> Prediction:
        """What the model says of a sample with some cells hidden."""
        if (sample, cells) not in self.predictions:
            hidden = np.isin(np.arange(GRID * GRID), cells).reshape(GRID, GRID)
            self.predictions[sample, cells] = count_without(self.model, sample, hidden)
        return self.predictions[sample, cells]


@dataclass(frozen=True)
class Choice:
    """One sample and all that is chosen about it; without a model there is no map.

    `layers`, `heads`, `answer`, `method` and `word` are those of `look`, no heads: all; `cells` are hidden.
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
        """None for a picture of one's own."""
        return None if isinstance(self.sample, Picture) else self.sample.count

    @property
    def has_heads(self) -> bool:
        """Whether layers and heads can be chosen."""
        return issubclass(METHODS[self.method], Attention)

    def look(self) -> Look:
        """The heatmap [1, 14, 14] that sums to 1."""
        options = (self.method, self.answer, self.word)
        if self.method == "attention":
            (seen,) = self.kept.look([self.sample], *options)
            maps = seen.maps[:, :, list(self.heads or self.kept.heads)]
            return mean_map(replace(seen, maps=maps), list(self.layers))
        chosen = (self.layers, self.heads or None) if self.has_heads else ()
        return self.kept.look([self.sample], *options, *chosen)[0]

    def maps(self) -> dict[str, dict]:
        """Target, map and difference, as far as they exist: "title", "values", "largest", "signed" of `show_map`."""
        found: dict[str, dict] = {}
        if self.true_count is not None:
            title = "target" if self.true_count else NO_TARGET
            found["target"] = {"title": title, "values": self.sample.target}
        if self.kept is not None:
            seen = self.look()
            found["map"] = {"title": f"{self.method}, {seen.titles[0]}", "values": seen.maps[0].numpy()}
        largest = max(one["values"].max() for one in found.values())
        found = {name: {**one, "largest": largest} for name, one in found.items()}
        if self.true_count and "map" in found:
            difference = found["map"]["values"] - self.sample.target
            found["difference"] = {"title": "map - target", "values": difference, "signed": True}
        return found

    def predictions(self) -> dict[str, Prediction]:
        """What the model says of all cells and, if some are hidden, of the rest; nothing before it was computed."""
        if self.kept is None or (self.sample, ()) not in self.kept.predictions:
            return {}
        parts = {"all cells": ()} | ({"the rest": self.cells} if self.cells else {})
        return {name: self.kept.prediction(self.sample, cells) for name, cells in parts.items()}

    def facts(self) -> list[str]:
        """Sentences about the sample, the answers, the map and what is hidden."""
        truth, predictions, maps = self.true_count, self.predictions(), self.maps()
        lines = [f"{self.sample.name}: {'' if truth is None else f'{truth} '}{self.sample.category}"]
        for name, said in predictions.items():
            first, last = said.interval()
            who = self.model if name == "all cells" else f"{len(self.cells)} of {GRID * GRID} cells hidden"
            lines.append(
                f"{who}: {said.answer!r:.40}, most probable {said.mode} ({said.distribution[said.mode]:.0%}), "
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
        """For the page."""
        predictions = self.predictions()
        counts = [] if self.true_count is None else [prediction.sample.count for prediction in predictions.values()]
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
        """All layers (down) and heads (across) of an attention map in one picture, a pixel between two of them."""
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
        """The same view without a page; hidden cells are seen in the photograph."""
        if self.kept is not None:
            self.kept.prediction(self.sample)
        *_, last = None, *self.predictions().values()
        sample = self.sample if last is None else last.sample
        true, title = (None, sample.category) if self.true_count is None else (sample.count, "")
        figure = view_figure(sample, [*self.maps().values()], last, true, title)
        figure.suptitle("\n".join(self.facts()), fontsize=LABEL, parse_math=False)
        return figure
