"""A picture without some of its cells is the one that a hand would make, with the dots that are left."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fsc147lib.data import DataError, Picture, hide
from fsc147lib.data.hiding import covers, hide_cells


@pytest.fixture
def sample():
    """140 x 280 pixels of noise, so a cell is 10 x 20; three dots and a box."""
    image = np.random.default_rng(0).integers(0, 255, (140, 280, 3), dtype=np.uint8)
    picture = Picture(Image.fromarray(image), "apples")
    object.__setattr__(picture, "points", np.float32([[5, 5], [25, 5], [300, 150]]))  # the last is outside
    object.__setattr__(picture, "boxes", np.float32([[21, 0, 39, 9]]))
    return picture


def test_hidden_cells_are_filled_and_the_rest_is_untouched(sample):
    cells = np.zeros((14, 14), bool)
    cells[0, 1] = cells[13, 13] = True
    image = np.asarray(sample.image)
    for fill, colour in (("grey", np.full(3, 127)), ("mean", np.round(image.mean(axis=(0, 1))))):
        by_hand = image.copy()
        by_hand[:10, 20:40] = by_hand[130:, 260:] = colour
        hidden = hide(sample, cells, fill)
        np.testing.assert_array_equal(np.asarray(hidden.image), by_hand)
        np.testing.assert_array_equal(hidden.points, [[5, 5]])
        assert hidden.count == 1 and len(hidden.boxes) == 0 and hidden.category == "apples"


def test_a_blur_keeps_the_colours_of_the_surroundings_and_no_object():
    """Left half black, right half white, an object in each; what hides it is nearly its surroundings' colour."""
    image = torch.zeros(140, 280, 3, dtype=torch.uint8)
    image[:, 140:] = 255
    image[66:70, 45:55] = 255
    image[66:70, 225:235] = 0
    hidden = hide_cells(image, torch.ones(1, 14, 14, dtype=torch.bool), "blur")[0]
    assert hidden[50:90, 30:70].max() < 40 and hidden[50:90, 210:250].min() > 215


def test_any_grid_and_size(sample):
    """Pixels and dots agree on what is hidden, on a grid that does not divide the picture."""
    cells = np.random.default_rng(1).random((5, 9)) < 0.5
    y, x = np.mgrid[:140, :280]
    centres = np.stack([x + 0.5, y + 0.5], axis=-1).reshape(-1, 2)
    hidden = covers(cells, centres, (140, 280)).reshape(140, 280)
    assert 0 < hidden.mean() < 1
    image = torch.from_numpy(np.array(sample.image))
    image[image == 127] = 128
    made = hide_cells(image, torch.from_numpy(cells)[None], "grey")[0].numpy()
    np.testing.assert_array_equal((made == 127).all(axis=-1), hidden)


@pytest.mark.parametrize(
    ("cells", "fill", "category", "message"),
    [
        (np.zeros(196, bool), "grey", None, r"cells has shape \(196,\): give a grid such as 14 x 14"),
        (np.zeros((14, 14), bool), "black", None, "fill is 'black': choose one of grey, mean, blur"),
        (np.zeros((14, 14), bool), "grey", " ", "the category is ' ': name what to count"),
    ],
)
def test_what_cannot_be_hidden_is_refused(sample, cells, fill, category, message):
    with pytest.raises(DataError, match=message):
        hide(sample, cells, fill, category)


def test_a_mirror_image_can_be_hidden(sample):
    cells = np.zeros((14, 14), bool)
    cells[:, 0] = True
    hidden = hide(replace(sample.flipped(), category="pears"), cells)
    assert (np.asarray(hidden.image)[:, :20] == 127).all() and hidden.category == "pears"
    np.testing.assert_array_equal(np.asarray(hidden.image)[:, 20:], np.asarray(sample.image)[:, ::-1][:, 20:])
