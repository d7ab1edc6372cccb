"""`check`: count the images of a root and find every fault of it, in each image's pixels too."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from ..options import need, need_report
from .faults import ANNOTATIONS, IMAGES, MAX_PIXELS, PARTS, DataError, Faults
from .fsc147 import scan
from .samples import Sample


@dataclass(frozen=True)
class CheckConfig:
    """Count the images of an FSC147 root and list every fault.  The exit status is 1 if there are faults."""

    root: Positional[Path]  # Folder in the official layout.
    category: str | None = None  # Category of all images, in place of the class file.
    json: Path | None = None  # File to write the report to, as JSON.
    exclude: Path | None = None
    """File to write a list to, for `train --exclude`: training images whose bytes are in val or test, too."""
    max_pixels: int = MAX_PIXELS  # Largest image, in pixels; Pillow refuses more than 179 million.

    def __post_init__(self):
        need_report(self)
        need(self, "exclude", self.exclude is None or not self.exclude.is_dir(), "a file, not a folder")
        need(self, "max_pixels", self.max_pixels >= 1, "at least 1")


@dataclass
class Report:
    """The result of `check`."""

    root: str
    splits: dict[str, dict[str, float]]  # number of images, empty images, categories; min to max of the counts
    faults: Faults
    exclude: list[str]  # names of training images whose bytes are in another part, too

    @property
    def clean(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict:
        """The report as JSON can hold it, without `exclude`."""
        faults = [asdict(fault) for fault in self.faults]
        return {"root": self.root, "clean": self.clean, "splits": self.splits, "faults": faults}

    def __str__(self) -> str:
        lines = [f"FSC147 at {self.root}"]
        for name, row in self.splits.items():  # repr, because a name may hold control characters
            lines.append(f"  {repr(name)[1:-1]}: " + ", ".join(f"{key} {value:g}" for key, value in row.items()))
        fatal = sum(fault.fatal for fault in self.faults)
        return "\n".join([*lines, f"{len(self.faults)} faults, {fatal} of them fatal", str(self.faults)]).rstrip()


def check(root: str | Path, category: str | None = None, max_pixels: int = MAX_PIXELS) -> Report:
    """Find every fault of a root: of all splits, and of all images, which are decoded.

    Bad data is reported and never raises.  `category` and `max_pixels` are those of `FSC147`.
    """
    samples, faults = scan(Path(root).expanduser(), None, True, category, max_pixels)
    bad = {fault.file for fault in faults if fault.fatal}
    usable = {s.name: s for part in samples.values() for s in part if not bad & {IMAGES, f"{IMAGES}/{s.name}"}}
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter lock
        for found in pool.map(_pixel_faults, usable.values()):
            faults.extend(found)
    repeated = _repeated_images(samples, usable)
    for name, problem in repeated.items():
        faults.add("repeated-image", f"{IMAGES}/{name}", name, problem)
    exclude = [sample.name for sample in samples.get("train", ()) if sample.name in repeated]
    return Report(str(root), {split: _summary(part) for split, part in samples.items()}, faults, exclude)


def _summary(samples: list[Sample]) -> dict[str, float]:
    n = [sample.count for sample in samples]
    found = {"images": len(n), "empty": n.count(0), "categories": len({sample.category for sample in samples})}
    spread = {"min": min(n), "median": float(np.median(n)), "mean": float(np.mean(n)), "max": max(n)} if n else {}
    return found | spread


def _repeated_images(samples: dict[str, list[Sample]], usable: dict[str, Sample]) -> dict[str, str]:
    """Problem by name, of the images whose bytes lie in a later part under another name (val is later than train)."""
    found: dict[bytes, tuple[str, str]] = {}  # SHA-256: name and part
    repeated = {}
    for split in reversed(PARTS):
        for sample in samples.get(split, ()):
            if sample.name in usable:
                digest = hashlib.sha256(sample.image_path.read_bytes()).digest()
                name, part = found.setdefault(digest, (sample.name, PARTS[split]))
                if part != PARTS[split] and name != sample.name:  # one name in two parts is a duplicate-name
                    repeated[sample.name] = f"the same bytes as {name!r} of {part!r}"
    return repeated


def _pixel_faults(sample: Sample) -> Faults:
    """The faults of pixels that cannot be decoded, and of dots and boxes outside the image."""
    name, faults, (height, width) = sample.name, Faults(), sample.size
    try:
        _ = sample.image
    except DataError as error:
        return faults.add("unreadable-image", f"{IMAGES}/{name}", name, f"cannot be decoded ({error.__cause__})")
    limits, picture = np.array([width, height, width, height]), f"the {width} x {height} image"
    dots = sample.points[((sample.points < 0) | (sample.points > limits[:2])).any(axis=1)]
    if len(dots):
        problem = f"{len(dots)} of {sample.count} dots outside {picture}, first {dots[0].tolist()}"
        faults.add("dot-outside", ANNOTATIONS, name, problem)
    boxes, flat = sample.boxes, sample.boxes[:, [0, 1, 0, 1]] >= sample.boxes[:, [2, 3, 2, 3]]
    boxes = boxes[(flat | (boxes < 0) | (boxes > limits)).any(axis=1)]
    if len(boxes):
        faults.add("bad-box", ANNOTATIONS, name, f"box {boxes[0].tolist()} has no area, or leaves {picture}")
    return faults
