"""Cut-outs to draw scenes with: a folder of folders, FOLDER/apples/1.png, PNG or WebP with transparency."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .faults import category_problem

LEAST = 2  # categories that a split needs: one to count, one to distract


@dataclass(frozen=True)
class Sprites:
    """A stock of cut-outs that scenes are made of, like `drawing.Shapes`."""

    pictures: dict[str, list[Path]]  # files by category
    splits: dict[str, list[str]]  # categories of train, val and test

    def categories(self, split: str) -> list[str]:
        """The categories that may be counted in a split, in order; `val_seen` and `test_seen` have training's."""
        return self.splits.get(split, self.splits["train"])

    def rivals(self, rng: np.random.Generator, category: str, split: str) -> tuple[list[str], list[float]]:
        """Up to three other categories of the split, and the probability of each."""
        others = [name for name in self.categories(split) if name != category]
        chosen = rng.permutation(len(others))[:3]
        return [others[i] for i in chosen], [1 / len(chosen)] * len(chosen)

    def cut_out(self, rng: np.random.Generator, category: str, radius: float) -> tuple[Image.Image, Image.Image]:
        """A picture of a category, turned a little: RGB pixels and an L mask, trimmed, the larger side 2 * radius."""
        files = self.pictures[category]
        picture = _thumbnail(files[rng.integers(len(files))])
        picture = picture.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
        picture = picture.crop(_solid(picture))
        scale = 2 * radius / max(picture.size)
        size = [max(3, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return picture.convert("RGB"), picture.getchannel("A")


def read_sprites(folder: str | Path, seed: int = 0) -> Sprites:
    """Read a folder of folders of cut-outs, and deal its folders, each of which is a category, to the splits.

    Raises ValueError for too few categories, a name that a question cannot hold, or a damaged picture.
    """
    pictures: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).glob("*/*")):
        if path.suffix.lower() in (".png", ".webp") and _thumbnail(path):
            pictures.setdefault(path.parent.name.replace("_", " "), []).append(path)
    for name in pictures:
        if problem := category_problem(name):
            raise ValueError(f"--sprites {folder}: the category {name!r} {problem}: rename the folder")
    if len(pictures) < 3 * LEAST:
        problem = f"cut-outs (.png, .webp) of {len(pictures)} categories, but three splits need {LEAST} each"
        raise ValueError(f"--sprites {folder} has {problem}: make FOLDER/CATEGORY/1.png, ...")
    names = np.random.default_rng(seed).permutation(sorted(pictures)).tolist()
    each = max(LEAST, round(0.15 * len(names)))
    parts = {"val": names[:each], "test": names[each : 2 * each], "train": names[2 * each :]}
    return Sprites(pictures, {split: sorted(part) for split, part in parts.items()})


@lru_cache(512)
def _thumbnail(path: Path) -> Image.Image | None:
    """A cut-out, RGBA, trimmed and at most 96 pixels large; None for a picture that is opaque or nowhere so."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except Exception as error:  # Pillow raises many types on damaged files
        raise ValueError(f"--sprites: {str(path)!r} cannot be read ({type(error).__name__}: {error})") from error
    if np.asarray(picture)[..., 3].min() >= 128 or _solid(picture) is None:
        return None
    picture = picture.crop(_solid(picture))
    picture.thumbnail((96, 96))  # objects are smaller
    return picture


def _solid(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of the object, of which a trace of alpha is no part."""
    return picture.getchannel("A").point(lambda value: 255 * (value > 24)).getbbox()
