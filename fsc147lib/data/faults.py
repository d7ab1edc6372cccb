"""The layout of an FSC147 root, the limits of its content, and each kind of fault with its cure."""

import json
from dataclasses import dataclass
from pathlib import Path

ANNOTATIONS = "annotation_FSC147_384.json"
SPLITS = "Train_Test_Val_FSC_147.json"
CLASSES = "ImageClasses_FSC147.txt"
IMAGES = "images_384_VarV2"
FALLBACK_CATEGORY = "objects"
PARTS = {"train": "train", "val": "val", "val_coco": "val", "test": "test", "test_coco": "test"}
"""The part of FSC147 that a split belongs to.  No image may lie in two parts."""

MAX_COUNT = 999_999  # dots of an image: the number of an answer has six digits
MAX_CATEGORY = 100  # characters of a category: it is a few words of a question
MAX_ASPECT = 200  # an image's longer side over its shorter one: Qwen's image processor refuses more
MAX_PIXELS = 100_000_000  # of an image by default: these take 300 MB in RGB

START = f"""for FSC147 itself download FSC147_384_V2 (images) and the annotations of "Learning To Count Everything", \
https://github.com/cvlab-stonybrook/LearningToCountEverything; for pictures of your own use `fsc147lib import`, or \
write the files by hand (docs/data.md). The layout is
    ROOT/
    ├── {ANNOTATIONS}
    ├── {SPLITS}
    ├── {CLASSES}
    └── {IMAGES}/   2.jpg, 3.jpg, ..."""

MISSING_CURES = {  # of a missing part of the layout
    ANNOTATIONS: 'write {"1.jpg": {"points": [[x, y], ...]}, ...} there, in pixels of the images',
    SPLITS: 'write {"train": ["1.jpg", ...], "val": ["2.jpg", ...]} there',
    CLASSES: "write a line 'name<TAB>category' for each image, or name one category for all (--category)",
    IMAGES: "make the folder, and put the images that the splits name into it",
}
FAULTS = {  # kind: (fatal, cure); the fatal kinds come first
    "missing-file": (True, START),
    "broken-file": (True, "correct the file there, or put a sound copy in its place"),
    "bad-split": (True, "name a split of the split file, and make it a list of image names (strings)"),
    "duplicate-name": (True, "keep the name once, in one of train, val and test, or in one class line"),
    "unsafe-name": (True, f"use a plain file name of {IMAGES}/, without folders or drives"),
    "no-annotation": (True, "annotate the image, or leave the name out of the split"),
    "bad-annotation": (
        True,
        "correct the entry: 'points' is a list of [x, y] (empty where there is nothing to count), "
        "'box_examples_coordinates', if it is there, a list of boxes of four [x, y] corners, all finite numbers",
    ),
    "unreadable-image": (True, "put a sound copy of the image there, or leave the name out of the split"),
    "bad-size": (True, "crop or shrink the image, and its dots with it; --max-pixels N allows for larger ones"),
    "size-mismatch": (True, "use the image that belongs to this annotation: every dot is misplaced on this one"),
    "repeated-image": (False, "leave it out: check --exclude FILE writes the list that train --exclude reads"),
    "bad-box": (False, "correct the box, or check that the image belongs to it"),
    "dot-outside": (False, "nothing to do for a few (they count on the border); many mean the wrong image"),
    "no-category": (False, f"add a line 'name<TAB>category'; until then the category is '{FALLBACK_CATEGORY}'"),
    "bad-class-line": (False, "write the line as 'name<TAB>category'"),
    "unlisted": (False, "nothing to do, or add the name to a split"),
}


class DataError(ValueError):
    """The data on disk cannot be used.  The message names the file, the entry and the cure."""


@dataclass(frozen=True)
class Fault:
    """A defect of a root."""

    file: str  # relative to the root
    entry: str  # image name, split name, or line
    kind: str  # a key of FAULTS
    problem: str
    cure: str
    fatal: bool  # a split with this fault cannot be opened


class Faults(list):
    """A list of `Fault`s.  Its text has a paragraph for each kind, with at most five faults."""

    def add(self, kind: str, file: str | Path, entry: str, problem: str) -> "Faults":
        """Append a fault of a kind in FAULTS; returns the list itself."""
        fatal, cure = FAULTS[kind]
        if kind == "missing-file":
            cure = MISSING_CURES.get(str(file), cure)
        self.append(Fault(str(file), entry, kind, problem, cure, fatal))
        return self

    def __str__(self) -> str:
        lines = []
        for kind, (fatal, _) in FAULTS.items():
            group = [fault for fault in self if fault.kind == kind]
            if group:
                lines.append(f"{kind} ({len(group)}{', fatal' if fatal else ''})")
                # repr, because a terminal would obey control characters in a name
                lines += [f"  {fault.file!r}, entry {fault.entry!r}: {fault.problem}" for fault in group[:5]]
                lines += [f"  ... and {len(group) - 5} more"] if len(group) > 5 else []
                lines += [f"  Cure: {cure}" for cure in dict.fromkeys(fault.cure for fault in group)]
        return "\n".join(lines)


def is_plain(name: str) -> bool:
    """Whether a string is a file name without folders or drives, on Linux, macOS and Windows."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


def need_category(category: str | None, place: str = "") -> str:
    """Return the category; DataError, its message after `place`, for one that a question cannot hold."""
    if not (category or "").strip():
        reason = ""
    elif len(category) > MAX_CATEGORY:
        reason = f" and has more than {MAX_CATEGORY} characters"
    elif "<" in category or not category.isprintable():
        reason = " and may be read as control tokens"  # <think>, <|im_end|>
    else:
        return category
    raise DataError(f"{place}the category is {category!r:.60}{reason}: name what to count, for example 'apples'")


def size_problem(width: int, height: int, max_pixels: int = MAX_PIXELS) -> str:
    """What is wrong with an image's size in pixels: too long for its width, or too large; "" for a usable size."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other"
    if width * height > max_pixels:
        return f"{width} x {height} = {width * height:,} pixels are more than {max_pixels:,}"
    return ""


def write_layout(root: Path, entries: dict[str, dict], splits: dict[str, list[str]], categories: dict[str, str]):
    """Write a root's three text files: annotations by image, image names by split, categories by image."""
    (root / ANNOTATIONS).write_text(json.dumps(entries))
    (root / SPLITS).write_text(json.dumps(splits, indent=1))
    (root / CLASSES).write_text("".join(f"{name}\t{category}\n" for name, category in categories.items()))
