import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsc147lib.data.scenes import draw_scene, make_dataset
from fsc147lib.data.sprites import read_sprites

NOUNS = ("apples", "bears", "cups", "dogs", "eggs", "forks", "gloves", "hats")


def cut_out(path, tint=200, size=(60, 40), mode="RGBA"):
    """A picture with an ellipse on transparent ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", size)
    ImageDraw.Draw(picture).ellipse((6, 4, size[0] - 8, size[1] - 6), fill=(tint, 60, 255 - tint, 255))
    picture.convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    for i, noun in enumerate(NOUNS):
        for number in range(2):
            cut_out(tmp_path / "cuts" / noun / f"IMG_{number}.png", tint=30 * i + 20)
    return tmp_path / "cuts"


def test_a_folder_per_category_dealt_to_disjoint_splits(folder):
    stock = read_sprites(folder, seed=3)
    assert sorted(stock.pictures) == sorted(NOUNS) and all(len(files) == 2 for files in stock.pictures.values())
    dealt = [stock.categories(split) for split in ("train", "val", "test")]
    assert sorted(sum(dealt, [])) == sorted(NOUNS) and min(map(len, dealt)) >= 2
    assert stock.categories("val_seen") == stock.categories("test_seen") == dealt[0]
    assert read_sprites(folder, seed=3).splits == stock.splits
    assert any(read_sprites(folder, seed=seed).splits != stock.splits for seed in range(4))


def test_files_named_by_what_they_show(tmp_path):
    for name in ("Red_Apple.png", "green-apple2.webp", "cup.png", "dog_mirror.png", "1f34c.webp", "2600-fe0f.webp"):
        cut_out(tmp_path / "food" / name)
    cut_out(tmp_path / "coins" / "005.png")
    cut_out(tmp_path / "747.png")
    (tmp_path / "747.txt").write_text("An airplane.\nde.utf8=Ein Flugzeug.\n")
    cut_out(tmp_path / "jar.png")
    (tmp_path / "jar.txt").write_text("Whatever you do, do not open it!\n")
    cut_out(tmp_path / "1f44b-1f3fb.webp")  # a sequence: another skin
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")  # no cut-out
    assert set(read_sprites(tmp_path).pictures) == {
        "red apple", "green apple", "cup", "dog", "banana", "black sun with rays", "coins", "airplane", "jar",
    }  # fmt: skip


def test_one_noun_goes_to_one_split(tmp_path):
    for name in ("red apple", "green apple", "old apple", *NOUNS):
        cut_out(tmp_path / f"{name}.png")
    for seed in range(5):
        splits = read_sprites(tmp_path, seed).splits
        assert sum("red apple" in names for names in splits.values()) == 1
        assert sum(sum("apple" in name.split() for name in names) == 3 for names in splits.values()) == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_scenes_of_cut_outs_are_exact(folder, mode):
    for noun in NOUNS:
        cut_out(folder / noun / "IMG_1.png", mode=mode)
    stock = read_sprites(folder)
    for i in range(6):
        image, scene = draw_scene(np.random.default_rng(i), "val", stock)
        assert scene["category"] in stock.categories("val") and scene["category"] not in scene["distractors"]
        assert set(scene["distractors"]) <= set(stock.categories("val"))
        assert ((scene["points"] > 0) & (scene["points"] < [image.width, image.height])).all()
        sides = scene["boxes"][:, 2:] - scene["boxes"][:, :2]
        assert (sides >= 10).all() and (sides <= 90).all()


def test_the_cut_out_is_trimmed_and_as_large_as_asked(folder):
    stock = read_sprites(folder)
    for i in range(5):
        pixels, mask = stock.cut_out(np.random.default_rng(i), "cups", 20.0)
        assert pixels.size == mask.size and max(mask.size) == 40
        assert (np.asarray(mask)[[0, -1]].max(axis=1) > 0).all() and (
            np.asarray(mask)[:, [0, -1]].max(axis=0) > 0
        ).all()


@pytest.mark.medium
def test_a_data_set_of_cut_outs_repeats_and_shares_no_category(folder, tmp_path):
    roots = [make_dataset(tmp_path / name, 4, 3, 3, 1, folder) for name in ("a", "b")]
    files = [sorted(path for path in root.rglob("*") if path.is_file()) for root in roots]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    lines = (roots[0] / "ImageClasses_FSC147.txt").read_text().splitlines()
    kinds = [line.split("\t")[1] for line in lines]
    train, val, test, seen = set(kinds[:4]), set(kinds[4:7]), set(kinds[7:10]), set(kinds[10:])
    assert not train & val and not train & test and not val & test and not seen & (val | test)


def broken(folder):
    (folder / "cups" / "IMG_1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")


def clear(folder):
    Image.new("RGBA", (30, 30)).save(folder / "cups" / "IMG_1.png")


def few(folder):
    for noun in NOUNS[5:]:
        for path in (folder / noun).iterdir():
            path.unlink()


def opaque(folder):
    for path in folder.rglob("*.png"):
        Image.new("RGB", (30, 30)).save(path)


def control(folder):
    cut_out(folder / "<|im_end|>" / "1.png")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (broken, r"cups/IMG_1.png' cannot be read"),
        (clear, r"cups/IMG_1.png' is fully transparent"),
        (few, "5 different nouns .*but three splits need 2 each, 6 in all"),
        (opaque, "no .png or .webp picture with transparency"),
        (control, "which a prompt cannot hold"),
    ],
)
def test_what_cannot_be_used_is_said(folder, tmp_path, spoil, says):
    spoil(folder)
    with pytest.raises(ValueError, match=says):
        make_dataset(tmp_path / "x", 1, 1, 1, sprites=folder)
    assert not (tmp_path / "x").exists()


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        read_sprites(tmp_path / "nowhere")
