"""What the viewer shows of one choice: numbers and sentences for the page, or the same as a figure.

Left out: choosing (`viewer`), and drawing in the page (`canvas`).
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..data import GRID, Picture, Sample
from ..model import Prediction
from ..model.looking import map_title
from .canvas import atlas_bytes, bars, panel
from .figures import LABEL, show_dots, show_map, show_scale
from .kept import Kept, measures
from .predictions import show_distribution


@dataclass(frozen=True)
class Choice:
    """One sample and all that is chosen about it; without a model there is no map.

    `layers`, `heads`, `answer`, `method` and `word` are those of `look`, `cells` the hidden ones of 196, row by row.
    """

    sample: Sample
    kept: Kept | None = None
    model: str = ""
    method: str = "attention"
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] | None = None
    word: str = "all"
    answer: str = "own"
    cells: tuple[int, ...] = ()

    @property
    def true_count(self) -> int | None:
        """None for a picture of one's own."""
        return None if isinstance(self.sample, Picture) else self.sample.count

    def maps(self) -> dict[str, tuple[str, np.ndarray]]:
        """Name -> title and [14, 14]: the target, the map, and their difference, as far as they exist."""
        found = {} if self.true_count is None else {"target": ("target", self.sample.target)}
        if self.kept is None:
            return found
        heatmap, text = self.kept.map(self.sample, self.method, self.layers, self.heads, self.answer, self.word)
        found["map"] = f"{self.method}, {map_title(text, self.answer)}", heatmap
        if self.true_count:
            found["difference"] = "map - target", heatmap - self.sample.target
        return found

    def predictions(self) -> dict[str, Prediction]:
        """What the model says of all cells and, if some are hidden, of the rest; nothing before it was computed."""
        if self.kept is None or not self.kept.has_prediction(self.sample):
            return {}
        found = {"all cells": self.kept.prediction(self.sample)}
        if self.cells:
            found["the rest"] = self.kept.prediction(self.sample, self.cells)
        return found

    def facts(self) -> list[str]:
        """Sentences about the sample, the answers, the map and what is hidden."""
        truth, told, maps = self.true_count, self.predictions(), self.maps()
        lines = [f"{self.sample.name}: {'' if truth is None else f'{truth} '}{self.sample.category}"]
        for name, said in told.items():
            first, last = said.interval()
            who = self.model if name == "all cells" else f"{len(self.cells)} of {GRID * GRID} cells hidden"
            lines.append(
                f"{who}: {said.answer!r:.40}, most probable {said.mode} ({said.distribution[said.mode]:.0%}), "
                f"mean {said.mean:.1f}, 90 % between {first} and {last}"
            )
        if self.cells and truth is not None:
            change = told["the rest"].mean - told["all cells"].mean
            left = told["the rest"].sample.count
            lines.append(f"the mean moves by {change:+.1f}, the dots by {left - truth:+d}: {left} of {truth} are left")
        if "difference" in maps:
            found = measures(maps["map"][1][None], self.sample.target[None])
            lines.append(f"KL {found['kl'][0]:.2f} nats, mass on objects {found['mass_on_objects'][0]:.0%}")
        return lines

    def marks(self) -> dict[str, int]:
        """Numbers to mark in the distribution."""
        if self.true_count is None:
            return {}
        rest = self.predictions().get("the rest")
        return {"true": self.true_count} | ({} if rest is None else {"left": rest.sample.count})

    def scene(self) -> dict:
        """For the page."""
        maps = self.maps()
        panels = [{**panel("photograph"), "title": self.sample.category}]
        for name, (title, values) in maps.items():
            panels.append({**panel(name, values, scale(maps, name), name == "difference"), "title": title})
        told = {name: said.distribution for name, said in self.predictions().items()}
        marks = self.marks()
        return {
            "panels": panels,
            "dots": (self.sample.points / self.sample.size[::-1]).round(4).tolist(),
            "facts": self.facts(),
            "bars": {**bars(told, list(marks.values())), "marks": marks} if told else None,
            "cells": list(self.cells),
            "can_hide": self.kept is not None,
        }

    def atlas(self) -> tuple[dict | None, bytes]:
        """All layers and heads of an attention map for the page: about them, and [L, H, 14, 14] as bytes."""
        if self.kept is None or self.method != "attention":
            return None, b""
        maps, _ = self.kept.attention(self.sample, self.answer, self.word)
        chosen = [[layer, head] for layer in self.layers for head in self.heads or self.kept.heads]
        masses = maps.sum(axis=(2, 3)).round(3).tolist()
        about = {"layers": list(self.kept.layers), "heads": len(self.kept.heads), "masses": masses, "chosen": chosen}
        return about, atlas_bytes(maps)

    def figure(self) -> Figure:
        """The same view without a page: photograph, maps on one scale, difference, distribution."""
        if self.kept is not None:
            self.kept.prediction(self.sample)
        maps, told, image = self.maps(), self.predictions(), self.sample.image
        across = min(3, 1 + len(maps))
        down = -(-(1 + len(maps) + bool(told)) // across)
        figure, axes = plt.subplots(down, across, figsize=(3.6 * across, 2.6 * down + 0.6), layout="constrained")
        photograph, *others = np.ravel(axes)
        for place in others:
            place.axis("off")
        show_dots(photograph, told["the rest"].sample if self.cells else self.sample, boxes=False)
        for place, (name, (title, values)) in zip(others, maps.items(), strict=False):
            shown = show_map(place, image, values, title, scale(maps, name), signed=name == "difference")
            show_scale(shown, place, "")
        if told:
            others[len(maps)].axis("on")
            show_distribution(others[len(maps)], list(told.values())[-1], self.marks().get("left", self.true_count))
        figure.suptitle("\n".join(self.facts()), fontsize=LABEL, parse_math=False)
        return figure


def scale(maps: dict[str, tuple[str, np.ndarray]], name: str) -> float:
    """The value of the brightest colour: target and map share theirs."""
    alike = [name] if name == "difference" else [other for other in maps if other != "difference"]
    return max(float(np.abs(maps[other][1]).max()) for other in alike)
