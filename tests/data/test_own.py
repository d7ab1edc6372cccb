"""Pictures of one's own: labels in, a root out that `check` finds clean, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from fsc147lib.data import FSC147, DataError, Picture, Sample, check
from fsc147lib.data.own import ImportConfig, import_pictures
from fsc147lib.data.samples import open_picture, to_rgb
from fsc147lib.options import ConfigError


@pytest.fixture
def images(tmp_path):
    """Five pictures: two large ones, a small one, a grey one, and one that a viewer turns by 90 degrees."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a.jpg", (1536, 768)), ("b.png", (768, 1536)), ("c.jpg", (300, 200))):
        Image.new("RGB", size, (90, 120, 60)).save(folder / name)
    Image.new("L", (400, 400), 77).save(folder / "d.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (600, 400)).save(folder / "e.jpg", exif=exif)
    return folder


def write_csv(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def all_samples(root):
    splits = json.loads((root / "Train_Test_Val_FSC_147.json").read_text())
    return {sample.name: sample for split in splits for sample in FSC147(root, split)}


def test_a_csv_of_dots_becomes_a_clean_root(tmp_path, images):
    points = write_csv(
        tmp_path / "dots.csv", "image,x,y,category", "a.jpg,100,200,shells", "a.jpg,1536,768,shells",
        "b.png,10,20,shells", "c.jpg,1.5,2,nails", "d.png,,,shells", "e.jpg,390,590,shells",
    )  # fmt: skip
    sizes = import_pictures(ImportConfig(tmp_path / "root", images, points=points, val=0.2, test=0.2))
    assert sizes == {"train": 3, "val": 1, "test": 1} and check(tmp_path / "root").clean
    samples = all_samples(tmp_path / "root")
    np.testing.assert_allclose(samples["a.jpg"].points, [[50, 100], [768, 384]])  # the shorter side becomes 384
    assert samples["a.jpg"].size == (384, 768) and samples["b.jpg"].size == (768, 384)
    assert samples["c.jpg"].size == (200, 300) and samples["c.jpg"].category == "nails"  # never enlarged
    assert samples["d.jpg"].count == 0 and samples["d.jpg"].category == "shells"
    assert samples["e.jpg"].size == (576, 384)  # upright
    np.testing.assert_allclose(samples["e.jpg"].points, [[390 * 0.96, 590 * 0.96]], atol=1e-3)


def test_of_several_categories_one_is_chosen(tmp_path, images):
    points = write_csv(
        tmp_path / "dots.csv", "image,x,y,category", "a.jpg,1,2,shells", "a.jpg,3,4,nails", "c.jpg,5,6,nails"
    )
    with pytest.raises(DataError, match=r"dots\.csv: a\.jpg shows nails, shells: choose one with --category"):
        import_pictures(ImportConfig(tmp_path / "root", images, points=points))
    import_pictures(ImportConfig(tmp_path / "root", images, points=points, category="shells"))
    assert {name: (s.category, s.count) for name, s in all_samples(tmp_path / "root").items()} == {
        "a.jpg": ("shells", 1), "c.jpg": ("shells", 0)}  # fmt: skip


def test_a_folder_of_csv_files(tmp_path, images):
    (tmp_path / "dots").mkdir()
    write_csv(tmp_path / "dots" / "a.csv", "x, y", "10, 20", "30, 40")
    write_csv(tmp_path / "dots" / "b.csv", "x,y")  # nothing to count
    import_pictures(ImportConfig(tmp_path / "root", images, points=tmp_path / "dots", category="shells", val=0.5))
    assert {name: s.count for name, s in all_samples(tmp_path / "root").items()} == {"a.jpg": 2, "b.jpg": 0}
    with pytest.raises(DataError, match=r"a\.csv, line 2: the category is None"):
        import_pictures(ImportConfig(tmp_path / "other", images, points=tmp_path / "dots"))


def coco_file(path, **change):
    content = {
        "images": [
            {"id": 1, "file_name": "sub/a.jpg", "width": 1536, "height": 768},
            {"id": 2, "file_name": "c.jpg", "width": 300, "height": 200},
            {"id": 3, "file_name": "d.png", "width": 400, "height": 400},
        ],
        "categories": [{"id": 7, "name": "car"}, {"id": 8, "name": "bus"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "bbox": [10, 20, 30, 40]},
            {"image_id": 1, "category_id": 8, "bbox": [0, 0, 8, 8]},
            {"image_id": 2, "category_id": 7, "bbox": [0, 0, 2, 2]},
            {"image_id": 2, "category_id": 7, "bbox": [0, 0, 200, 200], "iscrowd": 1},
        ],
    } | change  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_coco_boxes_become_dots_in_their_centres(tmp_path, images):
    file = coco_file(tmp_path / "coco.json")
    for category, message in (
        (None, r"a\.jpg shows bus, car: choose one"),
        ("tram", "no dots of category 'tram', only of bus, car"),
    ):
        with pytest.raises(DataError, match=message):
            import_pictures(ImportConfig(tmp_path / "root", images, coco=file, category=category))
    assert import_pictures(ImportConfig(tmp_path / "root", images, coco=file, category="car")) == {"train": 1, "val": 1}
    samples = all_samples(tmp_path / "root")  # without c.jpg, which shows a crowd
    assert {name: sample.points.tolist() for name, sample in samples.items()} == {"a.jpg": [[12.5, 20]], "d.jpg": []}
    assert samples["d.jpg"].category == "car"


def test_of_a_single_coco_category_pictures_without_annotations_have_a_count_of_0(tmp_path, images):
    file = coco_file(tmp_path / "coco.json", categories=[{"id": 7, "name": "car"}], annotations=[])
    assert import_pictures(ImportConfig(tmp_path / "root", images, coco=file)) == {"train": 2, "val": 1}
    assert {(sample.category, sample.count) for sample in all_samples(tmp_path / "root").values()} == {("car", 0)}


HEAD = "image,x,y,category"
NO_CROWD = [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a.jpg,1,2"], "must begin with a line that names the columns image, x, y"),
        ([HEAD, "a.jpg,one,2,shells"], "line 2: x is 'one', but must be a number of pixels"),
        ([HEAD, "a.jpg,nan,2,shells"], "line 2: x is 'nan'"),
        ([HEAD, "a.jpg,1,,shells"], "line 2: y is ''"),
        ([HEAD, "a.jpg,1,2,"], "line 2: the category is None"),
        ([HEAD, "a.jpg,1,2,<|im_end|>"], "line 2: the category is '<|im_end|>'"),
        ([HEAD, ",1,2,shells"], "line 2: no image is named"),
        ([HEAD, "z.jpg,1,2,shells"], "must hold one picture called 'z.jpg', but has []"),
        ([HEAD, "../images/a.jpg,1,2,shells"], "must hold one picture called"),
        ([HEAD, "a.jpg,1537,2,shells"], "1536 x 768 pixels, but has a dot at (1537, 2)"),
        ([HEAD, "a.jpg,.2,.3,shells", "a.jpg,.4,.5,shells"], "one pixel: give x and y in pixels"),
        ([HEAD, "a.jpg,1,2,shells"], "too few pictures for train, val (1) and test (0): 1 in all"),
        ([HEAD], "has no picture to count anything in"),
        ({"images": None}, "is no COCO file"),
        ({"categories": [{"id": 7}]}, "is no COCO file (KeyError: 'name' in {'id': 7})"),
        ({"annotations": [{"image_id": 9, "category_id": 7, "bbox": [1, 2, 3, 4]}]}, "(KeyError: 9 in {'image_id': 9"),
        ({"annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3]}]}, "in {'image_id': 1, 'category_id'"),
        ({"images": [{"id": i, "file_name": f"{i}/a.jpg", "width": 1, "height": 1} for i in (1, 2)]},
         "two images are called a.jpg"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, "(KeyError: 'width' in {'id': 1"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": 768, "height": 1536}], "annotations": NO_CROWD},
         "1536 x 768 pixels, but its labels are of 768 x 1536"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, images, labels, message):
    if isinstance(labels, list):
        config = ImportConfig(tmp_path / "root", images, points=write_csv(tmp_path / "dots.csv", *labels))
    else:
        config = ImportConfig(tmp_path / "root", images, coco=coco_file(tmp_path / "c.json", **labels), category="car")
    with pytest.raises(DataError) as error:
        import_pictures(config)
    assert message in str(error.value) and not (tmp_path / "root").exists()


def test_nothing_is_overwritten_and_names_stay_apart(tmp_path, images):
    points = write_csv(tmp_path / "dots.csv", "image,x,y,category", "a.jpg,1,2,shells", "a.png,1,2,shells")
    with pytest.raises(FileExistsError, match="not empty"):
        import_pictures(ImportConfig(images, images, points=points))
    Image.new("RGB", (50, 50)).save(images / "a.png")
    with pytest.raises(DataError, match=r"a\.png and .*a\.jpg would both become a\.jpg"):
        import_pictures(ImportConfig(tmp_path / "root", images, points=points))
    for choice in ({}, {"points": points, "coco": points}, {"points": points, "val": 0.5, "test": 0.5}):
        with pytest.raises(ConfigError):
            ImportConfig(tmp_path / "root", images, **choice)


# Pictures from anywhere


GREYS = np.tile(np.uint8([40, 200]).repeat(8), (16, 1))  # [16, 16]: 40 on the left, which is to be transparent, and 200
CLEAR = Image.merge("LA", (Image.fromarray(GREYS), Image.fromarray(np.where(GREYS == 40, 0, 255).astype(np.uint8))))


@pytest.mark.parametrize(
    ("image", "ending", "options"),
    [
        (CLEAR, "png", {}),
        (CLEAR.convert("RGBA"), "png", {}),
        (CLEAR.convert("RGBA"), "tif", {}),
        (CLEAR.convert("RGBA"), "webp", {"lossless": True}),
        (CLEAR.convert("RGBA").quantize(), "png", {}),  # a palette with alpha
        (Image.fromarray(GREYS).convert("P"), "png", {"transparency": 40}),
        (Image.fromarray(GREYS).convert("P"), "gif", {"transparency": 40}),
        (Image.fromarray(GREYS), "png", {"transparency": 40}),
        (Image.fromarray(GREYS).convert("RGB"), "png", {"transparency": (40, 40, 40)}),
        (Image.fromarray(GREYS * np.uint16(257)), "png", {"transparency": 40 * 257}),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_what_is_transparent_is_white_by_every_way_in(tmp_path, image, ending, options):
    """In a root, in `predict` and in `import` alike."""
    path = tmp_path / "photos" / f"a.{ending}"
    path.parent.mkdir()
    image.save(path, **options)
    shown = np.where(GREYS == 40, 255, 200)[..., None].repeat(3, axis=2)
    sample = Sample("a", "apples", np.zeros((0, 2)), np.zeros((0, 4)), path)
    assert np.array_equal(sample.image, shown) and np.array_equal(Picture(path, "apples").image, shown)
    (tmp_path / "dots.csv").write_text(f"image,x,y\na.{ending},1,1\nb.png,1,1\n")
    Image.new("RGB", (16, 16)).save(path.with_name("b.png"))
    import_pictures(ImportConfig(tmp_path / "root", path.parent, tmp_path / "dots.csv", category="apples"))
    assert np.abs(np.int16(all_samples(tmp_path / "root")["a.jpg"].image) - shown).max() <= 3  # it is a JPEG now


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_what_is_half_transparent_is_blended_with_white(mode):
    alpha = np.random.default_rng(0).integers(0, 256, GREYS.shape, dtype=np.uint8)
    image = Image.merge("LA", (Image.fromarray(GREYS), Image.fromarray(alpha)))
    image = image.convert(mode) if mode == "La" else image.convert("RGBA").convert(mode)
    blended = 255 - (255 - GREYS.astype(float)) * alpha / 255
    assert np.abs(to_rgb(image) - blended[..., None]).max() <= 1.5


def test_what_is_no_picture_gets_a_sentence(tmp_path, images):
    whole = (images / "a.jpg").read_bytes()
    for content, problem in ((b"", "the file is empty"), (b"<html>", "Unidentified"), (whole[: len(whole) // 2], "")):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(DataError, match=rf"x\.jpg cannot be used as a picture \(.*{problem}.*: give a whole JPEG"):
            open_picture(tmp_path / "x.jpg")
    Image.new("1", (20_000, 6_000)).save(tmp_path / "huge.png")
    for name, problem in (
        ("huge.png", "20000 x 6000 = 120,000,000 pixels are more than 100,000,000"),
        ("y", "No such"),
    ):
        with pytest.raises(DataError, match=f"{name} cannot be used as a picture .*{problem}"):
            open_picture(tmp_path / name)
