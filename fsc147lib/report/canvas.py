"""The viewer's pictures in the page: a widget that draws what it is sent and tells what was clicked or dragged over.

The page draws (`canvas.js`): a change costs the kernel a few kilobytes of numbers, and none at all where only the
opacity or the choice of panels changes.

Left out: what is shown, and what follows from a click (`viewer`).
"""

import base64
import io
from pathlib import Path

import anywidget
import matplotlib
import numpy as np
import traitlets
from matplotlib.colors import to_hex
from PIL import Image

from ..data import Sample
from .figures import ATTENTION_COLOUR, COUNT_COLOUR, DIFFERENCE_COLOURS, MAP_COLOURS

THUMBNAIL = 96, 72  # pixels of width and height at the most


class Canvas(anywidget.AnyWidget):
    """Draws `scene`, `photo`, `strip` and `atlas` whenever `version` changes; sends messages with a `kind`.

    Messages: {"kind": "open", "place"}, {"kind": "page", "by"}, {"kind": "hide", "cells"}, {"kind": "head", "layer",
    "head"}, {"kind": "picture", "name"} with the file's bytes as buffer.
    """

    _esm = Path(__file__).with_name("canvas.js")
    _css = Path(__file__).with_name("canvas.css")
    colours = traitlets.Dict(
        {
            name: [to_hex(colour) for colour in matplotlib.colormaps[name](np.arange(256))]
            for name in (MAP_COLOURS, DIFFERENCE_COLOURS)
        }
        | {"count": COUNT_COLOUR, "new": ATTENTION_COLOUR}
    ).tag(sync=True)
    strip = traitlets.Dict().tag(sync=True)  # "thumbs": [{"place", "src", "text"}], "text", "more": [before, after]
    photo = traitlets.Bytes().tag(sync=True)  # JPEG
    atlas = traitlets.Bytes().tag(sync=True)  # [L, H, 14, 14] uint8
    scene = traitlets.Dict().tag(sync=True)  # all else, see `Viewer.redraw`
    version = traitlets.Int(0).tag(sync=True)

    def update(self, **changed) -> None:
        """Send what changed, and have it drawn."""
        with self.hold_sync():
            for name, value in changed.items():
                setattr(self, name, value)
            self.version += 1


def jpeg(image: Image.Image, quality: int = 88) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return file.getvalue()


def thumbnail(sample: Sample) -> str:
    """A small picture as a data URL."""
    small = sample.image
    small.thumbnail(THUMBNAIL, reducing_gap=2)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(small, 75)).decode()


def panel(name: str, values: np.ndarray | None = None, largest: float = 0, signed: bool = False) -> dict:
    """One picture of the row: the photograph, or a map over it.

    Args:
        values: [14, 14]; None for the photograph alone.
        largest: the value of the brightest colour.
        signed: colours run from -largest to largest, and not from 0 with the square root.
    """
    if values is None:
        return {"name": name}
    colours = DIFFERENCE_COLOURS if signed else MAP_COLOURS
    numbers = [float(f"{value:.4g}") for value in values.ravel()]
    return {"name": name, "values": numbers, "largest": max(largest, 1e-12), "signed": signed, "colours": colours}


def atlas_bytes(maps: np.ndarray) -> bytes:
    """[L, H, 14, 14] on one scale, the square root of the largest, as bytes."""
    return np.uint8(np.round(255 * np.sqrt(maps / max(float(maps.max()), 1e-12)))).tobytes()


def bars(distributions: dict[str, np.ndarray], marks: list[int], most: int = 60) -> dict:
    """Distributions over numbers as a few bars.

    Args:
        distributions: name -> [numbers] probabilities.
        marks: numbers that must be in the picture.

    Returns:
        "first" number, "width" in numbers of each bar, and "heights" of each name.
    """
    ends = [int(end) for d in distributions.values() for end in np.searchsorted(d.cumsum(), (0.003, 0.997))]
    first, last = max(0, min(*ends, *marks, *ends) - 1), max(*ends, *marks) + 1
    width = -(-(last + 1 - first) // most)
    count = -(-(last + 1 - first) // width)
    heights = {}
    for name, d in distributions.items():
        wide = np.zeros(count * width)
        part = d[first : first + len(wide)]
        wide[: len(part)] = part
        heights[name] = [round(float(p), 5) for p in wide.reshape(count, width).sum(axis=1)]
    return {"first": first, "width": width, "heights": heights}
