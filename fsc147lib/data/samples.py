"""`Sample`: a picture with what is known of it; and the reading of pictures, in a root or anywhere."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    """An image of which the header alone is read, in a format that Pillow decodes by itself."""
    if need_file(path).stat().st_size == 0:
        raise ValueError("the file is empty")
    return Image.open(path, formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent, its 16 bits scaled to 8; Pillow would cut them off at 255."""
    if image.mode.startswith("I;16"):
        numbers, clear = np.asarray(image), image.info.get("transparency")  # the grey that stands for it, or None
        image = Image.fromarray(np.where(numbers == clear, 255, numbers >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has numbers of any range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # La converts to nothing else
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_picture(picture: str | Path | Image.Image) -> Image.Image:
    """A file of FORMATS or an image in memory, upright and as `to_rgb` gives it.

    Raises:
        DataError: it cannot be read, or is too large; the message names the file.
    """
    name = "the image given" if isinstance(picture, Image.Image) else picture
    try:
        image = picture if isinstance(picture, Image.Image) else open_image(picture)
        if problem := size_problem(*image.size):
            raise ValueError(problem)
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises many types on damaged files
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{name} cannot be used as a picture ({reason}): give a whole JPEG, PNG or other image"
        ) from error


def shrunk(image: Image.Image, short_side: int = SHORT_SIDE) -> Image.Image:
    """The image with its shorter side brought down to `short_side` pixels, or the image itself if it is not longer."""
    scale = short_side / min(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image if scale >= 1 else image.resize(size, Image.Resampling.LANCZOS)


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Make any error in the block a DataError: Pillow and numpy raise many types on damaged files."""
    try:
        yield
    except Exception as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise DataError(str(Faults().add(kind, path, path.name, problem))) from error


@dataclass(frozen=True, eq=False)
class Sample:
    """An annotated image.  Its files are read when asked for; a missing or damaged file raises DataError then."""

    name: str
    category: str
    points: np.ndarray  # [N, 2] float32 x, y; N is 0 where there is nothing to count
    boxes: np.ndarray  # [K, 4] float32 x1, y1, x2, y2 of the exemplars; K is 3 to 6 in FSC147, and may be 0
    image_path: Path
    density_path: Path | None = None
    mirror_of: "Sample | None" = None  # where a mirror image takes its pixels and maps from
    in_memory: Image.Image | None = None  # RGB, of a picture without a file

    @property
    def count(self) -> int:
        return len(self.points)

    @property
    def image(self) -> Image.Image:
        """RGB, decoded at each access; EXIF orientation is ignored, because annotations refer to the stored pixels."""
        if self.mirror_of is not None:
            return self.mirror_of.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.in_memory is not None:
            return self.in_memory.copy()
        with _reading(self.image_path, "unreadable-image"), open_image(self.image_path) as image:
            return to_rgb(image)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, from the image's header."""
        if self.mirror_of is not None:
            return self.mirror_of.size
        if self.in_memory is not None:
            return self.in_memory.size[::-1]
        with _reading(self.image_path, "unreadable-image"), open_image(self.image_path) as image:
            return image.size[::-1]

    @property
    def density(self) -> np.ndarray:
        """[H, W] float32, objects per pixel: the official .npy where present, else made from the dots."""
        if self.mirror_of is not None:
            return self.mirror_of.density[:, ::-1].copy()
        size = self.size  # first, so that a damaged image is not reported as a damaged density
        if self.density_path is None:
            return density_map(self.points, size).astype(np.float32)
        with _reading(self.density_path, "bad-density"), np.errstate(over="ignore"):
            density = np.load(need_file(self.density_path), allow_pickle=False)
            if density.dtype.kind not in "fiu":
                raise ValueError(f"it holds {density.dtype}, and no numbers of objects")
            if density.shape != size:
                raise ValueError(f"its shape is {density.shape}, the image is {size} (height, width)")
            density = density.astype(np.float32)
            total = density.sum(dtype=float)
            if not np.isfinite(total) or density.min() < 0:
                raise ValueError("it holds numbers that are negative or not finite")
            if (total > 0) != (self.count > 0):
                raise ValueError(f"it sums to {total:g}, but there are {self.count} dots")
            return density

    @cached_property
    def target(self) -> np.ndarray:
        """[14, 14] float32 summing to 1, or zeros in an empty scene: the target heatmap, computed once."""
        if self.mirror_of is not None:
            return self.mirror_of.target[:, ::-1].copy()
        return target_heatmap(self.points, self.size)

    def flipped(self) -> "Sample":
        """The left-right mirror image; flipping twice gives the very same sample."""
        if self.mirror_of is not None:
            return self.mirror_of
        width = np.float32(self.size[1])
        points, boxes = self.points.copy(), self.boxes[:, [2, 1, 0, 3]]  # x1 and x2 change places
        points[:, 0] = width - points[:, 0]
        boxes[:, [0, 2]] = width - boxes[:, [0, 2]]
        return Sample(self.name, self.category, points, boxes, self.image_path, self.density_path, mirror_of=self)


class Picture(Sample):
    """A sample of no root: an image with a category, and no dots."""

    def __init__(self, picture: str | Path | Image.Image, category: str, name: str | None = None):
        """Open it upright, shrunk to FSC147's size; raises DataError where it cannot be used."""
        name = name or ("picture" if isinstance(picture, Image.Image) else str(picture))
        dots, boxes = np.zeros((0, 2), np.float32), np.zeros((0, 4), np.float32)
        need_category(category)
        super().__init__(name, category, dots, boxes, Path(name), in_memory=shrunk(open_picture(picture)))
