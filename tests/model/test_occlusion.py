"""What is counted without a part of the picture is what is counted in a picture edited by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from fsc147lib.data import DataError, Picture
from fsc147lib.model import count_without, load_model, predict, predict_samples

CELLS = np.zeros((14, 14), bool)
CELLS[3:6, 2:9] = True


@pytest.fixture(scope="module")
def dual():
    return load_model("tiny-dual")


def test_counting_without_cells_is_counting_in_a_picture_edited_by_hand(dual, mixed_samples, tmp_path):
    sample = mixed_samples[0]
    image = np.array(sample.image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if CELLS[int(14 * (y + 0.5) / height), int(14 * (x + 0.5) / width)]:
                image[y, x] = 127
    Image.fromarray(image).save(tmp_path / "edited.png")
    edited = predict(dual, tmp_path / "edited.png", sample.category)
    for asked in (
        count_without(dual, sample, CELLS),
        count_without(dual, sample.image, CELLS, category=sample.category),
    ):
        assert asked.answer == edited.answer
        np.testing.assert_allclose(asked.distribution, edited.distribution, atol=1e-6)
        np.testing.assert_allclose(asked.heatmap, edited.heatmap, atol=1e-6)
    assert np.abs(predict_samples(dual, [sample])[0].distribution - edited.distribution).max() > 1e-3


def test_with_nothing_hidden_it_is_the_prediction_and_another_category_another_question(dual, mixed_samples):
    sample = mixed_samples[1]
    nothing = np.zeros((14, 14), bool)
    plain = predict_samples(dual, [sample])[0]
    np.testing.assert_allclose(count_without(dual, sample, nothing).distribution, plain.distribution, atol=1e-6)
    other = count_without(dual, sample, nothing, category="blue rings")
    np.testing.assert_allclose(other.distribution, predict(dual, sample.image, "blue rings").distribution, atol=1e-6)


def test_an_image_without_a_category_is_refused(dual):
    with pytest.raises(DataError, match="name what to count"):
        count_without(dual, Image.new("RGB", (64, 64)), CELLS)


def test_pictures_in_memory_of_one_name_are_not_taken_for_one_another(dual, mixed_samples):
    """They have no file that would tell them apart."""
    pictures = [Picture(sample.image, "apples") for sample in mixed_samples[:2]]
    together = [prediction.distribution for prediction in predict_samples(dual, pictures)]
    alone = [predict_samples(dual, [picture])[0].distribution for picture in pictures]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert not torch.allclose(*map(torch.from_numpy, alone), atol=1e-3)
