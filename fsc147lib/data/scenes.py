"""Draw a small data set in FSC147's own layout.

A picture shows a counted category among distractors that share its look or its shape, or a few distractors alone.
A dot lies in the middle of each object, and three have boxes.  A seed gives the same bytes with the same Pillow.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tyro.conf import Positional

from ..files import new_folder
from .drawing import Shapes, any_colour, rgb
from .faults import IMAGES, write_layout
from .sprites import Sprites, read_sprites
from .worlds import WORLDS, change_world

HEIGHT = 384
WIDTHS = (384, 432, 480, 512, 576, 640)
COUNTS = (1, 60)  # objects of the counted category in a picture that has any: drawn log-uniformly between
EMPTY = 0.04  # part of the pictures that show distractors alone: the answer is 0
MAX_DISTRACTORS = 10  # drawn log-uniformly from none, whatever the count is, so that the total tells little
DRAWN = ("train", "val", "test", "val_seen", "test_seen")  # the last two show training's categories
RADII = (16, 44)  # smallest and largest of an object, in pixels
OVERLAP = 0.85  # least distance of two objects, in sums of their radii


@dataclass(frozen=True)
class SynthConfig:
    """Draw a small data set in FSC147's official layout."""

    out: Positional[Path]  # Folder to make.
    train: int = 800  # Pictures in each split; val_seen and test_seen get as many as val and test.
    val: int = 100  # Pictures of categories that are never trained on.
    test: int = 50  # Pictures of still other such categories.
    seed: int = 0  # The same seed draws the same bytes.
    world: str = "day"  # Light and weather: day, on which the shipped models were trained; sea; or night.
    sprites: Path | None = None  # Draw with cut-outs (PNG or WebP with transparency): a folder for each category.


Stock = Shapes | Sprites  # what scenes are made of


def draw_scene(
    rng: np.random.Generator, split: str = "train", stock: Stock | None = None, world: str = "day"
) -> tuple[Image.Image, dict]:
    """Draw a picture of a split, of composed shapes or from a stock of cut-outs; `rng` decides everything.

    Returns the RGB image, HEIGHT high and one of WIDTHS wide, and its annotation: `category`, `points` [N, 2] x, y and
    `boxes` [min(N, 3), 4] x1 y1 x2 y2 in pixels, and `distractors`, the categories of the other objects.
    """
    stock = stock or Shapes()
    size = (HEIGHT, int(rng.choice(WIDTHS)))
    names = stock.categories(split)
    category = names[rng.integers(len(names))]
    rivals, shares = stock.rivals(rng, category, split)
    empty = rng.random() < EMPTY
    count = 0 if empty else round(math.exp(rng.uniform(math.log(COUNTS[0] - 0.5), math.log(COUNTS[1] + 0.5))))
    others = int(math.exp(rng.uniform(math.log(6 if empty else 1), math.log(MAX_DISTRACTORS + 2)))) - 1
    shown = rivals[:2][:others]  # the first two share look and shape: so an empty scene always shows both
    shown += [rivals[i] for i in rng.choice(len(rivals), others - len(shown), p=shares)]
    kinds = rng.permutation([category] * count + shown).tolist()
    centres, radii = _place(rng, len(kinds), size)
    image, objects, boxes = _background(rng, size), Image.new("L", size[::-1]), np.zeros((len(kinds), 4))
    slant = rng.uniform(0.08, 0.3) * np.array([rng.choice([-1, 1]), 1])
    for i, kind in enumerate(kinds):
        pixels, mask = stock.cut_out(rng, kind, radii[i])
        boxes[i] = box = _paste(image, pixels, mask, centres[i], slant * radii[i])
        objects.paste(255, box, mask)
    counted = np.array(kinds) == category
    points = (boxes[counted, :2] + boxes[counted, 2:]) / 2
    distractors = [kind for kind in kinds if kind != category]
    scene = {"category": category, "points": points, "boxes": boxes[counted][:3], "distractors": distractors}
    return change_world(world, rng, _light(rng, image), objects), scene


def _place(rng: np.random.Generator, number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Centres [N, 2] and radii [N] of objects thrown into a few loose clusters; neighbours may overlap a little."""
    height, width = size
    smallest = 1.15 * RADII[0]
    largest = max(smallest, min(0.8 * RADII[1], 0.4 * math.sqrt(height * width / max(number, 1))))
    radius = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    sizes = rng.uniform(0.85, 1.15, number)
    depth = rng.uniform(0, 0.3)  # what is lower in the picture is nearer
    hearts = rng.uniform((0, 0), (width, height), (int(rng.integers(1, 5)), 2))
    spread = rng.uniform(0.12, 0.5) * height
    centres, radii = np.empty((number, 2)), np.empty(number)
    for i in range(number):
        spacious = spread
        while True:  # each miss looks wider and for less room: at the smallest radius all find a place
            near = hearts[rng.integers(len(hearts), size=16)] + rng.normal(0, spacious, (16, 2))
            r = np.clip(radius * sizes[i] * (1 + depth * (2 * near[:, 1] / height - 1)), *RADII)
            inside = ((near >= r[:, None] + 1) & (near <= [width, height] - r[:, None] - 1)).all(axis=1)
            gaps = np.linalg.norm(near[:, None] - centres[:i], axis=2)
            free = inside & (gaps >= OVERLAP * (r[:, None] + radii[:i])).all(axis=1)
            if free.any():
                break
            spacious, sizes[i] = min(spacious * 1.3, height), sizes[i] * 0.99
        centres[i], radii[i] = near[free.argmax()], r[free.argmax()]
    return centres, radii


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A soft, dull, mottled ground with clutter that is nothing to count: blotches, specks and scribbles."""
    height, width = size
    base = rng.uniform(120, 240) + rng.uniform(-16, 16, 3)
    coarse = base + rng.normal(0, 7, (5, 7, 1)) + rng.normal(0, 4, (5, 7, 3))
    for _ in range(rng.integers(0, 4)):  # a blotch: some colour, far thinner than an object's
        colour = any_colour(rng)
        coarse[rng.integers(5), rng.integers(7)] += rng.uniform(0.15, 0.4) * (colour - base)
    small = width // 6, height // 6
    soft = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(small, Image.Resampling.BICUBIC)
    rough = np.asarray(soft) + rng.normal(0, rng.uniform(0.5, 6), (height // 6, width // 6, 1))
    ground = Image.fromarray(rough.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(ground)

    def ink() -> tuple[int, ...]:
        return rgb(0.45 * any_colour(rng) + 0.55 * base * rng.uniform(0.6, 1.1))

    for _ in range(int(rng.integers(0, 13))):
        steps = rng.normal(0, 9, 2) + rng.normal(0, 5, (24, 2)).cumsum(axis=0)
        line = rng.uniform((0, 0), (width, height)) + steps.cumsum(axis=0)
        pen.line([tuple(p) for p in line.tolist()], fill=ink(), width=int(rng.integers(1, 4)))
    for _ in range(int(math.exp(rng.uniform(0, 5.5)))):
        (x, y), r = rng.uniform((0, 0), (width, height)), rng.uniform(0.7, 2.6)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink())
    return ground.filter(ImageFilter.BoxBlur(0.8))


def _paste(image: Image.Image, pixels: Image.Image, mask: Image.Image, centre: np.ndarray, slant: np.ndarray) -> tuple:
    """Lay a cut-out and its shadow on the image; returns its box x1 y1 x2 y2, exact."""
    x, y = (round(c - side / 2) for c, side in zip(centre, pixels.size, strict=True))
    x, y = max(0, min(x, image.width - pixels.width)), max(0, min(y, image.height - pixels.height))
    soft = 2 + pixels.width // 20
    shadow = Image.new("L", (pixels.width + 2 * soft, pixels.height + 2 * soft))
    shadow.paste(mask.point(lambda value: round(0.42 * value)), (soft, soft))
    across, down = slant.round().astype(int).tolist()
    image.paste((8, 8, 16), (x - soft + across, y - soft + down), shadow.filter(ImageFilter.BoxBlur(soft * 0.6)))
    image.paste(pixels, (x, y), mask)
    return x, y, x + pixels.width, y + pixels.height


def _light(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Light from one side with a soft pool or shade in it, and the grain of a camera."""
    y, x = np.ogrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    angle, (a, b) = rng.uniform(0, 2 * np.pi), rng.uniform(-1, 1, 2)
    pool = rng.uniform(-0.3, 0.3) * np.exp(-2 * (x - a) ** 2) * np.exp(-2 * (y - b) ** 2)
    slope = rng.uniform(0, 0.22) * (x * math.cos(angle) + y * math.sin(angle))
    grain = rng.uniform(0.006, 0.03) * rng.standard_normal((image.height, image.width), dtype=np.float32)
    light = (rng.uniform(0.84, 1.02) + slope + pool).clip(0.55, 1.0) + grain
    layer = Image.fromarray((255 * light.clip(0, 1)).astype(np.uint8))
    return ImageChops.multiply(image, Image.merge("RGB", [layer] * 3))


def make_dataset(
    out: str | Path, train: int, val: int, test: int, seed: int = 0, world: str = "day", sprites: Path | None = None
) -> Path:
    """Draw a whole root in FSC147's official layout, and return it; arguments as in `SynthConfig`.

    A picture depends on the seed, its split and its place there alone.  Raises FileExistsError where `out` holds
    something; ValueError for a split without pictures, a negative seed, an unknown world, or unusable cut-outs.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("test", test, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{name} is {value}, but must be at least {least}")
    if world not in WORLDS:
        raise ValueError(f"--world {world} is unknown: give one of {', '.join(WORLDS)}")
    stock = Shapes() if sprites is None else read_sprites(sprites, seed)
    sizes = zip(DRAWN, (train, val, test, val, test), strict=True)
    jobs = [(split, index) for split, size in sizes for index in range(size)]
    splits: dict[str, list[str]] = {split: [] for split in DRAWN}
    entries, categories = {}, {}
    with new_folder(Path(out)) as draft:
        (draft / IMAGES).mkdir(parents=True)
        with ProcessPoolExecutor() as pool:  # a process for each core
            paths = [draft / IMAGES / f"{number}.jpg" for number in range(1, len(jobs) + 1)]
            scenes = pool.map(partial(_save_scene, seed, stock, world), jobs, paths, chunksize=8)
            for (split, _), path, (category, entry) in zip(jobs, paths, scenes, strict=True):
                splits[split].append(path.name)
                entries[path.name], categories[path.name] = entry, category
        write_layout(draft, entries, splits, categories)
    return Path(out)


def _save_scene(seed: int, stock: Stock, world: str, job: tuple[str, int], path: Path) -> tuple[str, dict]:
    """Draw a picture of a split; returns its category and its annotation as in FSC147."""
    split, index = job
    image, scene = draw_scene(np.random.default_rng([seed, DRAWN.index(split), index]), split, stock, world)
    image.save(path, quality=90)
    corners = [[[x1, y1], [x1, y2], [x2, y2], [x2, y1]] for x1, y1, x2, y2 in scene["boxes"].tolist()]
    entry = {"box_examples_coordinates": corners, "img_path": f"{IMAGES}/{path.name}"}
    return scene["category"], {**entry, "points": scene["points"].tolist()}
