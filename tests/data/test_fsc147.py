"""Reading a root, its faults one at a time, and the real annotations where they lie beside the project."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_root import NAMES, SIZE, edit, make_root

from fsc147lib.data import FSC147, DataError, check, density_map, target_heatmap
from fsc147lib.data.faults import ANNOTATIONS, CLASSES, IMAGES, SPLITS
from fsc147lib.data.fsc147 import split_counts

REAL = Path(__file__).resolve().parents[3] / "shared" / "fsc147"
BOX = [[20, 10], [20, 30], [50, 30], [50, 10]]  # FSC147's order of corners


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "FSC147")


def edit_entry(root, **fields):
    edit(root, ANNOTATIONS, lambda entries: entries["1.jpg"].update(fields))


def replace_text(root, file, old, new):
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))


# Reading


def test_splits_are_lists_of_samples_as_annotated(root):
    assert {split: [s.name for s in FSC147(root, split)] for split in NAMES} == NAMES
    samples = FSC147(str(root))
    assert (samples.root, samples.split, samples.categories) == (root, "train", ["sea shells"])
    assert len(samples) == 3 and samples[-1] is samples[2] and isinstance(samples[:], list)
    sample, raw = samples[0], json.loads((root / ANNOTATIONS).read_text())["1.jpg"]
    assert sample.count == 2 and sample.category == "sea shells" and sample.image_path == root / IMAGES / "1.jpg"
    assert sample.points.dtype == sample.boxes.dtype == np.float32
    np.testing.assert_allclose(sample.points, raw["points"], atol=1e-5)
    np.testing.assert_array_equal(sample.boxes, [[20, 10, 50, 30]])


def test_an_image_is_decoded_when_asked_for_as_it_is_stored(root):
    sample, exif = FSC147(root)[0], Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", SIZE[::-1], 77).save(sample.image_path, exif=exif)
    assert sample.image.mode == "RGB" and sample.image.size == SIZE[::-1] and sample.size == SIZE
    assert sample.image.getpixel((0, 0)) == (77, 77, 77)


def test_density_and_target_are_the_dots(root):
    sample = FSC147(root)[2]
    np.testing.assert_array_equal(sample.density, density_map(sample.points, SIZE).astype(np.float32))
    np.testing.assert_array_equal(sample.target, target_heatmap(sample.points, SIZE))
    assert sample.target is sample.target  # computed once


def test_the_official_density_maps_are_not_read(root):
    (root / "gt_density_map_adaptive_384_VarV2").mkdir()
    np.save(root / "gt_density_map_adaptive_384_VarV2" / "1.npy", np.ones(SIZE))
    assert check(root).clean and FSC147(root)[0].density.sum() == pytest.approx(2, abs=1e-4)


def test_flipped(root):
    sample = FSC147(root)[0]
    mirror = pickle.loads(pickle.dumps(sample.flipped()))  # as it goes to a process that reads images
    np.testing.assert_allclose(mirror.points, [[SIZE[1] - x, y] for x, y in sample.points], atol=1e-4)
    np.testing.assert_array_equal(mirror.boxes, [[SIZE[1] - 50, 10, SIZE[1] - 20, 30]])
    np.testing.assert_array_equal(np.asarray(mirror.image), np.asarray(sample.image)[:, ::-1])
    np.testing.assert_allclose(mirror.target, target_heatmap(mirror.points, SIZE), atol=1e-6)
    np.testing.assert_allclose(mirror.density, sample.density[:, ::-1], atol=1e-6)
    assert (mirror.count, mirror.size, mirror.name) == (sample.count, sample.size, sample.name)
    assert sample.flipped().flipped() is sample


def test_annotations_without_images(root):
    shutil.rmtree(root / IMAGES)
    edit(root, ANNOTATIONS, lambda entries: entries.pop("2.jpg"))  # names without one are left out
    sample, other = FSC147(root, images=False)
    assert (sample.name, sample.count, other.name) == ("1.jpg", 2, "3.png") and split_counts(root) == [2, 4]
    for attribute in ("image", "size", "density", "target"):
        with pytest.raises(DataError, match=r"1\.jpg.*(?s:.)*put a sound copy of the image there"):
            getattr(sample, attribute)
    with pytest.raises(DataError, match=IMAGES):
        FSC147(root)
    edit(root, SPLITS, lambda splits: splits.update(val=[]))
    assert split_counts(root, "val") == split_counts(root, "nowhere") == []


def test_a_scene_without_objects_is_a_sample(root):
    edit_entry(root, points=[])
    edit(root, ANNOTATIONS, lambda entries: entries["1.jpg"].pop("box_examples_coordinates"))
    report, sample = check(root), FSC147(root)[0]
    assert report.clean and report.splits["train"]["empty"] == 1 and report.splits["train"]["min"] == 0
    for shown in (sample, sample.flipped()):
        assert (shown.count, shown.points.shape, shown.boxes.shape) == (0, (0, 2), (0, 4))
        assert shown.density.shape == SIZE and not shown.density.any()
        assert shown.target.shape == (14, 14) and not shown.target.any()


def test_a_root_of_ones_own_needs_no_class_file_no_test_split_and_no_boxes(root):
    for part in (root / CLASSES, root / IMAGES / "6.jpg"):
        part.unlink()
    (root / SPLITS).write_text(json.dumps({split: NAMES[split] for split in ("train", "val")}))
    (root / ANNOTATIONS).write_text(json.dumps({n: {"points": [[1, 2]]} for n in NAMES["train"] + NAMES["val"]}))
    assert check(root, "apples").clean
    assert [(s.category, s.count, len(s.boxes)) for s in FSC147(root, category="apples")] == [("apples", 1, 0)] * 3
    with pytest.raises(DataError, match="--category") as error:
        FSC147(root)
    assert "LearningToCountEverything" not in str(error.value)  # it is this one file that is missing
    with pytest.raises(DataError, match="name what to count"):
        FSC147(root, category="<|im_end|>")


def test_missing_root_says_what_to_download(tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(DataError) as error:
            FSC147(root)
        for part in (
            str(root),
            "FSC147_384_V2",
            "https://github.com/cvlab-stonybrook/LearningToCountEverything",
            SPLITS,
        ):
            assert part in str(error.value)
        assert [fault.kind for fault in check(root).faults] == ["missing-file"]


def test_faults_of_another_split_do_not_matter_when_opening(root):
    with pytest.raises(DataError, match="'train', 'val', 'test', 'val_coco'"):
        FSC147(root, "valid")
    edit(root, ANNOTATIONS, lambda entries: (entries.pop("6.jpg"), entries["4.jpg"].update(points=3)))
    (root / IMAGES / "5.jpg").unlink()
    assert len(FSC147(root, "train")) == 3
    for split in ("val", "test", "val_coco"):
        with pytest.raises(DataError):
            FSC147(root, split)


# Faults, one at a time


def truncate(root):
    (root / IMAGE).write_bytes((root / IMAGE).read_bytes()[:-400])


def append(path, text):
    path.write_text(path.read_text() + text)


def rename(root, name):
    """Call the first training image by another name in split and annotations."""
    edit(root, SPLITS, lambda splits: splits.update(train=[name, "2.jpg", "3.png"]))
    edit(root, ANNOTATIONS, lambda entries: entries.update({name: entries.pop("1.jpg")}))


IMAGE = f"{IMAGES}/1.jpg"
A, S, C = ANNOTATIONS, SPLITS, CLASSES
PAIR = [1.0, 2.0]

# what is done to the root, then the fault's kind, file and entry
FATAL = {
    "annotation file missing": (lambda r: (r / A).unlink(), "missing-file", A, A),
    "split file missing": (lambda r: (r / S).unlink(), "missing-file", S, S),
    "class file missing": (lambda r: (r / C).unlink(), "missing-file", C, C),
    "image folder missing": (lambda r: shutil.rmtree(r / IMAGES), "missing-file", IMAGES, IMAGES),
    "annotations cut short": (lambda r: (r / A).write_text('{\n "1.jpg": {'), "broken-file", A, A),
    "splits not JSON": (lambda r: (r / S).write_text("train"), "broken-file", S, S),
    "annotations not text": (lambda r: (r / A).write_bytes(b"\xff\xfe\x80"), "broken-file", A, A),
    "classes not text": (lambda r: (r / C).write_bytes(b"1.jpg\t\xff\xfe"), "broken-file", C, C),
    "annotations nested too deep": (lambda r: (r / A).write_text("[" * 200_000), "broken-file", A, A),
    "annotations a list": (lambda r: (r / A).write_text("[]"), "broken-file", A, A),
    "entry twice": (lambda r: replace_text(r, A, "{", '{"1.jpg": {},'), "broken-file", A, A),
    "key of an entry twice": (lambda r: replace_text(r, A, '"H"', '"points": [],"H"'), "broken-file", A, A),
    "split twice": (lambda r: replace_text(r, S, "{", '{"train": [],'), "broken-file", S, S),
    "split an object": (lambda r: edit(r, S, lambda s: s.update(train={})), "bad-split", S, "train"),
    "split of numbers": (lambda r: edit(r, S, lambda s: s.update(train=[1])), "bad-split", S, "train"),
    "name twice in a split": (lambda r: edit(r, S, lambda s: s["train"].append("1.jpg")), "duplicate-name", S, "1.jpg"),
    "name in train and val": (lambda r: edit(r, S, lambda s: s["val"].append("1.jpg")), "duplicate-name", S, "1.jpg"),
    "not annotated": (lambda r: edit(r, A, lambda e: e.pop("1.jpg")), "no-annotation", A, "1.jpg"),
    "image missing": (lambda r: (r / IMAGE).unlink(), "unreadable-image", IMAGE, "1.jpg"),
    "no image at all": (lambda r: (r / IMAGE).write_bytes(b"<html>404</html>"), "unreadable-image", IMAGE, "1.jpg"),
    "image a folder": (lambda r: ((r / IMAGE).unlink(), (r / IMAGE).mkdir()), "unreadable-image", IMAGE, "1.jpg"),
    "height disagrees": (lambda r: edit_entry(r, H=SIZE[0] + 2), "size-mismatch", IMAGE, "1.jpg"),
    "width disagrees": (lambda r: edit_entry(r, W=2 * SIZE[1], ratio_w=0.6), "size-mismatch", IMAGE, "1.jpg"),
    "entry a list": (lambda r: edit(r, A, lambda e: e.update({"1.jpg": []})), "bad-annotation", A, "1.jpg"),
    "no points": (lambda r: edit(r, A, lambda e: e["1.jpg"].pop("points")), "bad-annotation", A, "1.jpg"),
} | {
    f"size {size!r:.20}": (lambda r, size=size: edit_entry(r, H=size), "size-mismatch", IMAGE, "1.jpg")
    for size in ("big", float("nan"), 10**400)
} | {
    f"unsafe name {name!r}": (lambda r, name=name: rename(r, name), "unsafe-name", S, name)
    for name in ("../x.jpg", "/etc/x.jpg", "a\\x.jpg", "C:x.jpg", "sub/1.jpg", "..", "", "a\x00.jpg", "\ud800.jpg")
} | {
    f"points {points!r:.30}": (lambda r, points=points: edit_entry(r, points=points), "bad-annotation", A, "1.jpg")
    for points in (None, "x", {}, [1, 2], [[]], [[1]], [[1, 2, 3]], [PAIR, "ab"], [[1, "2"]], [[True, 2]], [[1, None]],
                   [[[1], 2]], [[float("nan"), 1]], [[float("inf"), 1]], [[1, 10**400]], [[1, -1e300]])
} | {
    f"boxes {boxes!r:.30}": (
        lambda r, boxes=boxes: edit_entry(r, box_examples_coordinates=boxes), "bad-annotation", A, "1.jpg")
    for boxes in (None, 3, [PAIR], [[PAIR] * 3], [[PAIR] * 5], [[[1]] * 4], [[PAIR] * 3 + [[1, False]]])
}  # fmt: skip

FATAL_IN_CHECK = {
    "truncated image": (truncate, "unreadable-image", IMAGE, "1.jpg"),
    "unsafe name in no split": (
        lambda r: edit(r, A, lambda e: e.update({"../x.jpg": {}})), "unsafe-name", A, "../x.jpg"),
}  # fmt: skip

NOT_FATAL = {
    "dot right of the image": (lambda r: edit_entry(r, points=[[SIZE[1] + 0.5, 9], PAIR]), "dot-outside", A, "1.jpg"),
    "dot above the image": (lambda r: edit_entry(r, points=[[5, -1], PAIR]), "dot-outside", A, "1.jpg"),
    "box outside": (lambda r: edit_entry(r, box_examples_coordinates=[BOX[:2] + [[99, 9]] * 2]), "bad-box", A, "1.jpg"),
    "box without area": (lambda r: edit_entry(r, box_examples_coordinates=[[PAIR] * 4]), "bad-box", A, "1.jpg"),
    "image in no split": (
        lambda r: shutil.copy(r / IMAGE, r / IMAGES / "9.jpg"), "unlisted", f"{IMAGES}/9.jpg", "9.jpg"),
    "annotation in no split": (lambda r: edit(r, A, lambda e: e.update({"9.jpg": {}})), "unlisted", A, "9.jpg"),
    "no category": (lambda r: replace_text(r, C, "1.jpg\tsea shells\n", ""), "no-category", C, "1.jpg"),
    "class line without tab": (lambda r: append(r / C, "9.jpg beads\n"), "bad-class-line", C, "line 7"),
    "a thought in a category": (lambda r: append(r / C, "9.jpg\t<think>\n"), "bad-class-line", C, "line 7"),
    "class line without class": (lambda r: append(r / C, "\n9.jpg\t\n"), "bad-class-line", C, "line 8"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case, fatal, opens",
    [(case, True, False) for case in FATAL.values()]
    + [(case, True, True) for case in FATAL_IN_CHECK.values()]
    + [(case, False, True) for case in NOT_FATAL.values()],
    ids=[ascii(key) for key in FATAL | FATAL_IN_CHECK | NOT_FATAL],
)
def test_a_fault_is_reported_and_keeps_the_split_shut_if_it_is_fatal(root, case, fatal, opens):
    damage, kind, file, entry = case
    damage(root)
    report = check(root)
    (fault,) = [f for f in report.faults if opens or f.kind != "unlisted"]  # an image that is used no longer
    assert (fault.kind, fault.file, fault.entry, fault.fatal) == (kind, file, entry, fatal), str(report)
    assert kind in str(report) and fault.cure in str(report) and not report.clean
    str(report).encode("utf-8")  # what a terminal does
    assert kind in {fault["kind"] for fault in json.loads(json.dumps(report.to_dict()))["faults"]}
    if opens:
        assert len(FSC147(root)) == 3
        return
    with pytest.raises(DataError) as error:
        FSC147(root)
    assert all(part in str(error.value) for part in (file, repr(entry), fault.problem, fault.cure))


def test_what_is_damaged_behind_a_header_raises_when_read(root):
    truncate(root)
    with pytest.raises(DataError, match=r"1\.jpg.*(?s:.)*Cure: put a sound copy of the image there"):
        _ = FSC147(root)[0].image


def test_the_report_of_a_clean_root(root):
    report = check(root)
    expected = {"images": 3, "empty": 0, "categories": 1, "min": 2, "median": 3, "mean": 3, "max": 4}
    assert report.clean and report.faults == [] and report.splits["train"] == expected
    assert list(report.splits) == list(NAMES)
    assert "train: images 3, empty 0, categories 1, min 2" in str(report) and "0 faults" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["clean"] is True


def test_many_faults_of_a_kind_are_counted_and_a_few_shown(root):
    edit(root, SPLITS, lambda splits: splits["train"].extend(f"lost{i}.jpg" for i in range(20)))
    with pytest.raises(DataError) as error:
        FSC147(root)
    for message in (str(error.value), str(check(root))):
        assert "no-annotation (20, fatal)" in message and "... and 15 more" in message
        assert "lost0.jpg" in message and "lost9.jpg" not in message


# The real annotations


@pytest.mark.medium
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real annotations at {REAL}")
def test_real_annotations():
    train, val = (FSC147(REAL, split, images=False) for split in ("train", "val"))
    assert (len(train), len(val), len(FSC147(REAL, "val_coco", images=False))) == (2323, 1286, 277)
    counts, exemplars = [s.count for s in [*train, *val]], [len(s.boxes) for s in [*train, *val]]
    assert (min(counts), max(counts)) == (7, 2092)  # FSC147's 3,701 is in what this copy leaves out
    assert (min(exemplars), max(exemplars)) == (3, 6)
    assert np.mean([s.count for s in val]) == pytest.approx(63.796, abs=1e-3)
    assert not set(train.categories) & set(val.categories)
    report = check(REAL)
    assert {fault.kind for fault in report.faults} == {"missing-file", "no-annotation"}  # no images; a part only
    assert sum(fault.kind == "no-annotation" for fault in report.faults) == (3659 - 2323) + 1190
