import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsc147lib.data.scenes import draw_scene, make_dataset
from fsc147lib.data.sprites import read_sprites

NOUNS = ("apples", "bears", "cups", "dogs", "eggs", "forks", "gloves", "sea shells")


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
            cut_out(tmp_path / "cuts" / noun.replace(" ", "_") / f"IMG_{number}.png", tint=30 * i + 20)
    return tmp_path / "cuts"


def test_folders_are_categories_dealt_to_disjoint_splits(folder):
    stock = read_sprites(folder, seed=3)
    assert sorted(stock.pictures) == sorted(NOUNS) and all(len(files) == 2 for files in stock.pictures.values())
    dealt = [stock.categories(split) for split in ("train", "val", "test")]
    assert sorted(sum(dealt, [])) == sorted(NOUNS) and min(map(len, dealt)) >= 2
    assert stock.categories("val_seen") == stock.categories("test_seen") == dealt[0]
    assert read_sprites(folder, seed=3).splits == stock.splits
    assert any(read_sprites(folder, seed=seed).splits != stock.splits for seed in range(4))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_scenes_of_cut_outs_are_exact(folder, mode):
    for place in folder.iterdir():
        cut_out(place / "IMG_1.png", mode=mode)
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


def test_pictures_that_are_no_cut_outs_are_left_out(folder):
    Image.new("RGB", (30, 30)).save(folder / "cups" / "IMG_0.png")
    Image.new("RGBA", (30, 30)).save(folder / "dogs" / "IMG_0.png")  # nothing to see
    (folder / "cups" / "about.txt").write_text("cups")
    pictures = read_sprites(folder).pictures
    assert [path.name for noun in ("cups", "dogs") for path in pictures[noun]] == ["IMG_1.png"] * 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "cups" / "IMG_1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then"), "IMG_1.png' cannot be read"),
        (lambda f: [shutil.rmtree(f / noun) for noun in NOUNS[:3]], "of 5 categories, but three splits need 2 each"),
        (lambda f: cut_out(f / "<think>" / "1.png"), "'<think>' and may be read as control tokens"),
        (shutil.rmtree, "of 0 categories"),
    ],
)
def test_what_cannot_be_used_is_said(folder, tmp_path, spoil, says):
    spoil(folder)
    with pytest.raises(ValueError) as error:
        make_dataset(tmp_path / "x", 1, 1, 1, sprites=folder)
    assert says in str(error.value) and not (tmp_path / "x").exists()
