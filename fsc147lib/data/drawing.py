"""Draw one object of a composed category, a look and a shape: "blue stars", "striped bricks".

The pairs of validation and test never occur in training, while each of their words occurs there with six others.
Left out: whole pictures (`scenes`).
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {  # RGB, 0..255
    "red": (214, 40, 46), "orange": (246, 132, 30), "yellow": (248, 218, 56),
    "green": (46, 158, 66), "blue": (42, 104, 222), "purple": (146, 62, 190),
}  # fmt: skip
LOOKS = (*COLOURS, "striped", "dotted")  # a colour, or a white pattern on any of the colours
SHAPES = ("stars", "hearts", "leaves", "bricks", "buttons", "rings", "drops", "arrows")
HELD_OUT = {  # the pairs of each held-out split: every look and every shape once
    "val": {(look, SHAPES[i]) for i, look in enumerate(LOOKS)},
    "test": {(look, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, look in enumerate(LOOKS)},
}
TRAINED = {(look, shape) for look in LOOKS for shape in SHAPES} - HELD_OUT["val"] - HELD_OUT["test"]
FINENESS = 3  # an object is drawn this much larger and averaged down, for smooth edges


def any_colour(rng: np.random.Generator) -> np.ndarray:
    """One of the COLOURS, [3]."""
    return np.array(list(COLOURS.values())[rng.integers(len(COLOURS))])


class Shapes:
    """The stock of composed categories that scenes are made of; a split's own pairs are counted in it alone."""

    def categories(self, split: str) -> list[str]:
        """The categories that may be counted in "train", "val", "test", "val_seen" or "test_seen", in order."""
        return sorted(" ".join(pair) for pair in HELD_OUT.get(split, TRAINED))

    def rivals(self, rng: np.random.Generator, category: str, split: str) -> tuple[list[str], list[float]]:
        """Three distractor categories and how often to draw each: one shares the look, one the shape, one neither."""
        look, shape = category.split(" ")
        pairs = sorted(TRAINED | HELD_OUT.get(split, set()))
        groups = (
            [p for p in pairs if p[0] == look and p[1] != shape],
            [p for p in pairs if p[0] != look and p[1] == shape],
            [p for p in pairs if p[0] != look and p[1] != shape],
        )
        return [" ".join(group[rng.integers(len(group))]) for group in groups], [0.45, 0.45, 0.1]

    def cut_out(self, rng: np.random.Generator, category: str, radius: float) -> tuple[Image.Image, Image.Image]:
        """One object, turned and tinted: RGB pixels and an L mask, trimmed, at most 2 * radius + 2 wide and high."""
        look, shape = category.split(" ")
        base = np.array(COLOURS[look]) if look in COLOURS else any_colour(rng)
        base = np.clip(base * rng.uniform(0.9, 1.1) + rng.normal(0, 5, 3), 0, 255)
        side = 2 * math.ceil(radius) + 2
        turn = rng.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * radius

        def place(points: np.ndarray) -> list[tuple]:
            return [tuple(p) for p in ((points @ rotation + side / 2) * FINENESS).tolist()]

        big = side * FINENESS
        pixels, mask = Image.new("RGB", (big, big), _rgb(base)), Image.new("L", (big, big))
        pen, stencil = ImageDraw.Draw(pixels), ImageDraw.Draw(mask)
        for mark in _pattern(look):
            pen.polygon(place(mark), fill=(250, 248, 240))
        for mark in _details(shape):
            pen.polygon(place(mark), fill=_rgb(base * 0.4))
        edges = [_outline(shape), _round(0.46)] if shape == "rings" else [_outline(shape)]
        for edge, inside in zip(edges, (255, 0), strict=False):  # the second is a hole
            stencil.polygon(place(edge), fill=inside)
            closed = place(np.concatenate([edge, edge[:2]]))  # half of the line lies outside the mask
            pen.line(closed, fill=_rgb(base * 0.5), width=round(0.2 * radius * FINENESS))
        pixels, mask = pixels.reduce(FINENESS), mask.reduce(FINENESS)
        pixels, mask = pixels.crop(mask.getbbox()), mask.crop(mask.getbbox())
        pixels.paste((0, 0, 0), (0, 0), _shade(pixels.size))
        return pixels, mask


def _rgb(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in colour)


@cache
def _shade(size: tuple[int, int]) -> Image.Image:
    """Objects are a little darker below: an L mask."""
    return Image.linear_gradient("L").point(lambda value: value * 0.28).resize(size)


def _round(radius: float, x: float = 0.0, y: float = 0.0, corners: int = 36) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius * np.cos(t), y + radius * np.sin(t)], axis=1)


@cache
def _outline(shape: str) -> np.ndarray:
    """[N, 2] points of a shape within the unit circle, around the middle of their box."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    if shape == "stars":
        points = _round(1, corners=10) * np.where(np.arange(10) % 2 == 0, 1, 0.45)[:, None]
    elif shape == "hearts":
        x = 16 * np.sin(t) ** 3
        points = np.stack([x, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)], axis=1)
    elif shape == "leaves":
        points = np.stack([-np.cos(t), 0.5 * np.sign(np.sin(t)) * np.abs(np.sin(t)) ** 1.5], axis=1)
    elif shape == "bricks":
        points = np.array([[-1, -0.55], [1, -0.55], [1, 0.55], [-1, 0.55]])
    elif shape == "drops":
        points = np.stack([np.cos(t), 0.9 * np.sin(t) * np.sin(t / 2) ** 2], axis=1)
    elif shape == "arrows":
        upper = np.array([[-1, 0.36], [-0.05, 0.36], [-0.05, 0.85], [1, 0]])
        points = np.concatenate([upper, upper[-2::-1] * [1, -1]])
    else:  # buttons and rings
        points = _round(1)
    points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    return points / np.hypot(*points.T).max()


@cache
def _details(shape: str) -> list[np.ndarray]:
    """Dark marks that belong to a shape, whatever its look."""
    if shape == "buttons":
        return [_round(0.15, x, y) for x in (-0.26, 0.26) for y in (-0.26, 0.26)]
    if shape == "leaves":
        return [np.array([[-0.95, -0.05], [0.7, 0], [-0.95, 0.05]])]
    return []


@cache
def _pattern(look: str) -> list[np.ndarray]:
    """White marks of a look, over the whole square -1..1."""
    if look == "striped":
        return [np.array([[x, -1], [x + 0.26, -1], [x + 0.26, 1], [x, 1]]) for x in (-0.88, -0.38, 0.12, 0.62)]
    if look == "dotted":
        rows = enumerate(np.arange(-1.0, 1.1, 0.5))
        middles = [(x + 0.29 * (i % 2), y) for i, y in rows for x in np.arange(-1.16, 1.2, 0.58)]
        return [_round(0.17, x, y, 14) for x, y in middles if math.hypot(x, y) < 1.1]
    return []
