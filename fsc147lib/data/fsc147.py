"""Read an official FSC147 root as `Sample`s.

One scan of the annotations and the images' headers finds the faults of a root, both when `FSC147` opens a split and
when `check` reports on all of them (`checking`).  Left out: downloading, and what a fault is (`faults`).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection
from itertools import chain
from pathlib import Path

import numpy as np

from ..files import need_file, need_inside
from .faults import (
    ANNOTATIONS,
    CLASSES,
    DENSITIES,
    FALLBACK_CATEGORY,
    IMAGES,
    MAX_COUNT,
    MAX_PIXELS,
    PARTS,
    SPLITS,
    DataError,
    Faults,
    category_problem,
    is_plain,
    need_category,
    size_problem,
)
from .samples import Sample


class FSC147(list):
    """The samples of one split, in the split file's order: a list of `Sample`.

    Args:
        root: folder in the official layout.
        split: any split of the split file: train, val, test, val_coco, test_coco.
        images: False reads the annotations alone: names without one are left out, and images may be missing (what
            needs one then raises).
        category: what all images show; the root then needs no class file, and none is read.
        max_pixels: of an image; a larger one is a fault.

    Raises:
        DataError: on the fatal faults of this split (see `Fault`), all of them in one message.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        images: bool = True,
        category: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        self.root, self.split = Path(os.path.expanduser(root)), split
        samples, faults = scan(self.root, split, images, category, max_pixels)
        fatal = Faults(f for f in faults if f.fatal and (images or f.kind != "no-annotation"))
        if fatal:
            raise DataError(f"{self.root} cannot be opened for split {split!r}:\n{fatal}")
        super().__init__(samples[split])
        self.categories = sorted({sample.category for sample in self})


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
        return [sample.count for sample in FSC147(root, split, images=False, category=FALLBACK_CATEGORY)]
    except DataError:
        return []


def scan(
    root: Path, wanted: str | None, images: bool, category: str | None, max_pixels: int
) -> tuple[dict[str, list[Sample]], Faults]:
    """Read a root, of an image no more than its header: of one split, or (None) of all; other arguments as `FSC147`'s.

    Returns:
        Per split the samples with a readable annotation; all faults found.
    """
    faults = Faults()
    if category is not None:
        need_category(category)
    if not os.path.isdir(root):
        return {}, faults.add("missing-file", root, "ROOT", "there is no such folder")
    present = _read_part(root, "", _names_in, faults)
    if present is not None and not present & {SPLITS, ANNOTATIONS, CLASSES, IMAGES}:
        faults.add("missing-file", root, "ROOT", "the folder holds nothing of the layout")
    if faults:
        return {}, faults
    splits = _read_part(root, SPLITS, _parse_json, faults)
    annotations = _read_part(root, ANNOTATIONS, _parse_json, faults)
    if category is None:
        classes = _read_part(root, CLASSES, lambda text: _parse_classes(text, faults), faults)
    else:
        classes = _Object([(name, category) for name in annotations or ()])
    pictures = _read_part(root, f"{IMAGES}/", _names_in, faults, needed=images)
    maps = _read_part(root, f"{DENSITIES}/", _names_in, faults, needed=False)
    if splits is None or annotations is None:
        return {}, faults
    if wanted not in (None, *splits):
        problem = f"there is no such split, only {', '.join(map(repr, splits))}"
        return {}, faults.add("bad-split", SPLITS, wanted, problem)
    names = {split: _split_names(splits, split, faults) for split in (splits if wanted is None else [wanted])}
    samples = {}
    for name in dict.fromkeys(chain.from_iterable(names.values())):
        samples[name] = _read_entry(root, name, annotations, classes, maps or (), faults)
        if images and samples[name] and pictures is not None:  # a missing folder is one fault, not one for each image
            if name in pictures:
                _check_header(samples[name], annotations[name], root, max_pixels, faults)
            else:
                faults.add("missing-image", f"{IMAGES}/{name}", name, "there is no such file")
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
        points, given = _read_numbers(entry, "points", 2), "box_examples_coordinates" in entry
        corners = _read_numbers(entry, "box_examples_coordinates", 4, 2) if given else np.zeros((0, 4, 2), np.float32)
        if len(points) > MAX_COUNT:
            raise ValueError(f"{len(points):,} dots, more than the {MAX_COUNT:,} that an answer can tell")
    except ValueError as error:
        faults.add("bad-annotation", ANNOTATIONS, name, str(error))
        return None
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    flat = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)]
    if len(flat):
        faults.add("bad-box", ANNOTATIONS, name, f"box {flat[0].tolist()} has no area")
    category = FALLBACK_CATEGORY
    if classes is not None:  # None: the whole file is at fault already
        category = classes.get(name, FALLBACK_CATEGORY)
        if name not in classes:
            faults.add("no-category", CLASSES, name, "no line gives its category")
        if name in classes.repeated:
            faults.add("duplicate-key", CLASSES, name, "two lines give its category")
    density = Path(name).stem + ".npy"
    density_path = root / DENSITIES / density if density in maps else None
    try:
        need_inside(density_path or root, root)
    except OSError as error:
        faults.add("bad-density", f"{DENSITIES}/{density}", name, str(error))
        density_path = None
    return Sample(name, category, points, boxes, root / IMAGES / name, density_path)


def _read_numbers(entry: dict, key: str, *shape: int) -> np.ndarray:
    """`entry[key]`, nested lists, as float32 [N, *shape]; ValueError says what is wrong with it."""
    if not isinstance(entry, dict) or key not in entry:
        raise ValueError(f"the entry has no {key!r}")
    values = [entry[key]]
    for length in (None, *shape):
        for value in values:
            if type(value) is not list or length not in (None, len(value)):
                raise ValueError(f"{key!r} holds {value!r:.60} instead of a list{f' of {length}' if length else ''}")
        values = list(chain.from_iterable(values))
    for value in values:
        if type(value) not in (int, float) or not abs(value) < 1e9:  # true is no number; nor is NaN below anything
            raise ValueError(f"{key!r} holds {value!r:.60} instead of a finite number of pixels")
    return np.array(values, dtype=np.float32).reshape(-1, *shape)


def _split_names(splits: "_Object", split: str, faults: Faults) -> list[str]:
    """The names of one split; empty with a fault added if it is no list of strings."""
    names = splits[split]
    if not split.isprintable():
        faults.add("bad-split", SPLITS, split, "its name holds characters that cannot be shown")
        return []
    if type(names) is not list or not all(type(name) is str for name in names):
        faults.add("bad-split", SPLITS, split, "not a list of strings")
        return []
    if split in splits.repeated:
        faults.add("duplicate-key", SPLITS, split, "the split is there twice")
    for name, times in Counter(names).items():
        if times > 1:
            faults.add("duplicate-name", SPLITS, name, f"{times} times in {split!r}")
    for other in PARTS if split in PARTS else ():
        if PARTS[other] != PARTS[split] and type(splits.get(other)) is list:
            pair = " and in ".join(repr(s) for s in PARTS if s in (split, other))
            for name in set(names).intersection(n for n in splits[other] if type(n) is str):
                faults.add("duplicate-name", SPLITS, name, f"in {pair}")
    return names


def _read_part(root: Path, part: str, read: Callable, faults: Faults, needed: bool = True):
    """`read` of a file's text or a folder ("folder/", "" for the root); None, with a fault added, where it cannot."""
    file, entry = part or root, part.rstrip("/") or "ROOT"
    try:
        path = need_inside(root / part, root)
        return read(path if part in ("", f"{entry}/") else need_file(path).read_text("utf-8-sig"))
    except FileNotFoundError:
        if needed:
            faults.add("missing-file", file, entry, f"there is no such {'folder' if part.endswith('/') else 'file'}")
    except json.JSONDecodeError as error:
        faults.add("broken-file", file, f"line {error.lineno}, column {error.colno}", f"not JSON: {error.msg}")
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        faults.add("broken-file", file, entry, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    return None


def _names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder))


class _Object(dict):
    """What a file says by key, and which keys were there more than once."""

    def __init__(self, pairs: list[tuple]):
        super().__init__(pairs)
        times = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = {key for key in times if times[key] > 1}


def _parse_json(text: str) -> _Object:
    value = json.loads(text, object_pairs_hook=_Object)
    if not isinstance(value, _Object):
        raise ValueError("the top level is no JSON object")
    return value


def _parse_classes(text: str, faults: Faults) -> _Object:
    """Category by image name, from lines of name, tab, category."""
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, _, category = (part.strip() for part in line.partition("\t"))
        problem = "has no name, tab and category" if line.strip() else ""
        if name and category:
            problem = category_problem(category)
        if problem:
            faults.add("bad-class-line", CLASSES, f"line {number}", f"{category or line!r:.60} {problem}")
        elif name:
            pairs.append((name, category))
    return _Object(pairs)
