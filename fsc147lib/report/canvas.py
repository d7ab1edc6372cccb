"""The viewer's widget in the page, and the numbers and small pictures that it is sent.

The page draws (`canvas.js`): a change costs the kernel a few kilobytes, and nothing at all where only the opacity or
the choice of panels changes.

Left out: what is shown, and what follows from a click (`viewer`).
"""

import base64
import io
from functools import lru_cache
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from matplotlib.cm import ScalarMappable
from PIL import Image

from ..data import Sample
from ..model import Prediction
from .figures import colour_scale


class Canvas(anywidget.AnyWidget):
    """Draws `scene`, with `photo` and `strip`, whenever it changes; sends messages with a `kind`.

    Messages: {"kind": "open", "place"}, {"kind": "page", "by"}, {"kind": "hide", "cells"}, {"kind": "head", "layer",
    "head"}, {"kind": "picture", "name"} with the file's bytes as buffer.
    """

    _esm = Path(__file__).with_name("canvas.js")
    _css = Path(__file__).with_name("canvas.css")
    strip = traitlets.Dict().tag(sync=True)  # "thumbs": [{"place", "src", "text"}], "text", "more": [before, after]
    photo = traitlets.Unicode().tag(sync=True)  # data URL, as all pictures
    scene = traitlets.Dict().tag(sync=True)  # all else, see `Viewer.redraw`; its "version" grows


def data_url(image: Image.Image, format: str = "png", **options) -> str:
    """A picture as the page reads it."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format};base64,{base64.b64encode(file.getvalue()).decode()}"


@lru_cache(512)
def photo_url(sample: Sample, largest: tuple[int, int] | None = None) -> str:
    """A sample's picture, shrunk to this width and height at the most."""
    image = sample.image
    if largest:
        image.thumbnail(largest, reducing_gap=2)
    return data_url(image, "jpeg", quality=85)


def colour_url(colours: ScalarMappable, values: np.ndarray) -> str:
    """Numbers [h, w] in the colours of `colour_scale`, a pixel each; NaN is transparent."""
    return data_url(Image.fromarray(colours.to_rgba(values, bytes=True)))


def overlay(title: str, values: np.ndarray, largest: float | None = None, signed: bool = False) -> dict:
    """A map [14, 14] and its colour bar, for the page; arguments as of `show_map`."""
    colours = colour_scale(values, largest, signed)
    ticks, ramp = colours.norm.inverse(np.array([0, 0.5, 1])), colours.norm.inverse(np.linspace(0, 1, 256))
    return {
        "title": title, "values": values.ravel().tolist(), "src": colour_url(colours, values),
        "ticks": ticks.tolist(), "bar": colour_url(colours, ramp[None]),
    }  # fmt: skip


def bars(predictions: dict[str, Prediction], marks: dict[str, int], most: int = 60) -> dict:
    """Distributions over numbers as a few bars: "first" number, "width" in numbers, "heights" of each, and "marks".

    `marks` are names of numbers that must be in the picture.
    """
    shown = [*marks.values()]
    for prediction in predictions.values():
        shown += prediction.interval(0.994)
    first, last = max(0, min(shown) - 1), max(shown) + 1
    width = -(-(last + 1 - first) // most)
    edges = np.arange(first, last + width + 1, width) - 0.5
    heights = {
        name: np.histogram(np.arange(len(one.distribution)), edges, weights=one.distribution)[0].round(5).tolist()
        for name, one in predictions.items()
    }
    return {"first": first, "width": width, "heights": heights, "marks": marks}
