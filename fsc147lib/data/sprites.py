"""Cut-outs to draw scenes with: pictures with transparency, sorted into categories, dealt to the splits.

Collections can be used as they come:

- a folder per category, FOLDER/apples/1.png: pictures lie one folder down and nowhere else;
- any tree of pictures named by what they show, red_apple.png; a text file beside one (red_apple.txt) whose first
  line is like "A red apple." names it better;
- pictures named by the emoji they show, 1f34e.webp: Unicode's name, "red apple".

Left out: sequences of code points (skin tones, families, flags), and pictures without transparency: no cut-outs.
"""

import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .faults import category_problem

ENDINGS = (".png", ".webp")
HELD_OUT_PART = 0.15  # of the nouns, for each of val and test
LEAST = 2  # nouns that a split needs: one to count, one to distract
_THUMBNAIL = 96  # pixels; objects are smaller
_EMOJI = re.compile(r"(1f[0-9a-f]{3}|[23][0-9a-f]{3}|[0-9a-f]{2,4}(?=-fe0f|-20e3))(?:-fe0f)?(-[0-9a-f-]+)?")
_FAINT = [255 if value > 24 else 0 for value in range(256)]  # a trace of alpha is no part of the object


@dataclass(frozen=True)
class Sprites:
    """A stock of cut-outs that scenes are made of, like `drawing.Shapes`."""

    pictures: dict[str, list[Path]]  # files by category
    splits: dict[str, list[str]]  # categories of train, val and test

    def categories(self, split: str) -> list[str]:
        """The categories that may be counted in a split, in order; `val_seen` and `test_seen` have training's."""
        return self.splits.get(split, self.splits["train"])

    def rivals(self, rng: np.random.Generator, category: str, split: str) -> tuple[list[str], list[float]]:
        """Up to three other categories of the split, and how often to draw each."""
        others = [name for name in self.categories(split) if name != category]
        chosen = rng.permutation(len(others))[:3]
        return [others[i] for i in chosen], [1 / len(chosen)] * len(chosen)

    def cut_out(self, rng: np.random.Generator, category: str, radius: float) -> tuple[Image.Image, Image.Image]:
        """One picture of a category, turned a little: RGB pixels and an L mask, trimmed, the larger side 2 * radius."""
        files = self.pictures[category]
        picture = _thumbnail(files[rng.integers(len(files))])
        picture = picture.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR, expand=True)
        picture = picture.crop(_solid(picture))
        scale = 2 * radius / max(picture.size)
        size = [max(3, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return picture.convert("RGB"), picture.getchannel("A")


def read_sprites(folder: str | Path, seed: int = 0) -> Sprites:
    """Find, check and name the cut-outs below a folder (see the module) and deal their categories to the splits.

    Categories that end in one word (red apple, green apple) go to one split, so that a noun of val or test is new.

    Raises:
        ValueError: no folder, nothing to use in it, too few categories, a name that a prompt cannot hold, or a
            picture that is damaged or fully transparent.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--sprites {folder}: there is no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    a_folder_each = all(path.parent.parent == folder for path in files)
    pictures = defaultdict(list)
    for path in files:
        name = _words(path.parent.name) if a_folder_each else _name(path)
        if name and _is_cut_out(path):
            if category_problem(name):
                raise ValueError(f"--sprites: {str(path)!r} would be called {name!r}, which a prompt cannot hold")
            pictures[name].append(path)
    if not pictures:
        raise ValueError(f"--sprites {folder}: no {' or '.join(ENDINGS)} picture with transparency in it")
    nouns = sorted({name.split()[-1] for name in pictures})
    if len(nouns) < 3 * LEAST:
        problem = f"{len(nouns)} different nouns ({', '.join(nouns)}), but three splits need {LEAST} each"
        raise ValueError(f"--sprites {folder}: {problem}, {3 * LEAST} in all: name a folder with more")
    nouns = [nouns[i] for i in np.random.default_rng(seed).permutation(len(nouns))]
    each = max(LEAST, round(HELD_OUT_PART * len(nouns)))
    parts = {"val": nouns[:each], "test": nouns[each : 2 * each], "train": nouns[2 * each :]}
    dealt = {split: [name for name in sorted(pictures) if name.split()[-1] in part] for split, part in parts.items()}
    return Sprites(dict(pictures), dealt)


def _name(path: Path) -> str | None:
    """What a picture shows, by its file's name or its description; None leaves it out."""
    stem, description = path.stem, path.with_suffix(".txt")
    if emoji := _EMOJI.fullmatch(stem):
        sign, sequence = chr(int(emoji[1], 16)), emoji[2]
        # 2600.png is a sign, 2001.png a number: other characters than emoji of these codes are no symbols (So)
        if len(emoji[1]) == 5 or "-" in stem or unicodedata.category(sign) == "So":
            return None if sequence else unicodedata.name(sign, "").lower() or None
    if description.is_file():
        line = description.read_text("utf-8", errors="replace").partition("\n")[0].strip()
        if found := re.fullmatch(r"(?:An?|Some|The) (?:pair of )?([A-Za-z][A-Za-z -]{1,30})[.!]?", line):
            return found[1].strip().lower()
    return _words(stem) or _words(path.parent.name)


def _words(stem: str) -> str:
    """ "Red_Apple-02" as "red apple"."""
    words = [word.rstrip("0123456789") for word in re.split(r"[\s_-]+", stem.lower().removesuffix("_mirror"))]
    return " ".join(word for word in words if word)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGBA")
    except Exception as error:  # Pillow raises many types on damaged files
        raise ValueError(f"--sprites: {str(path)!r} cannot be read ({type(error).__name__}: {error})") from error


def _solid(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of what is not transparent."""
    return picture.getchannel("A").point(_FAINT).getbbox()


def _is_cut_out(path: Path) -> bool:
    """Whether a picture has transparent pixels; ValueError if it is damaged or has no others."""
    picture = _read(path)
    if _solid(picture) is None:
        raise ValueError(f"--sprites: {str(path)!r} is fully transparent: remove it")
    return picture.getchannel("A").getextrema()[0] < 128  # type: ignore[operator]  # one channel: a pair


@lru_cache(512)
def _thumbnail(path: Path) -> Image.Image:
    picture = _read(path)
    picture = picture.crop(_solid(picture))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture
