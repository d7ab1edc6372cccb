"""Read and check an official FSC147 root: annotations, splits and images as `Sample`s.

One scan finds the faults of a root, both when `FSC147` opens a split and when `check` reports on all of them
(`checking`).  It reads the annotations and the images' headers.

Left out: downloading, augmentation beyond the mirror image, and tensors (`collate`).
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import need_file, need_inside
from .faults import (
    ANNOTATIONS,
    CLASSES,
    DENSITIES,
    FALLBACK_CATEGORY,
    IMAGES,
    MAX_COUNT,
    MAX_PIXELS,
    SPLITS,
    DataError,
    Faults,
    is_category,
    is_plain,
    list_folder,
    parse_classes,
    parse_json,
    read_numbers,
    read_text,
    size_problem,
    split_names,
)
from .targets import density_map, target_heatmap

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What an image may be, whatever its name: not EPS, for which Pillow runs Ghostscript."""


def _read(kind: str, path: Path, read):
    """`read(path)`, with whatever it raises as a DataError: Pillow and numpy raise many types on damaged files."""
    try:
        return read(path)
    except Exception as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise DataError(str(Faults().add(kind, path, path.name, problem))) from error


def open_image(path: str | Path) -> Image.Image:
    """An image of which the header alone is read, in a format that Pillow decodes by itself."""
    return Image.open(need_file(path), formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, its 16 bits scaled to 8; Pillow would cut them off at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has numbers of any range: save it with 8 or 16 bits")
    return image.convert("RGB")


def _header_size(path: Path) -> tuple[int, int]:
    with open_image(path) as image:
        return image.height, image.width


def _decode(path: Path) -> Image.Image:
    with open_image(path) as image:
        return to_rgb(image)


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
        return _read("unreadable-image", self.image_path, _decode)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, from the image's header."""
        return self.mirror_of.size if self.mirror_of else _read("unreadable-image", self.image_path, _header_size)

    @property
    def density(self) -> np.ndarray:
        """[H, W] float32, objects per pixel: the official .npy where present, else made from the dots."""
        if self.mirror_of is not None:
            return self.mirror_of.density[:, ::-1].copy()
        size = self.size  # first, so that a damaged image is not reported as a damaged density
        if self.density_path is None:
            return density_map(self.points, size)
        return _read("bad-density", self.density_path, self._load_density)

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


class FSC147(Sequence):
    """The samples of one split, in the split file's order; an index gives a `Sample`, a slice a list.

    Args:
        root: folder in the official layout.
        split: any split of the split file: train, val, test, val_coco, test_coco.
        require_images: False reads annotations with no image on disk (what needs one then raises).
        allow_missing: leave out names of the split that have no annotation, instead of raising.
        category: what all images show; the root then needs no class file, and none is read.
        max_pixels: of an image; a larger one is a fault.

    Raises:
        DataError: on the fatal faults of this split (see `Fault`), all of them in one message.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        require_images: bool = True,
        allow_missing: bool = False,
        category: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.root, self.split = Path(os.path.expanduser(root)), split
        samples, faults = scan(self.root, split, require_images, category, max_pixels)
        fatal = Faults(f for f in faults if f.fatal and not (allow_missing and f.kind == "no-annotation"))
        if fatal:
            raise DataError(f"{self.root} cannot be opened for split {split!r}:\n{fatal}")
        self._samples = samples[split]
        self.categories = sorted({sample.category for sample in self._samples})

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index):
        return self._samples[index]


def open_split(
    root: str | Path,
    split: str,
    limit: int | None = None,
    category: str | None = None,
    exclude: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Sample]:
    """The first `limit` samples of a split, to train on or to evaluate; `category` and `max_pixels` as in `FSC147`.

    Args:
        exclude: a file of names, one a line, that are left out of the split.

    Raises:
        DataError: as `FSC147`; for a split without images, or a name to leave out that is not in it.
    """
    opened = FSC147(root, split, category=category, max_pixels=max_pixels)
    left_out = set(need_file(exclude).read_text("utf-8-sig").splitlines()) if exclude else set()
    unknown = left_out - {sample.name for sample in opened}
    if unknown:
        raise DataError(f"{exclude} names {min(unknown)!r:.60}, which is not in split {split!r}: take the line out")
    samples = [sample for sample in opened if sample.name not in left_out][:limit]
    if not samples:
        raise DataError(f"{root}: split {split!r} in {SPLITS} is empty: name another split, or add images to it")
    return samples


def split_counts(root: str | Path, split: str = "train") -> list[int]:
    """The counts of a split, from the annotations alone; empty where there is no such split that can be opened."""
    try:
        return [sample.count for sample in FSC147(root, split, False, True, category=FALLBACK_CATEGORY)]
    except DataError:
        return []


def scan(
    root: Path,
    wanted: str | None = None,
    images: bool = True,
    category: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[dict[str, list[Sample]], Faults]:
    """Read a root, of an image no more than its header: of one split, or (None) of all; other arguments as `FSC147`'s.

    Returns:
        Per split the samples with a readable annotation; all faults found.
    """
    faults = Faults()
    if category is not None and not is_category(category):
        raise DataError(f"the category is {category!r:.60}: name what to count, for example 'apples'")
    if not os.path.isdir(root):
        return {}, faults.add("missing-file", root, "ROOT", "there is no such folder")
    present = list_folder(root, "", "broken-file", faults)
    if present is None:
        return {}, faults
    if not present & {SPLITS, ANNOTATIONS, CLASSES, IMAGES}:
        return {}, faults.add("missing-file", root, "ROOT", "the folder holds nothing of the layout")
    splits = read_text(root, SPLITS, parse_json, faults)
    annotations = read_text(root, ANNOTATIONS, parse_json, faults)
    if category is None:
        classes = read_text(root, CLASSES, lambda text: parse_classes(text, faults), faults)
    else:
        classes = {name: category for name in annotations or ()}
    pictures, maps = (list_folder(root, folder, "broken-file", faults) for folder in (IMAGES, DENSITIES))
    if pictures is None:
        if images and IMAGES not in {fault.entry for fault in faults}:
            faults.add("missing-file", f"{IMAGES}/", IMAGES, "there is no such folder")
        images = False  # said once, not for every image
    if splits is None or annotations is None:
        return {}, faults
    if wanted not in (None, *splits):
        problem = f"there is no such split, only {', '.join(map(repr, splits))}"
        return {}, faults.add("bad-split", SPLITS, wanted, problem)
    names = {split: split_names(splits, split, faults) for split in (splits if wanted is None else [wanted])}
    samples = {}
    for name in dict.fromkeys(chain.from_iterable(names.values())):
        samples[name] = _read_entry(root, name, annotations, classes, maps or (), faults)
        if images and samples[name] and name not in pictures:
            faults.add("missing-image", f"{IMAGES}/{name}", name, "there is no such file")
        elif images and samples[name]:
            _check_header(samples[name], annotations[name], root, max_pixels, faults)
    if wanted is None:
        for split, purpose in (("train", "train on"), ("val", "validate on")):
            if splits.get(split, []) == []:
                faults.add("bad-split", SPLITS, split, f"it has no image to {purpose}")
        for name in sorted(annotations.keys() - samples.keys()):
            kind = "unlisted" if is_plain(name) else "unsafe-name"
            faults.add(kind, ANNOTATIONS, name, "annotated, but in no split")
        for name in sorted((pictures or set()) - samples.keys()):
            faults.add("unlisted", f"{IMAGES}/{name}", name, "on disk, but in no split")
    faults = Faults(dict.fromkeys(faults))  # an image in two splits is at fault once
    return {split: [samples[n] for n in listed if samples[n]] for split, listed in names.items()}, faults


def _check_header(sample: Sample, entry: dict, root: Path, max_pixels: int, faults: Faults) -> None:
    """Hold the image's header against the bounds, and against the original size and ratios of FSC147's entries."""
    file = f"{IMAGES}/{sample.name}"
    try:
        need_inside(sample.image_path, root)
        height, width = sample.size
    except (OSError, DataError) as error:
        faults.add("unreadable-image", file, sample.name, f"cannot be read ({error.__cause__ or error})")
        return
    if problem := size_problem(width, height, max_pixels):
        faults.add("bad-size", file, sample.name, problem)
    for side, ratio, size in (("H", "ratio_h", height), ("W", "ratio_w", width)):
        factors = entry.get(side), entry.get(ratio)
        numbers = all(type(factor) in (int, float) and abs(factor) < 1e9 for factor in factors)
        if side in entry and ratio in entry and not (numbers and abs(factors[0] * factors[1] - size) <= 1):
            problem = f"{side} x {ratio} is {factors[0]!r} x {factors[1]!r} in the annotation, {size} in the image"
            faults.add("size-mismatch", file, sample.name, problem)


def _read_entry(root: Path, name: str, annotations, classes, maps: Collection[str], faults: Faults) -> Sample | None:
    """The sample of one name, or None with a fault added; `maps` are the density files that exist."""
    if not is_plain(name):
        faults.add("unsafe-name", SPLITS, name, "the name is no plain file name")
        return None
    if name not in annotations:
        faults.add("no-annotation", ANNOTATIONS, name, "in a split, but not annotated")
        return None
    entry = annotations[name]
    if name in annotations.repeated or getattr(entry, "repeated", None):
        faults.add("duplicate-key", ANNOTATIONS, name, "the entry, or a key in it, is there twice")
    try:
        points, given = read_numbers(entry, "points", 2), "box_examples_coordinates" in entry
        corners = read_numbers(entry, "box_examples_coordinates", 4, 2) if given else np.zeros((0, 4, 2), np.float32)
        if len(points) > MAX_COUNT:
            raise ValueError(f"{len(points):,} dots, more than the {MAX_COUNT:,} that an answer can tell")
    except ValueError as error:
        faults.add("bad-annotation", ANNOTATIONS, name, str(error))
        return None
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    flat = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)]
    if len(flat):
        faults.add("bad-box", ANNOTATIONS, name, f"box {flat[0].tolist()} has no area")
    if classes is not None and name not in classes:  # None: the whole file is at fault already
        faults.add("no-category", CLASSES, name, "no line gives its category")
    if name in getattr(classes, "repeated", ()):
        faults.add("duplicate-key", CLASSES, name, "two lines give its category")
    density = Path(name).stem + ".npy"
    density_path = root / DENSITIES / density if density in maps else None
    try:
        need_inside(density_path or root, root)
    except OSError as error:
        faults.add("bad-density", f"{DENSITIES}/{density}", name, str(error))
        density_path = None
    category = (classes or {}).get(name, FALLBACK_CATEGORY)
    return Sample(name, category, points, boxes, root / IMAGES / name, density_path)
