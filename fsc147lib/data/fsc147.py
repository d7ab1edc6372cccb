"""Read an FSC147 root: `FSC147` opens a split as `Sample`s; `scan` finds the faults of text files and image headers."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..files import need_file, need_inside
from .faults import (
    ANNOTATIONS,
    CLASSES,
    FALLBACK_CATEGORY,
    IMAGES,
    MAX_COUNT,
    MAX_PIXELS,
    PARTS,
    SPLITS,
    DataError,
    Faults,
    is_plain,
    need_category,
    size_problem,
)  # fmt: skip
from .samples import Sample


class FSC147(list):
    """The samples of a split, in the split file's order: a list of `Sample`.

    Args:
        root: folder in the official layout.
        split: train, val, test, val_coco, test_coco or another name in the split file.
        images: False reads annotations without images; names without an annotation are left out.
        category: category of all images, in place of the class file.
        max_pixels: largest image, in pixels.

    Raises:
        DataError: the split has fatal faults (see `Fault`).  The message lists them all.
    """

    def __init__(
        self, root: str | Path, split: str = "train", images: bool = True, category: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.root, self.split = Path(root).expanduser(), split
        samples, faults = scan(self.root, split, images, category, max_pixels)
        fatal = Faults(f for f in faults if f.fatal and (images or f.kind != "no-annotation"))
        if fatal:
            raise DataError(f"{self.root} cannot be opened for split {split!r}:\n{fatal}")
        super().__init__(samples[split])
        self.categories = sorted({sample.category for sample in self})


def open_split(
    root: str | Path, split: str, limit: int | None = None, category: str | None = None,
    exclude: Path | None = None, max_pixels: int = MAX_PIXELS,
) -> list[Sample]:  # fmt: skip
    """The first `limit` samples of a split, or all of them, without the names in the file `exclude` (one a line).

    `category` and `max_pixels` are those of `FSC147`.

    Raises:
        DataError: as `FSC147`; no sample is left; `exclude` has a name that is not in the split.
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
    """The number of dots of each annotated image of a split; [] if the split cannot be opened."""
    try:
        return [sample.count for sample in FSC147(root, split, images=False, category=FALLBACK_CATEGORY)]
    except DataError:
        return []


def scan(
    root: Path, wanted: str | None, images: bool, category: str | None, max_pixels: int
) -> tuple[dict[str, list[Sample]], Faults]:
    """Read the split `wanted`, or all splits for None: the annotated samples by split, and all faults found.

    Images are opened for their headers alone, and not at all if `images` is False.  Bad data never raises.
    """
    if category is not None:
        need_category(category)
    faults = Faults()
    with _reported(faults, "broken-file", root, "ROOT"):
        if not root.is_dir():
            raise FileNotFoundError("there is no such folder")
        if not {SPLITS, ANNOTATIONS, CLASSES, IMAGES} & set(os.listdir(root)):
            raise FileNotFoundError("the folder holds nothing of the layout")
    if faults:
        return {}, faults
    splits = _read(root, SPLITS, _parse_json, faults)
    annotations = _read(root, ANNOTATIONS, _parse_json, faults)
    classes = dict.fromkeys(annotations or (), category)
    if category is None:
        classes = _read(root, CLASSES, lambda path: _parse_classes(path, faults), faults)
    pictures = _read(root, IMAGES, os.listdir, faults) if images else None
    if splits is None or annotations is None:
        return {}, faults
    if wanted is not None and wanted not in splits:
        return {}, faults.add("bad-split", SPLITS, wanted, f"no such split, only {', '.join(map(repr, splits))}")
    names = {split: _split_names(splits, split, faults) for split in (splits if wanted is None else [wanted])}
    listed, samples = {name for part in names.values() for name in part}, {}
    for name in sorted(listed):
        if sample := _read_sample(root, name, annotations, classes, faults):
            samples[name] = sample
            if pictures is not None:  # a missing folder is one fault, not one for each image
                _check_image(sample, annotations[name], root, max_pixels, faults)
    if wanted is None:
        _check_whole(splits, annotations, set(pictures or ()), listed, faults)
    faults = Faults(dict.fromkeys(faults))  # a name in two parts is found in each
    return {split: [samples[n] for n in part if n in samples] for split, part in names.items()}, faults


@contextmanager
def _reported(faults: Faults, kind: str, file: str | Path, entry: str) -> Iterator[None]:
    """Turn an error in the block into a fault of this kind; FileNotFoundError into "missing-file"."""
    try:
        yield
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        kind = "missing-file" if isinstance(error, FileNotFoundError) else kind
        faults.add(kind, file, entry, str(getattr(error, "strerror", None) or error.__cause__ or error))


def _read(root: Path, part: str, parse: Callable, faults: Faults):
    """Apply `parse` to the path of a part of the layout; None, with a fault added, if that raises."""
    with _reported(faults, "broken-file", part, part):
        return parse(need_inside(root / part, root))


def _parse_json(path: Path) -> dict:
    value = json.loads(need_file(path).read_text("utf-8-sig"), object_pairs_hook=_without_repeats)
    if not isinstance(value, dict):
        raise ValueError("the top level is no JSON object")
    return value


def _without_repeats(pairs: list[tuple]) -> dict:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"the key {key!r} is there twice: readers silently drop all but the last")
    return dict(pairs)


def _parse_classes(path: Path, faults: Faults) -> dict[str, str]:
    """Category by image name, from lines of name, tab, category; faults of single lines are added."""
    classes: dict[str, str] = {}
    for number, line in enumerate(need_file(path).read_text("utf-8-sig").splitlines(), start=1):
        name, _, category = (part.strip() for part in line.partition("\t"))
        if not line.strip():
            continue
        with _reported(faults, "bad-class-line", CLASSES, f"line {number}"):
            if not name or not category:
                raise ValueError(f"{line!r:.60} has no name, tab and category")
            if name in classes:
                faults.add("duplicate-name", CLASSES, name, "two lines give its category")
            else:
                classes[name] = need_category(category)
    return classes


def _split_names(splits: dict, split: str, faults: Faults) -> list[str]:
    """The names of a split, with faults added for those that are there twice; [] if it is no list of strings."""
    names = splits[split]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        faults.add("bad-split", SPLITS, split, "not a list of strings")
        return []
    for name, times in Counter(names).items():
        if times > 1:
            faults.add("duplicate-name", SPLITS, name, f"{times} times in {split!r}")
    for other, part in PARTS.items():
        if split in PARTS and part != PARTS[split] and isinstance(splits.get(other), list):
            pair = " and in ".join(repr(s) for s in PARTS if s in (split, other))
            for name in sorted(set(names) & {name for name in splits[other] if isinstance(name, str)}):
                faults.add("duplicate-name", SPLITS, name, f"in {pair}")
    return names


def _read_sample(root: Path, name: str, annotations: dict, classes: dict | None, faults: Faults) -> Sample | None:
    """The sample of a name; None, with a fault added, without a readable annotation."""
    if not is_plain(name):
        faults.add("unsafe-name", SPLITS, name, "the name is no plain file name")
        return None
    if name not in annotations:
        faults.add("no-annotation", ANNOTATIONS, name, "in a split, but not annotated")
        return None
    with _reported(faults, "bad-annotation", ANNOTATIONS, name):
        points, boxes = _read_marks(annotations[name])
        if classes is not None and name not in classes:  # None: the class file itself is at fault
            faults.add("no-category", CLASSES, name, "no line gives its category")
        return Sample(name, (classes or {}).get(name, FALLBACK_CATEGORY), points, boxes, root / IMAGES / name)


def _read_marks(entry: dict) -> tuple[np.ndarray, np.ndarray]:
    """The dots [N, 2] x, y and boxes [K, 4] x1, y1, x2, y2 of an annotation; ValueError if it is malformed."""
    if not isinstance(entry, dict):
        raise ValueError("the entry is no JSON object")
    points = _numbers("points", entry.get("points"), (2,))
    corners = _numbers("box_examples_coordinates", entry.get("box_examples_coordinates", []), (4, 2))
    if len(points) > MAX_COUNT:
        raise ValueError(f"{len(points):,} dots, more than the {MAX_COUNT:,} that an answer can tell")
    return points, np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _numbers(key: str, lists, shape: tuple[int, ...]) -> np.ndarray:
    """Nested lists as float32 [N, *shape]; ValueError if they have another shape, or an element is no number."""
    values = np.array(lists, dtype=object)  # lists of unequal lengths end up as elements
    if values.shape != (0,) and values.shape[1:] != shape:
        expected = " lists of ".join(map(str, shape))
        raise ValueError(f"{key!r} is {lists!r:.60}, and no list of lists of {expected} numbers")
    for value in values.flat:
        if not _is_number(value):
            raise ValueError(f"{key!r} holds {value!r:.60} instead of a finite number of pixels")
    return values.astype(np.float32).reshape(-1, *shape)


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # excludes true and NaN


def _check_image(sample: Sample, entry: dict, root: Path, max_pixels: int, faults: Faults) -> None:
    """Compare the image's size with the limits, and with H x ratio_h and W x ratio_w of its annotation."""
    file, name = f"{IMAGES}/{sample.name}", sample.name
    with _reported(faults, "unreadable-image", file, name):
        need_inside(sample.image_path, root)
        height, width = sample.size
        if problem := size_problem(width, height, max_pixels):
            faults.add("bad-size", file, name, problem)
        for side, ratio, size in (("H", "ratio_h", height), ("W", "ratio_w", width)):
            if side in entry and ratio in entry:
                a, b = entry[side], entry[ratio]
                if not (_is_number(a) and _is_number(b) and abs(a * b - size) <= 1):
                    problem = f"{side} x {ratio} is {a!r} x {b!r} in the annotation, {size} in the image"
                    faults.add("size-mismatch", file, name, problem)


def _check_whole(splits: dict, annotations: dict, pictures: set[str], listed: set[str], faults: Faults) -> None:
    """Add the faults of missing splits, and of annotations and pictures that are not `listed` in a split."""
    for split, purpose in (("train", "train on"), ("val", "validate on")):
        if splits.get(split, []) == []:
            faults.add("bad-split", SPLITS, split, f"it has no image to {purpose}")
    for name in sorted(annotations.keys() - listed):
        kind = "unlisted" if is_plain(name) else "unsafe-name"
        faults.add(kind, ANNOTATIONS, name, "annotated, but in no split")
    for name in sorted(pictures - listed):
        faults.add("unlisted", f"{IMAGES}/{name}", name, "on disk, but in no split")
