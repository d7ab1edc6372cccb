"""Hostile roots and pictures: what is there, the command, and the sentence that it must answer with."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from small_root import SIZE, edit, make_root

from fsc147lib.__main__ import main
from fsc147lib.data import FSC147, DataError, check, open_split
from fsc147lib.data.faults import ANNOTATIONS, CLASSES, IMAGES, SPLITS

ONE = f"{IMAGES}/1.jpg"
LONG = "a" * 300 + ".jpg"
PIPE, LINK = "a pipe, a device or a folder", "links out of the root"


pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("restart_clock")]


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "root")


def put(make, *path):
    """Put something else in the place of a file or folder of the root."""

    def damage(root):
        place = root.joinpath(*path)
        if place.is_dir():
            place.rename(root.parent / "moved")
        else:
            place.unlink(missing_ok=True)
        make(place)

    return damage


def link_out(place):
    """A link to what lay there, which is now beside the root."""
    away = place.parents[len(place.parts) - 1 - place.parts.index("root")] / ("moved" if not place.suffix else "x.jpg")
    if place.suffix:
        away.write_bytes(b"[]")
    place.symlink_to(away)


def picture(size, mode="RGB", compress=1):
    return lambda place: Image.new(mode, size).save(place, "PNG", compress_level=compress)


def rename(name):
    def damage(root):
        edit(root, ANNOTATIONS, lambda entries: entries.update({name: entries.pop("1.jpg")}))
        edit(root, SPLITS, lambda splits: splits["train"].__setitem__(0, name))

    return damage


def with_points(points):
    return lambda root: edit(root, ANNOTATIONS, lambda entries: entries["1.jpg"].update(points=points))


def category(text):
    return lambda r: (r / CLASSES).write_text((r / CLASSES).read_text().replace("sea shells", text, 1))


def splits(change):
    return lambda root: edit(root, SPLITS, change)


def shared_with_val_coco(root):
    edit(root, SPLITS, lambda splits: splits.update(val_coco=["1.jpg"]))


def same_bytes(root):
    shutil.copy(root / ONE, root / IMAGES / "4.jpg")


CHECK, TRAIN = ("check", "{root}"), ("train", "--data", "{root}", "--out", "{root}/../run")
EVALUATE = ("evaluate", "--data", "{root}", "--model", "tiny-random")
WIDE = "5000 x 1 pixels, one side more than 200 times the other"
BIG = "144,000,000 pixels are more than 100,000,000"
TABLE = {
    # nothing is waited for, and nothing ends it
    "annotations a pipe": (put(os.mkfifo, ANNOTATIONS), CHECK, PIPE),
    "splits a pipe": (put(os.mkfifo, SPLITS), TRAIN, PIPE),
    "classes a pipe": (put(os.mkfifo, CLASSES), CHECK, PIPE),
    "image a pipe": (put(os.mkfifo, ONE), CHECK, PIPE),
    "list of exclusions a pipe": (put(os.mkfifo, "x"), (*TRAIN, "--exclude", "{root}/x"), PIPE),
    "picture a pipe": (put(os.mkfifo, "x.jpg"), ("predict", "{root}/x.jpg", "--category", "apples"), PIPE),
    "CSV a pipe": (put(os.mkfifo, "x.csv"), ("import", "{root}/new", "--images", "{root}", "--category", "apples",
                                             "--points", "{root}/x.csv"), PIPE),
    "COCO a pipe": (put(os.mkfifo, "x.json"), ("import", "{root}/new", "--images", "{root}",
                                               "--coco", "{root}/x.json"), PIPE),
    "a name of 300 characters": (rename(LONG), TRAIN, "File name too long"),
    "a million dots": (with_points([[1, 2]] * 1_000_000), CHECK, "1,000,000 dots, more than the 999,999"),
    "a category of 10,000 characters": (category("apples " * 1500), CHECK, "more than 100 characters"),
    # what `train` refuses
    "1 x 5000": (put(picture((5000, 1)), ONE), CHECK, WIDE),
    "1 x 5000, asked about": (put(picture((5000, 1)), "x.png"), ("predict", "{root}/x.png", "--category", "a"), WIDE),
    "144 megapixels": (put(picture((12000, 12000), "L"), ONE), CHECK, BIG),
    "a training image in val_coco": (shared_with_val_coco, CHECK, "in 'train' and in 'val_coco'"),
    "the same bytes in train and val": (same_bytes, CHECK, "the same bytes as '4.jpg' of 'val'"),
    "two class lines": (category("sea shells\n1.jpg\tapples"), TRAIN, "two lines give its"),
    "no train split": (splits(lambda s: s.pop("train")), CHECK, "no image to train on"),
    "an empty val split": (splits(lambda s: s.update(val=[], val_coco=[])), CHECK, "no image to validate on"),
    "a picture that runs a program": (put(lambda p: Image.new("RGB", SIZE[::-1]).save(p, "EPS"), ONE), CHECK,
                                      "unreadable-image"),
    "a picture of unknown range": (put(lambda p: Image.new("F", SIZE[::-1]).save(p, "TIFF"), ONE), CHECK, "mode F"),
    # nothing outside the root is read
    "image links out": (put(link_out, ONE), CHECK, LINK),
    "image links out, trained on": (put(link_out, ONE), TRAIN, LINK),
    "a device": (put(lambda p: p.symlink_to("/dev/zero"), ONE), CHECK, LINK),
    "a circle of links": (put(lambda p: p.symlink_to(p), ONE), CHECK, "unreadable-image"),
}  # fmt: skip


@pytest.mark.parametrize("damage, words, sentence", TABLE.values(), ids=TABLE)
def test_a_hostile_input_is_answered_with_a_sentence(root, capsys, damage, words, sentence):
    damage(root)
    status = main([word.format(root=root) for word in words])
    out, err = capsys.readouterr()
    assert status == (1 if words[0] == "check" else 2)
    assert sentence in out + err, out + err
    assert "Traceback" not in out + err
    (out + err).encode()


@contextmanager
def a_common_user(folder: Path):
    """Modes are for users: whoever runs the tests as root is nobody for a moment."""
    if os.geteuid():
        yield
        return
    for place in [folder, *folder.rglob("*")]:
        os.chown(place, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["", IMAGES, ANNOTATIONS, ONE])
def test_what_may_not_be_read_is_a_fault(closed):
    folder = Path(tempfile.mkdtemp())  # not pytest's own, whose parents are closed to others
    try:
        root = make_root(folder / "root")
        with a_common_user(folder):
            (root / closed).chmod(0)
            report = check(root)
            (root / closed).chmod(0o700)
        (fault,) = [fault for fault in report.faults if fault.kind != "unlisted"]
        assert "Permission denied" in fault.problem and (closed or str(root)) in fault.file
    finally:
        shutil.rmtree(folder)


def test_a_link_within_the_root_is_followed(root):
    (root / ONE).rename(root / "kept.jpg")
    (root / ONE).symlink_to(root / "kept.jpg")
    link = root.parent / "link"
    link.symlink_to(root)
    assert check(link).clean and FSC147(link)[0].size == SIZE


def test_larger_pictures_are_opened_where_that_is_asked_for(root, capsys):
    put(picture((12000, 12000), "1"), ONE)(root)
    edit(root, ANNOTATIONS, lambda entries: entries["1.jpg"].pop("H"))
    assert main(["check", str(root), "--max-pixels", "150000000"]) == 0, capsys.readouterr()
    assert open_split(root, "train", max_pixels=150_000_000)[0].size == (12000, 12000)
    with pytest.raises(DataError, match="--max-pixels"):
        open_split(root, "train")


def test_repeated_images_are_listed_and_left_out_of_training(root, tmp_path, capsys):
    listed = tmp_path / "exclude.txt"
    shutil.copy(root / ONE, root / IMAGES / "4.jpg")
    shutil.copy(root / IMAGES / "3.png", root / IMAGES / "6.jpg")
    assert main(["check", str(root), "--exclude", str(listed)]) == 1
    assert "2 training images to leave out" in capsys.readouterr().out
    assert listed.read_text().split() == ["1.jpg", "3.png"]
    assert [sample.name for sample in open_split(root, "train", exclude=listed)] == ["2.jpg"]
    assert [sample.name for sample in open_split(root, "val")] == ["4.jpg", "5.jpg"]
    words = ["train", "--data", str(root), "--model", "tiny-random", "--out", str(tmp_path / "run")]
    assert main([*words, "--exclude", str(listed), "--tracking", "disabled"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"] == {"train": 1, "val": 2}
    listed.write_text("1.jpg\n9.jpg\n")
    with pytest.raises(DataError, match=r"exclude\.txt.*'9\.jpg'.*'train'"):
        open_split(root, "train", exclude=listed)
    listed.write_text("1.jpg\n2.jpg\n3.png\n")
    with pytest.raises(DataError, match="is empty"):
        open_split(root, "train", exclude=listed)
