"""A sound root of six small pictures, to be damaged."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fsc147lib.data.faults import ANNOTATIONS, CLASSES, IMAGES, SPLITS

SIZE = (64, 96)  # height, width
NAMES = {"train": ["1.jpg", "2.jpg", "3.png"], "val": ["4.jpg", "5.jpg"], "test": ["6.jpg"], "val_coco": ["5.jpg"]}


def make_root(root: Path) -> Path:
    """Write it: distinct pictures with two to seven dots and a box each."""
    (root / IMAGES).mkdir(parents=True)
    entries, rng = {}, np.random.default_rng(0)
    for i, name in enumerate([*NAMES["train"], *NAMES["val"], *NAMES["test"]]):
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / IMAGES / name)
        points = rng.uniform((4, 4), (SIZE[1] - 4, SIZE[0] - 4), (2 + i, 2)).round(2).tolist()
        box = [[20, 10], [20, 30], [50, 30], [50, 10]]
        entries[name] = {"points": points, "box_examples_coordinates": [box], "H": SIZE[0], "ratio_h": 1.0}
    (root / ANNOTATIONS).write_text(json.dumps(entries))
    (root / SPLITS).write_text(json.dumps(NAMES))
    (root / CLASSES).write_text("".join(f"{name}\tsea shells\n" for name in entries))
    return root


def edit(root: Path, file: str, change) -> None:
    """Read a JSON file of a root, let `change` alter it in place, and write it back."""
    value = json.loads((root / file).read_text())
    change(value)
    (root / file).write_text(json.dumps(value))
