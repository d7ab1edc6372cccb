"""A picture from anywhere: opened upright in RGB, or refused in a sentence, and shrunk to FSC147's size.

Left out: a root's images, whose annotations refer to the pixels as they are stored (`fsc147`).
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .faults import DataError, is_category, size_problem
from .fsc147 import Sample, open_image, to_rgb

SHORT_SIDE = 384  # height of FSC147's images, which are wider than high


def open_picture(picture: str | Path | Image.Image) -> Image.Image:
    """A file of `fsc147.FORMATS` or an image in memory, in RGB as a viewer shows it: upright, transparent parts white.

    Raises:
        DataError: it cannot be read, or is too large; the message names the file.
    """
    path = None if isinstance(picture, Image.Image) else Path(picture)
    try:
        image = picture if isinstance(picture, Image.Image) else open_image(picture)
        if problem := size_problem(*image.size):
            raise ValueError(problem)
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return to_rgb(image)
    except Exception as error:  # Pillow raises many types on damaged files
        empty = path and path.is_file() and path.stat().st_size == 0
        reason = "the file is empty" if empty else f"{type(error).__name__}: {error}"
        problem = f"cannot be used as a picture ({reason}): give a whole JPEG, PNG or other image file"
        raise DataError(f"{path or 'the image given'} {problem}") from error


def shrunk(image: Image.Image, short_side: int = SHORT_SIDE) -> Image.Image:
    """The image with its shorter side brought down to `short_side` pixels, or the image itself if it is not longer."""
    scale = short_side / min(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image if scale >= 1 else image.resize(size, Image.Resampling.LANCZOS)


class InMemory(Sample):
    """A sample whose image lies in memory, in no file."""

    _image: Image.Image

    def __init__(self, image: Image.Image, name: str, category: str, points=(), boxes=()):
        points, boxes = np.float32(points).reshape(-1, 2), np.float32(boxes).reshape(-1, 4)
        super().__init__(name, category, points, boxes, Path(name))
        object.__setattr__(self, "_image", image)

    @property
    def image(self) -> Image.Image:
        return self._image

    @property
    def size(self) -> tuple[int, int]:
        return self._image.height, self._image.width


class Picture(InMemory):
    """A sample of no root: an image, and nothing known of it but what to count."""

    def __init__(self, picture: str | Path | Image.Image, category: str, name: str | None = None):
        """Open it upright, shrunk to FSC147's size; raises DataError where it cannot be used."""
        need_category(category)
        name = name or (str(picture) if isinstance(picture, (str, Path)) else "picture")
        super().__init__(shrunk(open_picture(picture)), name, category)


def need_category(category: str) -> None:
    """Raise DataError where nobody could count such objects."""
    if not is_category(category):
        raise DataError(f"the category is {category!r:.60}: name what to count, for example 'apples'")
