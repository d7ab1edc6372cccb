"""What can be wrong with an FSC147 root: the layout, the kinds of fault, and parsing that finds them.

`data` opens and checks roots with it.  Left out: images, and the decision what to do about a fault.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from ..files import need_file, need_inside

ANNOTATIONS = "annotation_FSC147_384.json"
SPLITS = "Train_Test_Val_FSC_147.json"
CLASSES = "ImageClasses_FSC147.txt"
IMAGES = "images_384_VarV2"
DENSITIES = "gt_density_map_adaptive_384_VarV2"
FALLBACK_CATEGORY = "objects"
PARTS = {"train": "train", "val": "val", "val_coco": "val", "test": "test", "test_coco": "test"}
"""Which of FSC147's splits are parts of one; no image is in two of train, val and test."""

MAX_COUNT = 999_999
"""Dots of an image at the most: the number of an answer has six digits."""

MAX_CATEGORY = 100
"""Characters of a category at the most: it is a few words of a question."""

MAX_ASPECT = 200
"""An image's longer side is at the most so many times its shorter one: Qwen's image processor refuses others."""

MAX_PIXELS = 100_000_000
"""Pixels of an image at the most, unless more are asked for: 100 million are 300 MB already."""

LAYOUT = f"""    ROOT/
    ├── {ANNOTATIONS}
    ├── {SPLITS}
    ├── {CLASSES}
    ├── {IMAGES}/                    2.jpg, 3.jpg, ...
    └── {DENSITIES}/   2.npy, 3.npy, ... (optional)"""
START = f"""for FSC147 itself download FSC147_384_V2 (images) and the annotations of "Learning To Count Everything", \
https://github.com/cvlab-stonybrook/LearningToCountEverything; for pictures of your own use `fsc147lib import`, or \
write the files by hand (docs/data.md). The layout is
{LAYOUT}"""

CURES = {  # of a part of the layout that is missing
    ANNOTATIONS: 'write {"1.jpg": {"points": [[x, y], ...]}, ...} there, in pixels of the images',
    SPLITS: 'write {"train": ["1.jpg", ...], "val": ["2.jpg", ...]} there',
    CLASSES: "write a line 'name<TAB>category' for each image, or name one category for all (--category)",
    f"{IMAGES}/": "make the folder, and put the images that the splits name into it",
}
FAULTS = {  # kind: (fatal, cure)
    "missing-file": (True, START),
    "broken-file": (True, "correct the file there, or put a sound copy in its place"),
    "bad-split": (True, "name a split of the split file, and make it a list of image names (strings)"),
    "duplicate-name": (True, "keep the name once, in one of train, val and test"),
    "duplicate-key": (True, "keep one of the two: readers silently drop all but the last"),
    "unsafe-name": (True, f"use a plain file name of {IMAGES}/, without folders or drives"),
    "no-annotation": (True, "annotate the image, or leave the name out of the split (allow_missing=True)"),
    "bad-annotation": (
        True,
        "correct the entry: 'points' is a list of [x, y] (empty where there is nothing to count), "
        "'box_examples_coordinates', if it is there, a list of boxes of four [x, y] corners, all finite numbers",
    ),
    "missing-image": (
        True,
        "put the image there, or leave the name out of the split (require_images=False reads annotations alone)",
    ),
    "unreadable-image": (True, "put a sound copy of the image there: the file is missing, damaged or no image"),
    "bad-size": (True, "crop or shrink the image, and its dots with it; --max-pixels N allows for larger ones"),
    "size-mismatch": (True, "use the image that belongs to this annotation: every dot is misplaced on this one"),
    "repeated-image": (
        False,
        "leave it out of training: check --exclude FILE writes the list that train --exclude reads",
    ),
    "bad-density": (False, "make the density again, or delete the file: it is then computed from the dots"),
    "bad-box": (False, "correct the box, or check that the image belongs to it"),
    "dot-outside": (False, "nothing to do for a few (they count on the border); many mean the wrong image"),
    "no-category": (False, f"add a line 'name<TAB>category'; until then the category is '{FALLBACK_CATEGORY}'"),
    "bad-class-line": (False, "write the line as 'name<TAB>category'"),
    "unlisted": (False, "nothing to do, or add the name to a split"),
}


class DataError(ValueError):
    """The data on disk cannot be used; the message names the file, the entry and the cure."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a root.

    `fatal`: its entry cannot be trained on or evaluated.  Opening a split raises for each fatal fault,
    but for an image that is damaged behind its header: that one raises when it is decoded.
    """

    file: str  # relative to the root
    entry: str  # image name, split name, or line
    kind: str  # a key of FAULTS
    problem: str
    cure: str
    fatal: bool


class Faults(list):
    """A list of `Fault`s; as text grouped by kind, fatal kinds first, at most five shown of each."""

    def add(self, kind: str, file: str | Path, entry: str, problem: str) -> "Faults":
        fatal, cure = FAULTS[kind]
        if kind == "missing-file":
            cure = CURES.get(str(file), cure)
        self.append(Fault(str(file), entry, kind, problem, cure, fatal))
        return self

    def __str__(self) -> str:
        lines = []
        for kind, (fatal, _) in FAULTS.items():  # the fatal ones come first there
            group = [fault for fault in self if fault.kind == kind]
            if group:
                lines.append(f"{kind} ({len(group)}{', fatal' if fatal else ''})")
                # by their repr: a name may hold control characters that a terminal would obey
                lines += [f"  {fault.file!r}, entry {fault.entry!r}: {fault.problem}" for fault in group[:5]]
                lines += [f"  ... and {len(group) - 5} more"] if len(group) > 5 else []
                lines += [f"  Cure: {cure}" for cure in dict.fromkeys(fault.cure for fault in group)]
        return "\n".join(lines)


def is_plain(name: str) -> bool:
    """Whether a name from a file may be opened in a folder without leaving it, on any system."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


def is_category(text: str) -> bool:
    """Whether a text names what to count, and nothing like <think> or <|im_end|>, which are control tokens."""
    return bool(text.strip()) and "<" not in text and text.isprintable() and len(text) <= MAX_CATEGORY


def size_problem(width: int, height: int, max_pixels: int = MAX_PIXELS) -> str:
    """What keeps an image of this size from being used, or ""."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other"
    if width * height > max_pixels:
        return f"{width} x {height} = {width * height:,} pixels are more than {max_pixels:,}"
    return ""


def read_numbers(entry: dict, key: str, *shape: int) -> np.ndarray:
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


def split_names(splits: "_Object", split: str, faults: Faults) -> list[str]:
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


def read_text(root: Path, file: str, parse, faults: Faults):
    """`parse` of a file's text, or None with a fault added."""
    try:
        return parse(need_file(need_inside(root / file, root)).read_text("utf-8-sig"))
    except FileNotFoundError:
        faults.add("missing-file", file, file, "there is no such file")
    except json.JSONDecodeError as error:
        faults.add("broken-file", file, f"line {error.lineno}, column {error.colno}", f"not JSON: {error.msg}")
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        faults.add("broken-file", file, file, f"cannot be read: {error}")
    return None


def list_folder(root: Path, folder: str, kind: str, faults: Faults) -> set[str] | None:
    """The names in a folder of the root; None where there is none, with a fault added where it cannot be read."""
    try:
        return set(os.listdir(need_inside(root / folder, root)))
    except FileNotFoundError:
        return None
    except OSError as error:
        file = f"{folder}/" if folder else root
        faults.add(kind, file, folder or "ROOT", f"cannot be read: {error.strerror or error}")
        return None


class _Object(dict):
    """What a file says by key, and which keys were there more than once."""

    def __init__(self, pairs: list[tuple]):
        super().__init__(pairs)
        self.repeated = set()
        if len(self) < len(pairs):
            self.repeated = {key for key, times in Counter(key for key, _ in pairs).items() if times > 1}


def parse_json(text: str) -> _Object:
    value = json.loads(text, object_pairs_hook=_Object)
    if not isinstance(value, _Object):
        raise ValueError("the top level is no JSON object")
    return value


def parse_classes(text: str, faults: Faults) -> _Object:
    """Category by image name, from lines of name, tab, category."""
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, _, category = (part.strip() for part in line.partition("\t"))
        if name and category and not is_category(category):
            long = len(category) > MAX_CATEGORY
            problem = f"has more than {MAX_CATEGORY} characters" if long else "may be read as control tokens"
            faults.add("bad-class-line", CLASSES, f"line {number}", f"{category!r:.60} {problem}")
        elif name and category:
            pairs.append((name, category))
        elif line.strip():
            faults.add("bad-class-line", CLASSES, f"line {number}", f"{line!r:.60} has no name, tab and category")
    return _Object(pairs)
