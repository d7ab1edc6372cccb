"""Read and check an official FSC147 root: annotations, splits and images as `Sample`s.

One scan finds the faults of a root, both when `FSC147` opens a split and when `check` reports on all
of them.  Opening reads the annotations and the images' headers; `check` also decodes every image.

Left out: downloading, augmentation beyond the mirror image, and tensors (`collate`).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from tyro.conf import Positional

from ..options import need
from .faults import (
    ANNOTATIONS,
    CLASSES,
    DENSITIES,
    FALLBACK_CATEGORY,
    IMAGES,
    SPLITS,
    DataError,
    Faults,
    is_plain,
    parse_classes,
    parse_json,
    read_numbers,
    read_text,
    split_names,
)
from .targets import density_map, target_heatmap


def _read(kind: str, path: Path, read):
    """`read(path)`, with whatever it raises as a DataError: Pillow and numpy raise many types on damaged files."""
    try:
        return read(path)
    except Exception as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise DataError(str(Faults().add(kind, path, path.name, problem))) from error


def _header_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.height, image.width


def _decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


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
        density = np.load(path, allow_pickle=False).astype(np.float32)
        if density.shape != self.size:
            raise ValueError(f"its shape is {density.shape}, the image is {self.size} (height, width)")
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

    Raises:
        DataError: on the fatal faults of this split (see `Fault`), all of them in one message.
    """

    def __init__(self, root: str | Path, split="train", require_images=True, allow_missing=False):
        self.root, self.split = Path(root).expanduser(), split
        samples, faults = _scan(self.root, split, require_images)
        fatal = Faults(f for f in faults if f.fatal and not (allow_missing and f.kind == "no-annotation"))
        if fatal:
            raise DataError(f"{self.root} cannot be opened for split {split!r}:\n{fatal}")
        self._samples = samples[split]
        self.categories = sorted({sample.category for sample in self._samples})

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index):
        return self._samples[index]


def open_split(root: str | Path, split: str, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples of a split, to train on or to evaluate.

    Raises:
        DataError: as `FSC147`, and for a split without images.
    """
    samples = FSC147(root, split)[:limit]
    if not samples:
        raise DataError(f"{root}: split {split!r} in {SPLITS} is empty: name another split, or add images to it")
    return samples


def mean_count(root: str | Path, split: str = "train") -> float | None:
    """Mean count of a split, from the annotations alone; None where there is no such split, or none of its images."""
    try:
        counts = [sample.count for sample in FSC147(root, split, require_images=False, allow_missing=True)]
    except DataError:
        return None
    return float(np.mean(counts)) if counts else None


@dataclass(frozen=True)
class CheckConfig:
    """Count what an FSC147 root holds and list every fault, by file.  Exit status 1 if there are faults."""

    root: Positional[Path]
    """Folder in the official layout."""
    json: Path | None = None
    """Write the report here too."""

    def __post_init__(self):
        need(self, "json", self.json is None or not self.json.is_dir(), "a file, not a folder")


@dataclass
class Report:
    """What `check` found: per split the numbers of usable images and categories, and the spread of counts.

    An image without a dot is no fault: it has a count of 0, and no target heatmap.
    """

    root: str
    splits: dict[str, dict[str, float]]  # images, empty (of objects), categories, and of counts min, median, mean, max
    faults: Faults

    @property
    def clean(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        faults = [asdict(fault) for fault in self.faults]
        return {"root": self.root, "clean": self.clean, "splits": self.splits, "faults": faults}

    def __str__(self) -> str:
        rows = [f"  {name}: " + ", ".join(f"{k} {v:g}" for k, v in row.items()) for name, row in self.splits.items()]
        total = f"{len(self.faults)} faults, {sum(fault.fatal for fault in self.faults)} of them fatal"
        return "\n".join([f"FSC147 at {self.root}", *rows, total, str(self.faults)]).rstrip()


def check(root: str | Path) -> Report:
    """Look for every fault of a root, in all splits, decoding every image.  Bad data never raises."""
    samples, faults = _scan(Path(root).expanduser())
    unique = {sample.name: sample for listed in samples.values() for sample in listed}.values()
    present = [sample for sample in unique if sample.image_path.exists()]
    with ThreadPoolExecutor() as pool:  # decoding lets go of the interpreter lock
        for found in pool.map(_pixel_faults, present):
            faults.extend(found)
    splits: dict[str, dict[str, float]] = {}
    for split, listed in samples.items():
        n = [sample.count for sample in listed]
        splits[split] = {"images": len(n), "empty": n.count(0), "categories": len({s.category for s in listed})}
        if n:
            splits[split] |= {"min": min(n), "median": float(np.median(n)), "mean": float(np.mean(n)), "max": max(n)}
    return Report(str(root), splits, faults)


def _pixel_faults(sample: Sample) -> Faults:
    """The faults of one sample that show only with its pixels, or that are not fatal."""
    name, faults = sample.name, Faults()
    try:
        height, width = sample.size
    except DataError:
        return faults  # the scan has said so
    try:
        _ = sample.image  # decoded for its errors alone
    except DataError as error:
        return faults.add("unreadable-image", f"{IMAGES}/{name}", name, f"cannot be decoded ({error.__cause__})")
    limits = np.array([width, height, width, height])
    dots = sample.points[((sample.points < 0) | (sample.points > limits[:2])).any(axis=1)]
    if len(dots):
        problem = f"{len(dots)} of {sample.count} dots outside the {width} x {height} image, first {dots[0].tolist()}"
        faults.add("dot-outside", ANNOTATIONS, name, problem)
    boxes = sample.boxes[((sample.boxes < 0) | (sample.boxes > limits)).any(axis=1)]
    if len(boxes):
        faults.add("bad-box", ANNOTATIONS, name, f"box {boxes[0].tolist()} leaves the {width} x {height} image")
    try:
        if sample.density_path:
            _ = sample.density  # loaded for its errors alone
    except DataError as error:
        faults.add("bad-density", f"{DENSITIES}/{sample.density_path.name}", name, str(error.__cause__))
    return faults


def _scan(root: Path, wanted: str | None = None, images: bool = True) -> tuple[dict[str, list[Sample]], Faults]:
    """Read a root, of an image no more than its header: of one split, or (None) of all.

    Returns:
        Per split the samples with a readable annotation; all faults found.
    """
    faults = Faults()
    if not root.is_dir():
        return {}, faults.add("missing-file", root, "ROOT", "there is no such folder")
    splits = read_text(root, SPLITS, parse_json, faults)
    annotations = read_text(root, ANNOTATIONS, parse_json, faults)
    classes = read_text(root, CLASSES, lambda text: parse_classes(text, faults), faults)
    if images and not (root / IMAGES).is_dir():
        faults.add("missing-file", f"{IMAGES}/", IMAGES, "there is no such folder")
        images = False  # said once, not for every image
    if splits is None or annotations is None:
        return {}, faults
    if wanted not in (None, *splits):
        problem = f"there is no such split, only {', '.join(map(repr, splits))}"
        return {}, faults.add("bad-split", SPLITS, wanted, problem)
    names = {split: split_names(splits, split, faults) for split in (splits if wanted is None else [wanted])}
    pictures, maps = ({path.name for path in (root / folder).glob("*")} for folder in (IMAGES, DENSITIES))
    samples = {}
    for name in dict.fromkeys(chain.from_iterable(names.values())):
        samples[name] = _read_entry(root, name, annotations, classes, maps, faults)
        if images and samples[name] and name not in pictures:
            faults.add("missing-image", f"{IMAGES}/{name}", name, "there is no such file")
        elif images and samples[name]:
            _check_size(samples[name], annotations[name], faults)
    if wanted is None:
        for name in sorted(annotations.keys() - samples.keys()):
            kind = "unlisted" if is_plain(name) else "unsafe-name"
            faults.add(kind, ANNOTATIONS, name, "annotated, but in no split")
        for name in sorted(pictures - samples.keys()):
            faults.add("unlisted", f"{IMAGES}/{name}", name, "on disk, but in no split")
    faults = Faults(dict.fromkeys(faults))  # an image in two splits is at fault once
    return {split: [samples[n] for n in listed if samples[n]] for split, listed in names.items()}, faults


def _check_size(sample: Sample, entry: dict, faults: Faults) -> None:
    """Hold the image's header against the original size and the ratios that FSC147's entries carry."""
    file = f"{IMAGES}/{sample.name}"
    try:
        height, width = sample.size
    except DataError as error:
        faults.add("unreadable-image", file, sample.name, f"cannot be read ({error.__cause__})")
        return
    for side, ratio, size in (("H", "ratio_h", height), ("W", "ratio_w", width)):
        factors = entry.get(side), entry.get(ratio)
        numbers = all(type(factor) in (int, float) and abs(factor) < 1e9 for factor in factors)
        if side in entry and ratio in entry and not (numbers and abs(factors[0] * factors[1] - size) <= 1):
            problem = f"{side} x {ratio} is {factors[0]!r} x {factors[1]!r} in the annotation, {size} in the image"
            faults.add("size-mismatch", file, sample.name, problem)


def _read_entry(root: Path, name: str, annotations, classes, maps: set[str], faults: Faults) -> Sample | None:
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
    except ValueError as error:
        faults.add("bad-annotation", ANNOTATIONS, name, str(error))
        return None
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    flat = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)]
    if len(flat):
        faults.add("bad-box", ANNOTATIONS, name, f"box {flat[0].tolist()} has no area")
    if classes is not None and name not in classes:  # None: the whole file is at fault already
        faults.add("no-category", CLASSES, name, "no line gives its category")
    density = Path(name).stem + ".npy"
    density_path = root / DENSITIES / density if density in maps else None
    category = (classes or {}).get(name, FALLBACK_CATEGORY)
    return Sample(name, category, points, boxes, root / IMAGES / name, density_path)
