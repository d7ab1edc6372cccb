"""`Sample`, an annotated image, and the reading of image files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..files import need_file
from .faults import DataError, Faults, need_category, size_problem
from .targets import density_map, target_heatmap

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, for which Pillow runs Ghostscript
SHORT_SIDE = 384  # height of FSC147's images, which are wider than high


def open_image(path: str | Path) -> Image.Image:
    """Open an image file in one of FORMATS.  Pillow reads its header here, and its pixels later."""
    if need_file(path).stat().st_size == 0:
        raise ValueError("the file is empty")
    return Image.open(path, formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB: transparency is laid on white, 16-bit values are divided by 256."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        values, clear = np.asarray(image), image.info.get("transparency")  # the transparent grey, or None
        image = Image.fromarray(np.where(values == clear, 255, values >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has numbers of any range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # La converts to no other mode
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_picture(picture: str | Path | Image.Image) -> Image.Image:
    """Decode a picture from a file or from memory to RGB, turned upright by its EXIF data.

    Raises:
        DataError: the picture is damaged, too large or too long.  The message names the file.
    """
    name = "the image given" if isinstance(picture, Image.Image) else picture
    try:
        image = picture if isinstance(picture, Image.Image) else open_image(picture)
        if problem := size_problem(*image.size):
            raise ValueError(problem)
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises many types on damaged files
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        cure = "give a whole JPEG, PNG or other image"
        raise DataError(f"{name} cannot be used as a picture ({reason}): {cure}") from error


def shrunk(image: Image.Image, short_side: int = SHORT_SIDE) -> Image.Image:
    """Scale an image down to a shorter side of `short_side` pixels.  A smaller image is returned as it is."""
    scale = short_side / min(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image if scale >= 1 else image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class Sample:
    """An annotated image.  Each access to pixels or size may read its file, and raise DataError if that is damaged."""

    name: str
    category: str
    points: np.ndarray  # [N, 2] float32 x, y in pixels: a dot on each object
    boxes: np.ndarray  # [K, 4] float32 x1, y1, x2, y2 of example objects: K is 3 to 6 in FSC147, and may be 0
    image_path: Path
    mirror_of: "Sample | None" = None  # the original of a mirror image, which reads its pixels there
    in_memory: Image.Image | None = None  # RGB pixels of an image without a file

    @property
    def count(self) -> int:
        return len(self.points)

    @property
    def image(self) -> Image.Image:
        """RGB pixels, decoded at each access.  EXIF orientation is ignored: dots refer to the stored pixels."""
        if self.mirror_of is not None:
            return self.mirror_of.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._read(to_rgb) if self.in_memory is None else self.in_memory.copy()

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, from the image's header."""
        if self.mirror_of is not None:
            return self.mirror_of.size
        return self._read(lambda image: image.size[::-1]) if self.in_memory is None else self.in_memory.size[::-1]

    @property
    def density(self) -> np.ndarray:
        """[H, W] float32 objects per pixel, computed from the dots; sums to the count."""
        return density_map(self.points, self.size).astype(np.float32)

    @cached_property
    def target(self) -> np.ndarray:
        """The target heatmap: [14, 14] float32 summing to 1; zeros without a dot.  Computed once."""
        if self.mirror_of is not None:
            return self.mirror_of.target[:, ::-1].copy()
        return target_heatmap(self.points, self.size)

    def flipped(self) -> "Sample":
        """The left-right mirror image, with its dots and boxes.  The mirror image of a mirror image is the original."""
        if self.mirror_of is not None:
            return self.mirror_of
        width = np.float32(self.size[1])
        points, boxes = self.points.copy(), self.boxes[:, [2, 1, 0, 3]]  # x1 and x2 change places
        points[:, 0] = width - points[:, 0]
        boxes[:, [0, 2]] = width - boxes[:, [0, 2]]
        return Sample(self.name, self.category, points, boxes, self.image_path, mirror_of=self)

    def _read(self, use: Callable):
        """Apply `use` to the image that is open; DataError with a cure where the file is missing or damaged."""
        try:
            with open_image(self.image_path) as image:
                return use(image)
        except Exception as error:  # Pillow raises many types on damaged files
            problem = f"cannot be read ({type(error).__name__}: {error})"
            fault = Faults().add("unreadable-image", self.image_path, self.image_path.name, problem)
            raise DataError(str(fault)) from error


class Picture(Sample):
    """A sample without a root and without dots: an image and the category to count in it."""

    def __init__(self, picture: str | Path | Image.Image, category: str, name: str | None = None):
        """Read the picture upright, with its shorter side shrunk to 384 pixels; DataError if it cannot be used."""
        name = name or ("picture" if isinstance(picture, Image.Image) else str(picture))
        dots, boxes = np.zeros((0, 2), np.float32), np.zeros((0, 4), np.float32)
        need_category(category)
        super().__init__(name, category, dots, boxes, Path(name), in_memory=shrunk(open_picture(picture)))
