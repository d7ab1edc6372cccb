import hashlib

import numpy as np
import pytest
from PIL import Image

from fsc147lib.data.fsc147 import FSC147, check
from fsc147lib.data.scenes import CATEGORIES, COUNTS, HEIGHT, draw_scene, make_dataset


def digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    first = make_dataset(tmp_path / "a", 3, 2, 2, seed=5, workers=1)
    second = make_dataset(tmp_path / "b", 3, 2, 2, seed=5, workers=2)
    other = make_dataset(tmp_path / "c", 3, 2, 2, seed=6, workers=2)
    assert digests(first) == digests(second)
    assert digests(first) != digests(other)


def test_a_drawn_root_is_clean_and_has_all_splits(root):
    report = check(root)
    assert report.clean, str(report)
    assert {name: row["images"] for name, row in report.splits.items() if "coco" not in name} == {
        "train": 24, "val": 8, "test": 8,
    }  # fmt: skip
    for split in ("val", "test"):
        apples = {s.name for s in FSC147(root, split) if s.category == "apples"}
        assert {s.name for s in FSC147(root, f"{split}_coco")} == apples


def test_scenes_are_within_their_limits_and_vary():
    scenes = [draw_scene(np.random.default_rng(i)) for i in range(12)]
    assert all(image.height == HEIGHT for image, _ in scenes)
    assert len({image.width for image, _ in scenes}) > 2
    assert len({scene["category"] for _, scene in scenes}) > 3
    for image, scene in scenes:
        assert COUNTS[0] <= len(scene["points"]) <= COUNTS[1]
        assert (scene["points"] >= 0).all() and (scene["points"] <= [image.width, HEIGHT]).all()
        assert scene["boxes"].shape == (3, 4)
        centre = scene["points"][:3]  # the exemplars are the first three objects
        assert (scene["boxes"][:, :2] < centre).all() and (centre < scene["boxes"][:, 2:]).all()


def test_dots_lie_on_objects_of_the_counted_category(root):
    """At a dot the picture looks like its category: its hue is nearer to that colour than to most others."""
    colours = {c.name: c.colour for c in CATEGORIES}

    def hue(rgb):
        rgb = np.asarray(rgb, dtype=float)
        return (rgb - rgb.mean(axis=-1, keepdims=True)) / (
            np.linalg.norm(rgb - rgb.mean(axis=-1, keepdims=True)) + 1e-9
        )

    right = []
    for sample in FSC147(root, "train"):
        if sample.category == "hex nuts":  # grey, with a hole where the dot is
            continue
        pixels = np.asarray(sample.image.resize((sample.size[1] // 4, sample.size[0] // 4), Image.Resampling.BOX))
        for x, y in sample.points:
            seen = hue(pixels[min(int(y) // 4, len(pixels) - 1), min(int(x) // 4, pixels.shape[1] - 1)])
            scores = {name: float(seen @ hue(c)) for name, c in colours.items() if name != "hex nuts"}
            right.append(sorted(scores, key=scores.get).index(sample.category) >= len(scores) - 2)
    assert np.mean(right) > 0.9


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        make_dataset(tmp_path, 1, 1, 1)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--val is 0"):
        make_dataset(tmp_path / "x", 1, 0, 1)
    assert not (tmp_path / "x").exists()
