"""`Sample`: a picture and what is known of it; and how a picture is opened, of a root or from anywhere else.

Left out: a root's faults (`fsc147`), augmentation beyond the mirror image, and tensors (`model.collate`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..files import need_file
from .faults import DataError, Faults, need_category, size_problem
from .targets import density_map, target_heatmap

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What an image may be, whatever its name: not EPS, for which Pillow runs Ghostscript."""

SHORT_SIDE = 384  # height of FSC147's images, which are wider than high


def open_image(path: str | Path) -> Image.Image:
    """An image of which the header alone is read, in a format that Pillow decodes by itself."""
    return Image.open(need_file(path), formats=FORMATS)


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
    path = None if isinstance(picture, Image.Image) else Path(picture)
    try:
        image = picture if isinstance(picture, Image.Image) else open_image(picture)
        if problem := size_problem(*image.size):
            raise ValueError(problem)
        return to_rgb(ImageOps.exif_transpose(image))
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


def _read(kind: str, path: Path, read: Callable):
    """`read(path)`, with whatever it raises as a DataError: Pillow and numpy raise many types on damaged files."""
    try:
        return read(path)
    except Exception as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise DataError(str(Faults().add(kind, path, path.name, problem))) from error


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image, in pixels of the stored 384-pixel image; what lies on disk is read when asked for.

    A missing or damaged file raises DataError from `image`, `size`, `density`, `target` and `flipped`.
    """

    name: str
    category: str
    points: np.ndarray  # [N, 2] float32 x, y; N is 0 where there is nothing to count
    boxes: np.ndarray  # [K, 4] float32 x1, y1, x2, y2 of the exemplars; K is 3 to 6 in FSC147, else perhaps 0
    image_path: Path
    density_path: Path | None = None
    mirror_of: "Sample | None" = None  # where a mirror image takes its pixels and maps from
    in_memory: Image.Image | None = None  # RGB, of a picture without a file

    @property
    def count(self) -> int:
        return len(self.points)

    @property
    def image(self) -> Image.Image:
        """RGB, decoded at each access (thousands would not fit in memory).

        EXIF orientation is ignored, because the annotations refer to the stored pixels.
        """
        if self.mirror_of is not None:
            return self.mirror_of.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._open(to_rgb)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, from the image's header."""
        if self.mirror_of is not None:
            return self.mirror_of.size
        return self._open(lambda image: (image.height, image.width))

    @property
    def density(self) -> np.ndarray:
        """[H, W] float32, objects per pixel: the official .npy where present, else made from the dots."""
        if self.mirror_of is not None:
            return self.mirror_of.density[:, ::-1].copy()
        size = self.size  # first, so that a damaged image is not reported as a damaged density
        if self.density_path is None:
            return density_map(self.points, size).astype(np.float32)
        return _read("bad-density", self.density_path, self._load_density)

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

    def _open(self, use: Callable):
        """What `use` makes of the image, of which no more than the header is read before."""

        def read(path: Path):
            with open_image(path) as image:
                return use(image)

        return _read("unreadable-image", self.image_path, read) if self.in_memory is None else use(self.in_memory)

    def _load_density(self, path: Path) -> np.ndarray:
        density = np.load(need_file(path), allow_pickle=False)
        if density.dtype.kind not in "fiu":
            raise ValueError(f"it holds {density.dtype}, and no numbers of objects")
        if density.shape != self.size:
            raise ValueError(f"its shape is {density.shape}, the image is {self.size} (height, width)")
        with np.errstate(over="ignore"):
            density = density.astype(np.float32)
        total = density.sum(dtype=float)
        if not np.isfinite(total) or density.min() < 0:
            raise ValueError("it holds numbers that are negative or not finite")
        if (total > 0) != (self.count > 0):
            raise ValueError(f"it sums to {total:g}, but there are {self.count} dots")
        return density


class Picture(Sample):
    """A sample of no root: an image, and nothing known of it but what to count."""

    def __init__(self, picture: str | Path | Image.Image, category: str, name: str | None = None):
        """Open it upright, shrunk to FSC147's size; raises DataError where it cannot be used."""
        name = name or ("picture" if isinstance(picture, Image.Image) else str(picture))
        dots, boxes = np.zeros((0, 2), np.float32), np.zeros((0, 4), np.float32)
        need_category(category)
        super().__init__(name, category, dots, boxes, Path(name), in_memory=shrunk(open_picture(picture)))
