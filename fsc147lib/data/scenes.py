"""Draw a small data set in FSC147's own layout: something to learn on, with no download.

Each picture shows one counted category among distractors of others, on its own background and under
its own light.  Everything that the annotation says is exact: a dot in the middle of each object and
three exemplar boxes.  A seed gives the same bytes again (with the same version of Pillow).

Left out: photographs, and FSC147's split by category: there the test categories are never trained
on; a tiny model that starts from random weights cannot generalise to names it has never read, so
here all splits share their categories.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tyro.conf import Positional

from ..files import new_draft, replace_folder
from .faults import ANNOTATIONS, CLASSES, IMAGES, SPLITS

HEIGHT = 384
WIDTHS = (384, 432, 480, 512, 576, 640)
COUNTS = (5, 60)
"""Fewest and most objects of the counted category in a picture; drawn log-uniformly between."""

SCALE = 2
"""Pictures are drawn this much larger and averaged down, for smooth edges."""

MAX_DISTRACTORS = 0.4
"""Distractors, as a part of the counted objects."""


# --- Outlines: functions from nothing to [N, 2] points in the square -1..1, before turning and scaling


def _round(width: float = 1.0, height: float = 1.0) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([width * np.cos(t), height * np.sin(t)], axis=1)


def _regular(corners: int) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def _star() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.48)
    return np.stack([radius * np.cos(t), radius * np.sin(t)], axis=1)


def _leaf() -> np.ndarray:
    t = np.linspace(0, np.pi, 12)
    upper = np.stack([-np.cos(t), 0.5 * np.sin(t) ** 1.5], axis=1)
    return np.concatenate([upper, upper[::-1] * [1, -1]])


def _block() -> np.ndarray:
    return np.array([[-1, -0.55], [1, -0.55], [1, 0.55], [-1, 0.55]])


# --- Textures: marks inside the outline, as (points, is_dark) in the same square


def _glint() -> list:
    return [(_round(0.28, 0.2) + [-0.35, -0.35], False)]


def _dotted() -> list:
    return [(_round(0.13, 0.13) + [x, y], True) for x, y in ((-0.45, 0), (0.45, 0.05), (0, -0.3), (0.02, 0.3))]


def _vein() -> list:
    return [(np.array([[-0.9, -0.05], [0.9, -0.05], [0.9, 0.05], [-0.9, 0.05]]), False)]


def _holes() -> list:
    return [(_round(0.17, 0.17) + [x, y], True) for x in (-0.3, 0.3) for y in (-0.3, 0.3)]


def _striped() -> list:
    return [
        (np.array([[x - 0.09, -0.5], [x + 0.09, -0.5], [x + 0.09, 0.5], [x - 0.09, 0.5]]), False)
        for x in (-0.4, 0, 0.4)
    ]


def _bored() -> list:
    return [(_round(0.45, 0.45), True)]


@dataclass(frozen=True)
class Category:
    """What a name looks like: an outline, a texture and a colour (RGB, 0..255)."""

    name: str
    outline: Callable[[], np.ndarray]
    texture: Callable[[], list]
    colour: tuple[int, int, int]


CATEGORIES = (
    Category("apples", _round, _glint, (200, 38, 42)),
    Category("lemons", partial(_round, 1.0, 0.72), _dotted, (240, 214, 52)),
    Category("leaves", _leaf, _vein, (58, 148, 58)),
    Category("buttons", _round, _holes, (52, 100, 208)),
    Category("bricks", _block, _striped, (142, 76, 44)),
    Category("starfish", _star, _dotted, (244, 132, 40)),
    Category("hex nuts", partial(_regular, 6), _bored, (150, 154, 164)),
    Category("candies", partial(_regular, 4), _striped, (216, 84, 190)),
)


@dataclass(frozen=True)
class SynthConfig:
    """Draw a small data set in FSC147's official layout."""

    out: Positional[Path]
    """Folder to make."""
    train: int = 800
    """Pictures in each split."""
    val: int = 100
    test: int = 50
    seed: int = 0
    """The same seed draws the same bytes."""


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, dict]:
    """Draw one picture.

    Returns:
        The RGB image, HEIGHT high and one of WIDTHS wide, and its annotation: `category`, `points`
        [N, 2] x, y and `boxes` [3, 4] x1 y1 x2 y2, in pixels.
    """
    size = (HEIGHT, int(rng.choice(WIDTHS)))
    count = round(math.exp(rng.uniform(math.log(COUNTS[0] - 0.5), math.log(COUNTS[1] + 0.5))))
    distractors = int(rng.integers(0, round(MAX_DISTRACTORS * count) + 1))
    counted, *others = rng.choice(len(CATEGORIES), size=3, replace=False)
    kinds = np.concatenate([np.full(count, counted), rng.choice(others, size=distractors)])
    centres, radii = _place(rng, len(kinds), size)
    image = _background(rng, size)
    pen = ImageDraw.Draw(image)
    boxes = np.zeros((len(kinds), 4))
    for i in rng.permutation(len(kinds)):
        boxes[i] = _draw_object(pen, rng, CATEGORIES[kinds[i]], centres[i], radii[i], size)
    image = _light(rng, image.reduce(SCALE))
    return image, {"category": CATEGORIES[counted].name, "points": centres[:count], "boxes": boxes[:3]}


def _place(rng: np.random.Generator, number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Centres [N, 2] and radii [N] of objects thrown into a few loose clusters; neighbours may overlap a little."""
    height, width = size
    radius = min(rng.uniform(12, 34), 0.42 * math.sqrt(height * width / number))
    radii = radius * rng.uniform(0.8, 1.2, number)
    hearts = rng.uniform((0, 0), (width, height), (int(rng.integers(1, 4)), 2))
    spread = rng.uniform(0.12, 0.4) * height
    centres = np.empty((number, 2))
    for i in range(number):
        room = np.array([width, height]) - radii[i]
        closeness, spacious = 0.85, spread
        while True:  # each miss asks for a little less distance and a little wider, so this ends
            centre = hearts[rng.integers(len(hearts))] + rng.normal(0, spacious, 2)
            gaps = np.hypot(*(centres[:i] - centre).T)
            if (
                (centre >= radii[i]).all()
                and (centre <= room).all()
                and (gaps >= closeness * (radii[:i] + radii[i])).all()
            ):
                break
            closeness, spacious = closeness * 0.997, min(spacious * 1.05, height)
        centres[i] = centre
    return centres.round(2), radii


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A soft, dull, mottled ground, SCALE times the picture's size."""
    height, width = size
    base = rng.uniform(90, 215) + rng.uniform(-18, 18, 3)
    coarse = rng.normal(0, 10, (5, 7, 1)) + rng.normal(0, 4, (5, 7, 3))
    fine = rng.normal(0, rng.uniform(2, 9), (height // 6, width // 6, 1)).repeat(3, axis=2)
    picture = Image.new("RGB", (width * SCALE, height * SCALE))
    layers = [Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)) for noise in (coarse, fine)]
    return Image.blend(*(layer.resize(picture.size, Image.Resampling.BILINEAR) for layer in layers), 0.5)


def _draw_object(pen, rng, category: Category, centre: np.ndarray, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Draw one object, turned and tinted; returns its box x1 y1 x2 y2 within the image, in pixels."""
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    colour = np.clip(np.array(category.colour) * rng.uniform(0.85, 1.12) + rng.normal(0, 6, 3), 0, 255)

    def polygon(points: np.ndarray, tint: np.ndarray, outline: np.ndarray | None = None) -> np.ndarray:
        placed = points @ rotation * radius + centre
        as_rgb = [None if c is None else tuple(int(v) for v in np.clip(c, 0, 255)) for c in (tint, outline)]
        pen.polygon([tuple(p) for p in placed * SCALE], fill=as_rgb[0], outline=as_rgb[1], width=SCALE)
        return placed

    outline = polygon(category.outline(), colour, colour * 0.5)
    for points, dark in category.texture():
        polygon(points, colour * 0.45 if dark else colour * 0.55 + 115)
    corners = np.clip([outline.min(axis=0), outline.max(axis=0)], 0, [size[1], size[0]])
    return corners.round().reshape(4)


def _light(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Light from one side, weaker or stronger, and the grain of a camera."""
    pixels = np.asarray(image, dtype=np.float32)
    y, x = np.mgrid[-1 : 1 : pixels.shape[0] * 1j, -1 : 1 : pixels.shape[1] * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0.85, 1.1) + rng.uniform(0, 0.2) * (x * math.cos(angle) + y * math.sin(angle))
    grain = rng.standard_normal(pixels.shape[:2], dtype=np.float32) * 3
    return Image.fromarray(np.clip(pixels * light[..., None] + grain[..., None], 0, 255).astype(np.uint8))


def _save_scene(folder: Path, seed: int, number: int) -> tuple[str, dict]:
    image, scene = draw_scene(np.random.default_rng([seed, number]))
    name = f"{number + 1}.jpg"
    image.save(folder / name, quality=90)
    corners = [[[x1, y1], [x1, y2], [x2, y2], [x2, y1]] for x1, y1, x2, y2 in scene["boxes"].tolist()]
    entry = {
        "box_examples_coordinates": corners,
        "img_path": f"{IMAGES}/{name}",
        "points": scene["points"].tolist(),
    }
    return scene["category"], {name: entry}


def make_dataset(out: str | Path, train: int, val: int, test: int, seed: int = 0, workers: int = 2) -> Path:
    """Draw a whole root in FSC147's official layout.

    The folder appears only when it is complete: it is drawn beside its place and renamed.  The splits
    `val_coco` and `test_coco` hold the pictures of apples, the one category here that COCO has too.

    Args:
        out: the root to make; must not exist, or be an empty folder.
        train, val, test: pictures in each split, at least 1.
        seed: the same seed draws the same bytes.
        workers: processes that draw; the result does not depend on it.

    Returns:
        The root.

    Raises:
        FileExistsError: `out` holds something already.
        ValueError: a split without pictures, or a negative seed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: name a new folder, or remove it first")
    for split, number in (("train", train), ("val", val), ("test", test)):
        if number < 1:
            raise ValueError(f"--{split} is {number}: each split needs at least one picture")
    if seed < 0:
        raise ValueError(f"--seed is {seed}, but must be at least 0")
    draft = new_draft(out)
    (draft / IMAGES).mkdir(parents=True)
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(partial(_save_scene, draft / IMAGES, seed), range(train + val + test), chunksize=8))
    annotations = {name: entry for _, part in drawn for name, entry in part.items()}
    categories = {name: category for category, part in drawn for name in part}
    names = list(annotations)
    splits = {"train": names[:train], "val": names[train : train + val], "test": names[train + val :]}
    for split in ("val", "test"):
        splits[f"{split}_coco"] = [name for name in splits[split] if categories[name] == "apples"]
    (draft / ANNOTATIONS).write_text(json.dumps(annotations))
    (draft / SPLITS).write_text(json.dumps(splits, indent=1))
    (draft / CLASSES).write_text("".join(f"{name}\t{category}\n" for name, category in categories.items()))
    replace_folder(draft, out)
    return out
