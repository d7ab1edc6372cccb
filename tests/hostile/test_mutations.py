"""Random damage to a sound root: what `check` calls clean opens and trains; nothing else ends it, hangs, or is silent.

`MUTATIONS=2000 python -m pytest tests/hostile/test_mutations.py` tries so many, other ones each time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as for_all
from hypothesis import strategies as st
from PIL import Image
from small_root import NAMES, SIZE, edit, make_root

from fsc147lib.data import FSC147, DataError, check, open_split
from fsc147lib.data.faults import ANNOTATIONS, CLASSES, IMAGES, SPLITS
from fsc147lib.model.collate import Collate
from fsc147lib.model.device import choose_compute
from fsc147lib.model.load import load_model
from fsc147lib.training.losses import DualLoss
from fsc147lib.training.step import TrainingStep, make_accelerator, make_optimizer

pytestmark = pytest.mark.medium

CASES = int(os.environ.get("MUTATIONS", 0))
cases = settings(
    max_examples=CASES or 100, derandomize=not CASES, deadline=None, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
FILES = [ANNOTATIONS, SPLITS, CLASSES]
IMAGE_NAMES = [name for split in ("train", "val", "test") for name in NAMES[split]]
NUMBERS = st.one_of(
    st.floats(-20, 120), st.integers(-5, 120), st.sampled_from([0, 1e9, -1e9, 1e308, 10**30, 0.1]), st.floats()
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=8), st.sampled_from([*IMAGE_NAMES, "train", "val"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


# --- What is done to a root: functions of Hypothesis's draw and the root


def change_value(draw, root):
    """A value anywhere in the JSON is another, or gone; a name or key is another."""
    path = root / draw(st.sampled_from([ANNOTATIONS, ANNOTATIONS, SPLITS]))
    try:
        whole = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    places, found = [], [whole]
    while found:
        container = found.pop()
        keys = list(container if isinstance(container, dict) else range(len(container)))
        places += [(container, key) for key in keys]
        found += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    container, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["other", "number", "gone", "more", "key"]))
    if kind in ("other", "number"):
        container[key] = draw(NUMBERS if kind == "number" else VALUES)
    elif kind == "gone":
        del container[key]
    elif isinstance(container, list):
        container.insert(key, draw(VALUES) if kind == "more" else container[key])
    else:
        value = draw(VALUES) if kind == "more" else container.pop(key)
        container[draw(st.one_of(st.text(max_size=6), st.sampled_from([*IMAGE_NAMES, "H", "test_coco"])))] = value
    path.write_text(json.dumps(whole))


def change_bytes(draw, root):
    """A file is cut short, or some of its bytes are others."""
    files = [*FILES, *(f"{IMAGES}/{name}" for name in IMAGE_NAMES)]
    path = root / draw(st.sampled_from(files))
    if not path.is_file():
        return
    content = bytearray(path.read_bytes())
    at = draw(st.integers(0, len(content)))
    if draw(st.booleans()):
        content[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    else:
        del content[at:]
    path.write_bytes(content)


def change_picture(draw, root):
    """An image is another, of any mode, size and format."""
    path = root / IMAGES / draw(st.sampled_from(IMAGE_NAMES))
    side = st.one_of(st.integers(1, 200), st.just(SIZE[0]), st.just(SIZE[1]), st.sampled_from([1, 2, 15, 3000]))
    size = draw(st.sampled_from([SIZE[::-1]])) if draw(st.booleans()) else (draw(side), draw(side))
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"]))
    grey = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, size[::-1], dtype=np.uint8)
    image = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    try:
        path.unlink()
        image.save(
            path, draw(st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "ICO", "EPS", "PCX"]))
        )
    except (OSError, ValueError):
        path.write_bytes(b"")  # this format has no such mode


def change_kind(draw, root):
    """A file or folder is a pipe, a folder, a link, empty, or gone."""
    paths = [*FILES, IMAGES, f"{IMAGES}/1.jpg", f"{IMAGES}/4.jpg", f"{IMAGES}/3.png"]
    path, away = root / draw(st.sampled_from(paths)), root.parent / "away"
    if os.path.lexists(path) and not os.path.lexists(away) and not os.path.lexists(root / "kept"):
        path.rename(away)
        kind = draw(st.sampled_from(["pipe", "folder", "empty", "gone", "out", "circle", "in", "nowhere"]))
        if kind == "in":
            away.rename(root / "kept")
        targets = {"out": away, "circle": path, "in": root / "kept", "nowhere": root / "x"}
        if kind in targets:
            path.symlink_to(targets[kind])
        elif kind != "gone":
            {"pipe": os.mkfifo, "folder": Path.mkdir, "empty": Path.touch}[kind](path)


def copy_image(draw, root):
    """One image's bytes, or its name in a split, are there a second time."""
    one, other = draw(st.sampled_from(IMAGE_NAMES)), draw(st.sampled_from(IMAGE_NAMES))
    if draw(st.booleans()):
        if (root / IMAGES / one).is_file() and one != other:
            shutil.copy(root / IMAGES / one, root / IMAGES / other, follow_symlinks=True)
        return
    split = draw(st.sampled_from(["train", "val", "test", "val_coco", "test_coco", "extra"]))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        edit(root, SPLITS, lambda splits: splits.setdefault(split, []).append(one))


MUTATIONS = [change_value, change_bytes, change_picture, copy_image, change_kind]  # pipes last: the others would wait


# --- What a clean root is, read without the library


def no_repeats(pairs):
    assert len(dict(pairs)) == len(pairs), "a key twice"
    return dict(pairs)


def assert_sound(root):
    """The root says what FSC147's layout asks for; returns the splits."""
    real = root.resolve()
    splits, entries = (
        json.loads((root / f).read_text("utf-8-sig"), object_pairs_hook=no_repeats) for f in (SPLITS, ANNOTATIONS)
    )
    assert splits["train"] and splits["val"]
    lines = [line.split("\t", 1) for line in (root / CLASSES).read_text("utf-8-sig").splitlines() if line.strip()]
    categories = no_repeats([(name.strip(), category.strip()) for name, category in lines])
    part_of, bytes_of = {}, {}
    for split, names in splits.items():
        assert len(set(names)) == len(names)
        for name in names:
            path, entry = root / IMAGES / name, entries[name]
            assert path.parent == root / IMAGES and path.resolve().is_relative_to(real)
            assert stat.S_ISREG(path.stat().st_mode)
            with Image.open(path) as image:
                image.load()
                width, height = image.size
            assert max(width, height) <= 200 * min(width, height)
            part = split.removesuffix("_coco")
            if part in ("train", "val", "test"):
                assert part_of.setdefault(name, part) == part
                assert bytes_of.setdefault(hashlib.md5(path.read_bytes()).digest(), part) == part
            for x, y in entry["points"]:
                assert 0 <= x <= width and 0 <= y <= height and bool not in (type(x), type(y))
            if {"H", "ratio_h"} <= entry.keys():
                assert abs(entry["H"] * entry["ratio_h"] - height) <= 1
            assert 0 < len(categories[name]) <= 100 and "<" not in categories[name]
        for sample in FSC147(root, split):
            assert sample.points.tolist() == np.float32(entries[sample.name]["points"]).tolist()
            assert sample.category == categories[sample.name]
        assert [sample.name for sample in FSC147(root, split)] == names
    return splits


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("pristine") / "root")


@pytest.fixture(scope="module")
def step():
    """A training step of the tiny model, whose weights stay; and its collate."""
    model, compute = load_model("tiny-random"), choose_compute("fp32")
    optimizer = make_optimizer(model.network, learning_rate=0.0)
    made = TrainingStep(DualLoss(model.network), optimizer, make_accelerator(compute), compute)
    return made, Collate(model.tokenizer, model.image_processor)


def use(root, split, step, train):
    """Open a split and make a batch of it; and train on it."""
    samples = open_split(root, split)
    training_step, collate = step
    batch = collate([*samples, samples[0].flipped()])
    for sample in samples:
        assert sample.target.sum() == (pytest.approx(1, abs=1e-4) if sample.count else 0) and (sample.target >= 0).all()
    if train:
        training_step([batch], 0.1)
        training_step.check()  # finite


@cases
@for_all(data=st.data())
def test_what_check_calls_clean_opens_and_trains(pristine, step, restart_clock, data):
    restart_clock()
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(pristine, Path(folder) / "root")
        chosen = data.draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3))
        for mutate in sorted(chosen, key=MUTATIONS.index):
            mutate(data.draw, root)
        train = data.draw(st.sampled_from([False, False, False, True]))
        report = check(root)
        str(report).encode()
        json.dumps(report.to_dict(), allow_nan=False)
        fatal = any(fault.fatal for fault in report.faults)
        if report.clean:
            assert_sound(root)
        for split in ("train", "val"):
            try:
                use(root, split, step, train and split == "train")
            except DataError as error:
                assert fatal, f"refused, but no fatal fault: {error}\n{report}"
