"""Draw an object of a composed category, a look and a shape: "blue stars", "striped bricks".

The pairs of validation and test never occur in training, while each of their words occurs there in other pairs.
A new colour, pattern or shape is an entry of its table.
"""

import math

import numpy as np
from PIL import Image, ImageDraw


def _circle(radius: float, x: float = 0.0, y: float = 0.0, corners: int = 36) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius * np.cos(t), y + radius * np.sin(t)], axis=1)


def _centred(points: np.ndarray) -> np.ndarray:
    """The outline within the unit circle, around the middle of its box."""
    points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    return points / np.hypot(*points.T).max()


_T = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_HEART = -13 * np.cos(_T) + 5 * np.cos(2 * _T) + 2 * np.cos(3 * _T) + np.cos(4 * _T)
_ARROW = np.array([[-1, 0.36], [-0.05, 0.36], [-0.05, 0.85], [1, 0]])  # its lower half

COLOURS = {  # RGB, 0..255
    "red": (214, 40, 46), "orange": (246, 132, 30), "yellow": (248, 218, 56),
    "green": (46, 158, 66), "blue": (42, 104, 222), "purple": (146, 62, 190),
}  # fmt: skip
PATTERNS = {  # white marks on any of the colours, over the whole square -1..1
    "striped": [np.array([[x, -1], [x + 0.26, -1], [x + 0.26, 1], [x, 1]]) for x in (-0.88, -0.38, 0.12, 0.62)],
    "dotted": [
        _circle(0.17, x + 0.29 * (i % 2), y, 14)
        for i, y in enumerate(np.arange(-1.0, 1.1, 0.5))
        for x in np.arange(-1.16, 1.2, 0.58)
        if math.hypot(x + 0.29 * (i % 2), y) < 1.1
    ],
}
OUTLINES = {  # [N, 2] each
    "stars": _circle(1, corners=10) * np.where(np.arange(10) % 2 == 0, 1, 0.45)[:, None],
    "hearts": np.stack([16 * np.sin(_T) ** 3, _HEART], axis=1),
    "leaves": np.stack([-np.cos(_T), 0.5 * np.sign(np.sin(_T)) * np.abs(np.sin(_T)) ** 1.5], axis=1),
    "bricks": np.array([[-1, -0.55], [1, -0.55], [1, 0.55], [-1, 0.55]]),
    "buttons": _circle(1),
    "rings": _circle(1),
    "drops": np.stack([np.cos(_T), 0.9 * np.sin(_T) * np.sin(_T / 2) ** 2], axis=1),
    "arrows": np.concatenate([_ARROW, _ARROW[-2::-1] * [1, -1]]),
}
HOLES = {"rings": _circle(0.46)}
MARKS = {  # dark ones that belong to a shape, whatever its look
    "buttons": [_circle(0.15, x, y) for x in (-0.26, 0.26) for y in (-0.26, 0.26)],
    "leaves": [np.array([[-0.95, -0.05], [0.7, 0], [-0.95, 0.05]])],
}
LOOKS, SHAPES = (*COLOURS, *PATTERNS), tuple(OUTLINES)
HELD_OUT = {"val": {(look, SHAPES[i % len(SHAPES)]) for i, look in enumerate(LOOKS)}}
HELD_OUT["test"] = {(look, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, look in enumerate(LOOKS)} - HELD_OUT["val"]
TRAINED = {(look, shape) for look in LOOKS for shape in SHAPES} - HELD_OUT["val"] - HELD_OUT["test"]
SHADE = Image.linear_gradient("L").point(lambda value: value * 0.28)  # objects are a little darker below
FINENESS = 3  # an object is drawn this much larger and averaged down, for smooth edges


def any_colour(rng: np.random.Generator) -> np.ndarray:
    """RGB of one of the COLOURS, [3]."""
    return np.array(list(COLOURS.values())[rng.integers(len(COLOURS))])


class Shapes:
    """The stock of composed categories that scenes are made of; a split's own pairs are counted in it alone."""

    def categories(self, split: str) -> list[str]:
        """The categories that may be counted in "train", "val", "test", "val_seen" or "test_seen", in order."""
        return sorted(" ".join(pair) for pair in HELD_OUT.get(split, TRAINED))

    def rivals(self, rng: np.random.Generator, category: str, split: str) -> tuple[list[str], list[float]]:
        """Three distractor categories and their probabilities: the first shares the look, the next the shape."""
        look, shape = category.split(" ")
        pairs = sorted(TRAINED | HELD_OUT.get(split, set()))
        shared = (True, False), (False, True), (False, False)
        groups = [[p for p in pairs if (p[0] == look, p[1] == shape) == same] for same in shared]
        return [" ".join(group[rng.integers(len(group))]) for group in groups], [0.45, 0.45, 0.1]

    def cut_out(self, rng: np.random.Generator, category: str, radius: float) -> tuple[Image.Image, Image.Image]:
        """An object, turned and tinted: RGB pixels and an L mask, trimmed, at most 2 * radius + 2 wide and high."""
        look, shape = category.split(" ")
        base = np.array(COLOURS[look]) if look in COLOURS else any_colour(rng)
        base = np.clip(base * rng.uniform(0.9, 1.1) + rng.normal(0, 5, 3), 0, 255)
        side = 2 * math.ceil(radius) + 2
        turn = rng.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * radius

        def place(points: np.ndarray) -> list[tuple]:
            return [tuple(p) for p in ((points @ rotation + side / 2) * FINENESS).tolist()]

        big = side * FINENESS
        pixels, mask = Image.new("RGB", (big, big), rgb(base)), Image.new("L", (big, big))
        pen, stencil = ImageDraw.Draw(pixels), ImageDraw.Draw(mask)
        for mark in PATTERNS.get(look, ()):
            pen.polygon(place(mark), fill=(250, 248, 240))
        for mark in MARKS.get(shape, ()):
            pen.polygon(place(mark), fill=rgb(base * 0.4))
        edges = [(_centred(OUTLINES[shape]), 255)] + ([(HOLES[shape], 0)] if shape in HOLES else [])
        for edge, inside in edges:
            stencil.polygon(place(edge), fill=inside)
            closed = place(np.concatenate([edge, edge[:2]]))  # half of the line lies outside the mask
            pen.line(closed, fill=rgb(base * 0.5), width=round(0.2 * radius * FINENESS))
        pixels, mask = pixels.reduce(FINENESS), mask.reduce(FINENESS)
        pixels, mask = pixels.crop(mask.getbbox()), mask.crop(mask.getbbox())
        pixels.paste((0, 0, 0), (0, 0), SHADE.resize(pixels.size))
        return pixels, mask


def rgb(colour: np.ndarray) -> tuple[int, ...]:
    """The colour as Pillow takes it."""
    return tuple(int(value) for value in colour)
