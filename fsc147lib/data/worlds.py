"""Light and weather on a drawn scene: worlds that the shipped models, which know "day" alone, have never seen.

A world moves nothing, so dots and boxes stay.  A new one is a function and an entry of `WORLDS`.
"""

from functools import reduce

import numpy as np
from PIL import Image, ImageFilter


def _sea(rng: np.random.Generator, pixels, turned, solid, x, y) -> np.ndarray:
    """Blue-green water, under ripples of light, in which colours stay."""
    water = _rgb(-0.02, 0.25, 0.38) - y * _rgb(0.04, 0.19, 0.16) + pixels @ np.full((3, 1), 0.04, np.float32)
    ripples = sum(np.exp(-(((_clouds(rng, pixels, 9) - 0.5) / 0.07) ** 2)) for _ in range(2))
    sunk = water + 0.85 * solid * (pixels - water)
    return 1 - (1 - sunk) * (1 - 0.06 * ripples * (1 - y))


def _night(rng: np.random.Generator, pixels, turned, solid, x, y) -> np.ndarray:
    """Objects glow like lamps below a blue sky, their brightness turned over."""
    lamps = solid * (0.06 + 0.94 * turned.clip(0, 1) ** 1.4)
    moon = np.exp(-1.2 * ((x - np.float32(rng.uniform(-1, 1))) ** 2 + (y - np.float32(rng.uniform(-1, 1))) ** 2))
    sky = _rgb(0.16, 0.2, 0.42) + y * _rgb(0.05, 0.0, 0.02) + moon * _rgb(0.1, 0.2, 0.26)
    sky = sky * (0.8 + 0.4 * _clouds(rng, pixels, 4))
    glow = (0.9 * _blurred(lamps, 16) + 0.5 * _blurred(lamps, 5)).clip(0, 0.8)
    return (1 - (1 - glow * (1 - solid)) * (1 - lamps - (1 - solid) * sky)) * (1 - 0.2 * (x**2 + y**2))


WORLDS = {"day": (None, 0), "sea": (_sea, 0.85), "night": (_night, 0.8)}  # and how much of the day it takes away


def change_world(world: str, rng: np.random.Generator, image: Image.Image, objects: Image.Image) -> Image.Image:
    """The scene in a world of `WORLDS`: an RGB image of the same size; `objects` is the L mask of all objects."""
    change, strength = WORLDS[world]
    if change is None:
        return image
    pixels = np.asarray(image, dtype=np.float32) / 255  # [H, W, 3]
    x, y = (np.linspace(-1, 1, side, dtype=np.float32) for side in image.size)
    low, high = (reduce(extreme, np.split(pixels, 3, axis=2)) for extreme in (np.minimum, np.maximum))  # [H, W, 1]
    clutter = ((1 - low / high.clip(0.02) - 0.33) / 0.2).clip(0, 1)  # vivid parts of the ground show as objects do
    solid = np.maximum(np.asarray(objects, dtype=np.float32)[..., None] / 255, clutter)
    turned = pixels + 1 - low - high  # brightness turned over, hue kept
    lit = change(rng, pixels, turned, solid, x[None, :, None], y[:, None, None])
    grain = 0.012 * rng.standard_normal(solid.shape, dtype=np.float32)
    lit = strength * lit + (1 - strength) * pixels + grain
    return Image.fromarray((255 * lit).clip(0, 255).astype(np.uint8))


def _rgb(*channels: float) -> np.ndarray:
    return np.array(channels, dtype=np.float32)


def _blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((255 * pixels).clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def _clouds(rng: np.random.Generator, pixels: np.ndarray, rows: int) -> np.ndarray:
    """Soft noise about 0..1 of the pixels' size, [H, W, 1], enlarged from a random grid of `rows` rows."""
    noise = Image.fromarray(rng.random((rows, rows * 3 // 2), dtype=np.float32))
    return np.asarray(noise.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC))[..., None]
