"""Reading a root, its faults one at a time, and the real annotations where they lie beside the project."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsc147lib.data import fsc147 as data
from fsc147lib.data.checking import check
from fsc147lib.data.fsc147 import FSC147, DataError
from fsc147lib.data.targets import density_map, target_heatmap

REAL = Path(__file__).resolve().parents[3] / "shared" / "fsc147"
SIZE = (96, 144)  # height, width
SPLITS = {
    "train": ["1.jpg", "2.jpg"], "val": ["3.jpg", "4.jpg"], "test": ["5.jpg"],
    "val_coco": ["4.jpg"], "test_coco": ["5.jpg"],
}  # fmt: skip
BOX = [[20, 10], [20, 30], [50, 30], [50, 10]]  # FSC147's order of corners


def write_json(root, file, value):
    (root / file).write_text(json.dumps(value))


def edit(root, file, change):
    """Read a JSON file of a root, let `change` alter it in place, and write it back."""
    value = json.loads((root / file).read_text())
    change(value)
    write_json(root, file, value)


def edit_entry(root, **fields):
    edit(root, data.ANNOTATIONS, lambda entries: entries["1.jpg"].update(fields))


def replace_text(root, file, old, new):
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))


@pytest.fixture
def root(tmp_path):
    """A clean official root of five images, their sizes declared and no density files."""
    root = tmp_path / "FSC147"
    (root / data.IMAGES).mkdir(parents=True)
    entries, rng = {}, np.random.default_rng(0)
    for number in range(1, 6):
        points = rng.uniform((5, 5), (SIZE[1] - 5, SIZE[0] - 5), (6 + number, 2)).round(2)
        image = Image.new("RGB", SIZE[::-1], (30 * number, 90, 60))
        for x, y in points:
            ImageDraw.Draw(image).ellipse((x - 4, y - 4, x + 4, y + 4), fill=(250, 220, 10))
        image.save(root / data.IMAGES / f"{number}.jpg", quality=95)
        entries[f"{number}.jpg"] = {
            "H": 2 * SIZE[0], "W": 2 * SIZE[1], "ratio_h": 0.5, "ratio_w": 0.5,
            "box_examples_coordinates": [BOX] * (2 + number if number < 5 else 3), "points": points.tolist(),
        }  # fmt: skip
    write_json(root, data.ANNOTATIONS, entries)
    write_json(root, data.SPLITS, SPLITS)
    (root / data.CLASSES).write_text("".join(f"{n}.jpg\t{'sea shells' if n % 2 else 'apples'}\n" for n in range(1, 6)))
    return root


# Reading


def test_splits_and_sequence(root):
    assert {split: [s.name for s in FSC147(root, split)] for split in SPLITS} == SPLITS
    samples = FSC147(str(root))
    assert (samples.root, samples.split, samples.categories) == (root, "train", ["apples", "sea shells"])
    assert len(samples) == 2 and samples[-1] is samples[1] and samples[0].category == "sea shells"
    assert [s.name for s in samples[:1]] == ["1.jpg"] and isinstance(samples[:], list)
    for index in (2, -3):
        with pytest.raises(IndexError):
            samples[index]


def test_sample_fields(root):
    sample = FSC147(root)[0]
    raw = json.loads((root / data.ANNOTATIONS).read_text())["1.jpg"]
    assert sample.count == 7 and sample.points.dtype == sample.boxes.dtype == np.float32
    np.testing.assert_allclose(sample.points, raw["points"], atol=1e-5)
    np.testing.assert_array_equal(sample.boxes, [[20, 10, 50, 30]] * 3)
    assert sample.image_path == root / data.IMAGES / "1.jpg" and sample.density_path is None
    assert [len(s.boxes) for split in ("train", "val", "test") for s in FSC147(root, split)] == [3, 4, 5, 6, 3]


def test_image_is_decoded_when_asked_for_and_not_kept(root):
    sample = FSC147(root)[0]
    assert sample.image.mode == "RGB" and sample.image.size == SIZE[::-1] and sample.size == SIZE
    Image.new("L", SIZE[::-1], 77).save(sample.image_path)
    assert sample.image.getpixel((0, 0)) == (77, 77, 77)


def test_exif_orientation_is_ignored(root):
    sample = FSC147(root)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", SIZE[::-1]).save(sample.image_path, exif=exif)
    assert sample.size == SIZE and sample.image.size == SIZE[::-1]


def test_density_from_dots_and_from_file(root):
    sample = FSC147(root)[0]
    np.testing.assert_array_equal(sample.density, density_map(sample.points, SIZE).astype(np.float32))
    (root / data.DENSITIES).mkdir()
    official = np.random.default_rng(1).random(SIZE)
    np.save(root / data.DENSITIES / "1.npy", official)
    first, second = FSC147(root)
    assert first.density.dtype == np.float32 and second.density_path is None
    np.testing.assert_array_equal(first.density, official.astype(np.float32))
    np.testing.assert_array_equal(first.flipped().density, first.density[:, ::-1])
    assert check(root).clean


def test_target_is_computed_once_and_sums_to_one(root):
    sample = FSC147(root)[0]
    assert sample.target.shape == (14, 14) and sample.target.dtype == np.float32 and sample.target is sample.target
    assert sample.target.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(sample.target, target_heatmap(sample.points, SIZE))


def test_order_of_dots_does_not_matter(root):
    before = FSC147(root)[0]
    edit(root, data.ANNOTATIONS, lambda entries: entries["1.jpg"]["points"].reverse())
    after = FSC147(root)[0]
    assert not np.array_equal(before.points, after.points)
    np.testing.assert_allclose(after.density, before.density, atol=1e-6)
    np.testing.assert_allclose(after.target, before.target, atol=1e-6)


def test_flipped(root):
    sample = FSC147(root)[0]
    mirror = sample.flipped()
    np.testing.assert_allclose(mirror.points, [[SIZE[1] - x, y] for x, y in sample.points], atol=1e-4)
    np.testing.assert_array_equal(mirror.boxes, [[SIZE[1] - 50, 10, SIZE[1] - 20, 30]] * 3)
    np.testing.assert_array_equal(np.asarray(mirror.image), np.asarray(sample.image)[:, ::-1])
    np.testing.assert_array_equal(mirror.target, sample.target[:, ::-1])
    # the mirrored maps are those of the mirrored dots
    np.testing.assert_allclose(mirror.target, target_heatmap(mirror.points, SIZE), atol=1e-6)
    np.testing.assert_allclose(mirror.density, density_map(mirror.points, SIZE), atol=1e-5)
    assert (mirror.count, mirror.size, mirror.name) == (sample.count, sample.size, sample.name)


def test_flipped_twice_is_the_sample_itself(root):
    sample = FSC147(root)[0]
    assert sample.flipped().flipped() is sample


def test_samples_travel_to_worker_processes(root):
    sample = pickle.loads(pickle.dumps(FSC147(root)[0].flipped()))
    assert sample.flipped().image.size == sample.image.size == SIZE[::-1]


def test_annotations_without_images(root):
    shutil.rmtree(root / data.IMAGES)
    sample = FSC147(root, images=False)[0]
    assert sample.count == 7
    for attribute in ("image", "size", "density", "target"):
        with pytest.raises(DataError, match=r"1\.jpg.*(?s:.)*put a sound copy of the image there"):
            getattr(sample, attribute)
    with pytest.raises(DataError, match=data.IMAGES):
        FSC147(root)


def test_truncated_image_raises_when_read(root):
    truncate(root)
    with pytest.raises(DataError, match=r"1\.jpg.*(?s:.)*Cure: put a sound copy of the image there"):
        _ = FSC147(root)[0].image


def test_bad_density_raises_when_read(root):
    wrong_density(root)
    with pytest.raises(DataError, match=r"1\.npy.*\(3, 4\)(?s:.)*delete the file"):
        _ = FSC147(root)[0].density
    (root / IMAGE_1).unlink()
    with pytest.raises(DataError, match="unreadable-image"):
        _ = FSC147(root, images=False)[0].density


def test_reading_annotations_alone_leaves_out_names_without_one(root):
    edit(root, data.ANNOTATIONS, lambda entries: entries.pop("1.jpg"))
    assert [s.name for s in FSC147(root, images=False)] == ["2.jpg"]
    edit(root, data.ANNOTATIONS, lambda entries: entries["2.jpg"].update(points=None))
    with pytest.raises(DataError, match="bad-annotation"):
        FSC147(root, images=False)


def test_a_scene_without_objects_is_a_sample(root):
    edit_entry(root, points=[], box_examples_coordinates=[])
    report, sample = check(root), FSC147(root)[0]
    assert report.clean and report.splits["train"]["empty"] == 1 and report.splits["train"]["min"] == 0
    edit(root, data.ANNOTATIONS, lambda entries: entries["1.jpg"].pop("box_examples_coordinates"))
    for shown in (sample, sample.flipped(), FSC147(root)[0]):  # exemplars may be left out altogether
        assert (shown.count, shown.points.shape, shown.boxes.shape) == (0, (0, 2), (0, 4))
        assert shown.density.shape == SIZE and not shown.density.any()
        assert shown.target.shape == (14, 14) and not shown.target.any()


def test_counts_of_a_split_are_of_the_annotations_alone(root):
    (root / IMAGE_1).unlink()
    assert data.split_counts(root) == [7, 8]
    edit(root, data.SPLITS, lambda splits: splits.update(val=[]))
    assert data.split_counts(root, "val") == data.split_counts(root, "nowhere") == []


def test_a_root_of_ones_own_needs_no_class_file_no_test_split_and_no_boxes(root):
    (root / data.CLASSES).unlink()
    edit(root, data.SPLITS, lambda splits: [splits.pop(split) for split in ("test", "val_coco", "test_coco")])
    keep = {"1.jpg", "2.jpg", "3.jpg", "4.jpg"}
    write_json(root, data.ANNOTATIONS, {name: {"points": [[1, 2]]} for name in keep})
    (root / data.IMAGES / "5.jpg").unlink()
    assert check(root, "apples").clean
    assert [(s.category, s.count, len(s.boxes)) for s in FSC147(root, category="apples")] == [("apples", 1, 0)] * 2
    with pytest.raises(DataError, match="--category") as error:
        FSC147(root)
    assert "LearningToCountEverything" not in str(error.value)  # it is this one file that is missing
    with pytest.raises(DataError, match="name what to count"):
        FSC147(root, category="<|im_end|>")


def test_missing_root_says_what_to_download(tmp_path):
    with pytest.raises(DataError) as error:
        FSC147(tmp_path / "nowhere")
    for part in (
        str(tmp_path / "nowhere"), "FSC147_384_V2", "https://github.com/cvlab-stonybrook/LearningToCountEverything",
        data.ANNOTATIONS, data.SPLITS, data.CLASSES, data.IMAGES, data.DENSITIES, "├──",
    ):  # fmt: skip
        assert part in str(error.value)
    assert [fault.kind for fault in check(tmp_path / "nowhere").faults] == ["missing-file"]


def test_unknown_split_names_those_that_exist(root):
    with pytest.raises(DataError, match="'train', 'val', 'test', 'val_coco', 'test_coco'"):
        FSC147(root, "valid")


def test_faults_of_another_split_do_not_matter_when_opening(root):
    edit(root, data.ANNOTATIONS, lambda entries: entries.pop("5.jpg"))
    (root / data.IMAGES / "3.jpg").unlink()
    replace_text(root, data.ANNOTATIONS, '"4.jpg": {', '"4.jpg": {}, "4.jpg": {')
    assert len(FSC147(root, "train")) == 2
    for split in ("val", "test", "val_coco", "test_coco"):
        with pytest.raises(DataError):
            FSC147(root, split)


def test_one_error_counts_many_faults_and_shows_a_few(root):
    edit(root, data.SPLITS, lambda splits: splits["train"].extend(f"lost{i}.jpg" for i in range(20)))
    with pytest.raises(DataError) as error:
        FSC147(root)
    message = str(error.value)
    assert "no-annotation (20, fatal)" in message and "... and 15 more" in message
    assert "lost0.jpg" in message and "lost19.jpg" not in message and data.ANNOTATIONS in message


# Faults, one at a time


def truncate(root):
    path = root / data.IMAGES / "1.jpg"
    path.write_bytes(path.read_bytes()[:-400])


def wrong_density(root, name="1.npy", value=None):
    (root / data.DENSITIES).mkdir(exist_ok=True)
    np.save(root / data.DENSITIES / name, np.zeros((3, 4)) if value is None else value, allow_pickle=True)


def append(path, text):
    path.write_text(path.read_text() + text)


def rename(root, name):
    """Call the first training image by another name in split and annotations."""
    edit(root, data.SPLITS, lambda splits: splits.update(train=[name, "2.jpg"]))
    edit(root, data.ANNOTATIONS, lambda entries: entries.update({name: entries.pop("1.jpg")}))


def corners(**change):
    return [[list(corner) for corner in BOX], [[x + change.get("x", 0), y] for x, y in BOX]]


IMAGE_1 = f"{data.IMAGES}/1.jpg"
A, S, C = data.ANNOTATIONS, data.SPLITS, data.CLASSES
PAIR = [1.0, 2.0]

# what is done to the root, then the fault's kind, file and entry
FATAL_AT_OPENING = {
    "annotation file missing": (lambda r: (r / A).unlink(), "missing-file", A, A),
    "split file missing": (lambda r: (r / S).unlink(), "missing-file", S, S),
    "class file missing": (lambda r: (r / C).unlink(), "missing-file", C, C),
    "image folder missing": (lambda r: shutil.rmtree(r / data.IMAGES), "missing-file", data.IMAGES, data.IMAGES),
    "annotations cut short": (lambda r: (r / A).write_text('{\n "1.jpg": {'), "broken-file", A, "line 2, column 12"),
    "splits not JSON": (lambda r: (r / S).write_text("train"), "broken-file", S, "line 1, column 1"),
    "annotations not text": (lambda r: (r / A).write_bytes(b"\xff\xfe\x80"), "broken-file", A, A),
    "classes not text": (lambda r: (r / C).write_bytes(b"1.jpg\t\xff\xfe"), "broken-file", C, C),
    "annotations nested too deep": (lambda r: (r / A).write_text("[" * 200_000), "broken-file", A, A),
    "annotations a list": (lambda r: write_json(r, A, []), "broken-file", A, A),
    "splits a string": (lambda r: write_json(r, S, "train"), "broken-file", S, S),
    "split an object": (lambda r: edit(r, S, lambda s: s.update(train={})), "bad-split", S, "train"),
    "split of numbers": (lambda r: edit(r, S, lambda s: s.update(train=[1])), "bad-split", S, "train"),
    "name twice in a split": (lambda r: edit(r, S, lambda s: s["train"].append("1.jpg")), "duplicate-name", S, "1.jpg"),
    "name in train and val": (lambda r: edit(r, S, lambda s: s["val"].append("1.jpg")), "duplicate-name", S, "1.jpg"),
    "name in train and test": (lambda r: edit(r, S, lambda s: s["test"].append("1.jpg")), "duplicate-name", S, "1.jpg"),
    "entry twice": (lambda r: replace_text(r, A, "{", '{"1.jpg": {},'), "duplicate-key", A, "1.jpg"),
    "key of an entry twice": (lambda r: replace_text(r, A, '"H"', '"points": [],"H"'), "duplicate-key", A, "1.jpg"),
    "split twice": (lambda r: replace_text(r, S, "{", '{"train": [],'), "duplicate-key", S, "train"),
    "not annotated": (lambda r: edit(r, A, lambda e: e.pop("1.jpg")), "no-annotation", A, "1.jpg"),
    "image missing": (lambda r: (r / IMAGE_1).unlink(), "missing-image", IMAGE_1, "1.jpg"),
    "entry a list": (lambda r: edit(r, A, lambda e: e.update({"1.jpg": []})), "bad-annotation", A, "1.jpg"),
    "no points": (lambda r: edit(r, A, lambda e: e["1.jpg"].pop("points")), "bad-annotation", A, "1.jpg"),
} | {
    f"unsafe name {name!r}": (lambda r, name=name: rename(r, name), "unsafe-name", S, name)
    for name in ("../x.jpg", "/etc/x.jpg", "a\\x.jpg", "C:x.jpg", "sub/1.jpg", "..", "", "a\x00.jpg", "\ud800.jpg")
} | {
    f"points {points!r:.30}": (lambda r, points=points: edit_entry(r, points=points), "bad-annotation", A, "1.jpg")
    for points in (None, "x", {}, [1, 2], [[1]], [[1, 2, 3]], [PAIR, "ab"], [[1, "2"]], [[True, 2]], [[1, None]],
                   [[[1], 2]], [[float("nan"), 1]], [[float("inf"), 1]], [[1, 10**400]], [[1, -1e300]])
} | {
    f"boxes {boxes!r:.30}": (
        lambda r, boxes=boxes: edit_entry(r, box_examples_coordinates=boxes), "bad-annotation", A, "1.jpg")
    for boxes in (None, 3, [PAIR], [[PAIR] * 3], [[PAIR] * 5], [[[1]] * 4], [[PAIR] * 3 + [[1, False]]],
                  [[PAIR] * 3 + [[1, float("nan")]]], [[PAIR] * 3 + [["1", 2]]])
}  # fmt: skip

FATAL_IN_HEADER = {
    "no image at all": (lambda r: (r / IMAGE_1).write_bytes(b"<html>404</html>"), "unreadable-image", IMAGE_1, "1.jpg"),
    "image a folder": (lambda r: ((r / IMAGE_1).unlink(), (r / IMAGE_1).mkdir()), "unreadable-image", IMAGE_1, "1.jpg"),
    "height disagrees": (lambda r: edit_entry(r, H=2 * SIZE[0] + 4), "size-mismatch", IMAGE_1, "1.jpg"),
    "width disagrees": (lambda r: edit_entry(r, ratio_w=0.6), "size-mismatch", IMAGE_1, "1.jpg"),
    "size not a number": (lambda r: edit_entry(r, H="big"), "size-mismatch", IMAGE_1, "1.jpg"),
    "size not finite": (lambda r: edit_entry(r, H=float("nan")), "size-mismatch", IMAGE_1, "1.jpg"),
    "size enormous": (lambda r: edit_entry(r, ratio_h=10**400), "size-mismatch", IMAGE_1, "1.jpg"),
}  # fmt: skip

FATAL_IN_CHECK = {
    "truncated image": (truncate, "unreadable-image", IMAGE_1, "1.jpg"),
    "unsafe name in no split": (
        lambda r: edit(r, A, lambda e: e.update({"../x.jpg": {}})), "unsafe-name", A, "../x.jpg"),
}  # fmt: skip

NOT_FATAL = {
    "dot right of the image": (lambda r: edit_entry(r, points=[[SIZE[1] + 0.5, 9], PAIR]), "dot-outside", A, "1.jpg"),
    "dot above the image": (lambda r: edit_entry(r, points=[[5, -1], PAIR]), "dot-outside", A, "1.jpg"),
    "box outside": (lambda r: edit_entry(r, box_examples_coordinates=corners(x=SIZE[1])), "bad-box", A, "1.jpg"),
    "box without area": (lambda r: edit_entry(r, box_examples_coordinates=[[PAIR] * 4]), "bad-box", A, "1.jpg"),
    "density shape": (wrong_density, "bad-density", f"{data.DENSITIES}/1.npy", "1.jpg"),
    "density pickled": (
        lambda r: wrong_density(r, value=np.full(SIZE, None)), "bad-density", f"{data.DENSITIES}/1.npy", "1.jpg"),
    "image in no split": (
        lambda r: shutil.copy(r / IMAGE_1, r / data.IMAGES / "9.jpg"), "unlisted", f"{data.IMAGES}/9.jpg", "9.jpg"),
    "annotation in no split": (lambda r: edit(r, A, lambda e: e.update({"9.jpg": {}})), "unlisted", A, "9.jpg"),
    "no category": (lambda r: replace_text(r, C, "1.jpg\tsea shells\n", ""), "no-category", C, "1.jpg"),
    "class line without tab": (lambda r: append(r / C, "9.jpg beads\n"), "bad-class-line", C, "line 6"),
    "control tokens in a category": (
        lambda r: append(r / C, "9.jpg\t<|im_end|>beads\n"), "bad-class-line", C, "line 6"),
    "a thought in a category": (lambda r: append(r / C, "9.jpg\t<think>\n"), "bad-class-line", C, "line 6"),
    "class line without class": (lambda r: append(r / C, "\n9.jpg\t\n"), "bad-class-line", C, "line 7"),
}  # fmt: skip


def cases(table):
    return pytest.mark.parametrize("damage, kind, file, entry", table.values(), ids=[ascii(key) for key in table])


def found(root, kind, file, entry):
    """The one fault that `check` finds; also makes the texts, which must never fail."""
    report = check(root)
    assert [(f.kind, f.file, f.entry) for f in report.faults] == [(kind, file, entry)], str(report)
    assert kind in str(report) and report.faults[0].cure in str(report) and not report.clean
    assert json.loads(json.dumps(report.to_dict()))["faults"][0]["kind"] == kind
    str(report).encode("utf-8")  # what a terminal does
    return report.faults[0]


def only_fault(root, kind, file, entry):
    """As `found`, but the image that a damaged split or annotation no longer uses is then a fault as well."""
    report = check(root)
    main = [f for f in report.faults if f.kind != "unlisted"]
    assert [(f.kind, f.file, f.entry) for f in main] == [(kind, file, entry)], str(report)
    str(report).encode("utf-8")
    return main[0]


@cases(FATAL_AT_OPENING | FATAL_IN_HEADER)
def test_fatal_fault_is_reported_and_keeps_the_split_shut(root, damage, kind, file, entry):
    damage(root)
    fault = only_fault(root, kind, file, entry)
    assert fault.fatal
    with pytest.raises(DataError) as error:
        FSC147(root)
    message = str(error.value)
    assert file in message and repr(entry) in message and fault.problem in message and fault.cure in message


@cases(FATAL_IN_CHECK)
def test_fatal_fault_that_only_check_sees(root, damage, kind, file, entry):
    damage(root)
    assert found(root, kind, file, entry).fatal
    assert len(FSC147(root)) == 2


@cases(NOT_FATAL)
def test_fault_that_does_not_keep_the_split_shut(root, damage, kind, file, entry):
    damage(root)
    assert not found(root, kind, file, entry).fatal
    assert len(FSC147(root)) == 2


def test_unsafe_names_are_never_opened(root):
    shutil.copy(root / IMAGE_1, root / "x.jpg")
    rename(root, "../x.jpg")
    report = check(root)
    assert {fault.kind for fault in report.faults} == {"unsafe-name", "unlisted"}
    assert report.splits["train"]["images"] == 1


def test_category_falls_back(root):
    (root / C).write_text("")
    assert FSC147(root).categories == ["objects"]


def test_clean_root(root):
    report = check(root)
    assert report.clean and report.faults == []
    expected = {"images": 2, "empty": 0, "categories": 2, "min": 7, "median": 7.5, "mean": 7.5, "max": 8}
    assert report.splits["train"] == expected
    assert list(report.splits) == list(SPLITS)
    assert "train: images 2, empty 0, categories 2, min 7" in str(report) and "0 faults" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["clean"] is True


def test_report_shows_few_of_many(root):
    for number in range(100, 110):
        shutil.copy(root / IMAGE_1, root / data.IMAGES / f"{number}.jpg")
    text = str(check(root))
    assert "unlisted (10)" in text and "... and 5 more" in text and "109.jpg" not in text


# The real annotations


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real annotations at {REAL}")
def test_real_annotations():
    train, val = (FSC147(REAL, split, images=False) for split in ("train", "val"))
    coco = FSC147(REAL, "val_coco", images=False)
    assert (len(train), len(val), len(coco)) == (2323, 1286, 277)
    both = [*train, *val]
    counts, exemplars = [s.count for s in both], [len(s.boxes) for s in both]
    assert (min(counts), max(counts)) == (7, 2092)  # FSC147's 3,701 is in what this copy leaves out
    assert (min(exemplars), max(exemplars)) == (3, 6)
    assert np.mean([s.count for s in val]) == pytest.approx(63.796, abs=1e-3)
    assert all((s.boxes[:, :2] < s.boxes[:, 2:]).all() for s in both)
    assert not set(train.categories) & set(val.categories)


@pytest.mark.medium
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real annotations at {REAL}")
def test_real_annotations_report():
    report = check(REAL)
    assert {fault.kind for fault in report.faults} == {"missing-file", "no-annotation"}  # no images; a part only
    assert sum(fault.kind == "no-annotation" for fault in report.faults) == (3659 - 2323) + 1190
