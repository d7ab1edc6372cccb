"""`check`: the size of a root and every fault of it; unlike the opening of a split, it decodes every image."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from ..options import need, need_report
from .faults import ANNOTATIONS, DENSITIES, IMAGES, MAX_PIXELS, PARTS, DataError, Faults
from .fsc147 import scan
from .samples import Sample


@dataclass(frozen=True)
class CheckConfig:
    """Count what an FSC147 root holds and list every fault, by file.  Exit status 1 if there are faults."""

    root: Positional[Path]  # Folder in the official layout.
    category: str | None = None  # Name of the objects in all images, in place of the class file.
    json: Path | None = None  # Write the report here too.
    exclude: Path | None = None
    """Write a list here, for `train --exclude`, of the training images whose very bytes val or test holds too."""
    max_pixels: int = MAX_PIXELS  # Largest image, in pixels; Pillow's own limit of 179 million stays.

    def __post_init__(self):
        need_report(self)
        need(self, "exclude", self.exclude is None or not self.exclude.is_dir(), "a file, not a folder")
        need(self, "max_pixels", self.max_pixels >= 1, "at least 1")


@dataclass
class Report:
    """The result of `check`.  An image without a dot is no fault: it has a count of 0, and no target heatmap."""

    root: str
    splits: dict[str, dict[str, float]]  # of usable images: images, empty, categories; of counts min, median, mean, max
    faults: Faults
    exclude: list[str]  # names of training images whose bytes are in another part, too

    @property
    def clean(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        faults = [asdict(fault) for fault in self.faults]
        return {"root": self.root, "clean": self.clean, "splits": self.splits, "faults": faults}

    def __str__(self) -> str:
        lines = [f"FSC147 at {self.root}"]
        for name, row in self.splits.items():  # by its repr: it may hold control characters
            lines.append(f"  {repr(name)[1:-1]}: " + ", ".join(f"{key} {value:g}" for key, value in row.items()))
        fatal = sum(fault.fatal for fault in self.faults)
        return "\n".join([*lines, f"{len(self.faults)} faults, {fatal} of them fatal", str(self.faults)]).rstrip()


def check(root: str | Path, category: str | None = None, max_pixels: int = MAX_PIXELS) -> Report:
    """Look for every fault of a root, in all splits, decoding every image.  Bad data never raises.

    `category` and `max_pixels` as in `FSC147`.
    """
    samples, faults = scan(Path(root).expanduser(), None, True, category, max_pixels)
    bad = {fault.file for fault in faults if fault.fatal}
    usable = {s.name: s for part in samples.values() for s in part if not bad & {IMAGES, f"{IMAGES}/{s.name}"}}
    with ThreadPoolExecutor() as pool:  # decoding lets go of the interpreter lock
        for found in pool.map(_pixel_faults, usable.values()):
            faults.extend(found)
    repeated = _repeated_images(samples, usable)
    splits: dict[str, dict[str, float]] = {}
    for split, listed in samples.items():
        n = [sample.count for sample in listed]
        splits[split] = {"images": len(n), "empty": n.count(0), "categories": len({s.category for s in listed})}
        if n:
            splits[split] |= {"min": min(n), "median": float(np.median(n)), "mean": float(np.mean(n)), "max": max(n)}
    exclude = [sample.name for sample in samples.get("train", ()) if sample.name in repeated]
    for name, problem in repeated.items():
        faults.add("repeated-image", f"{IMAGES}/{name}", name, problem)
    return Report(str(root), splits, faults, exclude)


def _repeated_images(samples: dict[str, list[Sample]], usable: dict[str, Sample]) -> dict[str, str]:
    """The images of train or val whose very bytes are an image of a later part, too: problem by name."""
    found: dict[bytes, tuple[str, str]] = {}  # name and part
    repeated = {}
    for split in reversed(PARTS):
        for sample in samples.get(split, ()):
            if sample.name in usable:
                digest = hashlib.sha256(sample.image_path.read_bytes()).digest()
                name, part = found.setdefault(digest, (sample.name, PARTS[split]))
                if part != PARTS[split] and name != sample.name:  # a name in two of them is a fault of its own
                    repeated[sample.name] = f"the same bytes as {name!r} of {part!r}"
    return repeated


def _pixel_faults(sample: Sample) -> Faults:
    """The faults of a sample that its pixels show, and marks outside of them."""
    name, faults, (height, width) = sample.name, Faults(), sample.size
    try:
        _ = sample.image  # decoded for its errors alone
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
    try:
        _ = sample.density_path and sample.density
    except DataError as error:
        faults.add("bad-density", f"{DENSITIES}/{sample.density_path.name}", name, str(error.__cause__))
    return faults
