"""Cut-outs for drawn scenes: PNG or WebP files with transparency, in a folder for each category."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .faults import need_category

LEAST = 2  # categories of a split: one to count, one to distract


@dataclass(frozen=True)
class Sprites:
    """The cut-outs that scenes are drawn with, in place of `drawing.Shapes`."""

    pictures: dict[str, list[Path]]  # files by category
    splits: dict[str, list[str]]  # categories of train, val and test

    def categories(self, split: str) -> list[str]:
        """The sorted categories of a split; those of train for `val_seen` and `test_seen`."""
        return self.splits.get(split, self.splits["train"])

    def rivals(self, rng: np.random.Generator, category: str, split: str) -> tuple[list[str], list[float]]:
        """Up to three other categories of the split, and the probability of each."""
        others = [name for name in self.categories(split) if name != category]
        chosen = rng.permutation(others)[:3].tolist()
        return chosen, [1 / len(chosen)] * len(chosen)

    def cut_out(self, rng: np.random.Generator, category: str, radius: float) -> tuple[Image.Image, Image.Image]:
        """A picture of the category, rotated by up to 25 degrees: trimmed RGB pixels and mask (mode L).

        The larger side is 2 * radius pixels.
        """
        picture = _thumbnail(self.pictures[category][rng.integers(len(self.pictures[category]))])
        picture = picture.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
        picture = picture.crop(_object_box(picture))
        size = [max(3, round(side * 2 * radius / max(picture.size))) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return picture.convert("RGB"), picture.getchannel("A")


def read_sprites(folder: str | Path, seed: int = 0) -> Sprites:
    """Read FOLDER/CATEGORY/*.png and *.webp, and share the categories at random among train, val and test.

    Raises ValueError for too few categories, a name that a question cannot hold, or a damaged picture.
    """
    pictures: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).glob("*/*")):
        if path.suffix.lower() in (".png", ".webp") and _thumbnail(path):
            pictures.setdefault(path.parent.name.replace("_", " "), []).append(path)
    for name in pictures:
        need_category(name, f"--sprites {folder}: ")
    if len(pictures) < 3 * LEAST:
        problem = f"cut-outs (.png, .webp) of {len(pictures)} categories, but three splits need {LEAST} each"
        raise ValueError(f"--sprites {folder} has {problem}: make FOLDER/CATEGORY/1.png, ...")
    names = np.random.default_rng(seed).permutation(sorted(pictures)).tolist()
    each = max(LEAST, round(0.15 * len(names)))
    parts = {"val": names[:each], "test": names[each : 2 * each], "train": names[2 * each :]}
    return Sprites(pictures, {split: sorted(part) for split, part in parts.items()})


@lru_cache(512)
def _thumbnail(path: Path) -> Image.Image | None:
    """A cut-out in RGBA, trimmed, at most 96 pixels large; None for a picture without object or transparency."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except Exception as error:  # Pillow raises many types on damaged files
        raise ValueError(f"--sprites: {str(path)!r} cannot be read ({type(error).__name__}: {error})") from error
    box = _object_box(picture)
    if np.asarray(picture)[..., 3].min() >= 128 or box is None:
        return None
    picture = picture.crop(box)
    picture.thumbnail((96, 96))  # objects are smaller
    return picture


def _object_box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """The bounding box of pixels with alpha above 24; None without any."""
    return picture.getchannel("A").point(lambda value: 255 * (value > 24)).getbbox()
