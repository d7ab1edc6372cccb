"""What is counted without a part of the picture is what is counted in a picture edited by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from plain import plain_inputs, plain_network

from fsc147lib.data import DataError, Picture, hide
from fsc147lib.model import (
    METHODS,
    Collate,
    count_without,
    heatmaps,
    load_model,
    look,
    occlude,
    predict,
    predict_samples,
    register,
)
from fsc147lib.model.load import SHIPPED
from fsc147lib.model.occlusion import OcclusionMap, hide_in_batch, windows
from fsc147lib.options import ConfigError

CELLS = np.zeros((14, 14), bool)
CELLS[3:6, 2:9] = True


@pytest.fixture(scope="module")
def dual():
    return load_model("tiny-dual")


@pytest.mark.medium
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


def test_windows():
    side_by_side = windows(4)
    assert len(side_by_side) == 16 and (side_by_side.sum(dim=0) >= 1).all()
    assert side_by_side[5].nonzero().amin(dim=0).tolist() == [4, 4]
    assert side_by_side[-1].nonzero().amin(dim=0).tolist() == [10, 10], "the last one ends with the grid"
    assert len(windows(2)) == 49 and (windows(2).sum(dim=0) == 1).all()
    assert len(windows(3, 1)) == 144 and (windows(3).sum(dim=(1, 2)) == 9).all()


@pytest.fixture(scope="module")
def plain_dual():
    return plain_network(SHIPPED / "tiny-dual")


@pytest.fixture(scope="module")
def whole(mixed_samples):
    """Two drawn pictures of multiples of 32 pixels, which the network gets as they are, of 3 and 12 dots."""
    sizes, rng = ((256, 192), (224, 224)), np.random.default_rng(0)
    made = [Picture(mixed_samples[i].image.resize(size), "apples") for i, size in enumerate(sizes)]
    for picture, count in zip(made, (3, 12), strict=True):
        object.__setattr__(picture, "points", rng.uniform(0, 190, (count, 2)).astype(np.float32))
    return made


def log_probability_by_hand(model, image, text, plain):
    """Of the digits of an answer to "How many apples ...", by transformers' own forward pass."""
    said = [model.tokenizer.encode(text)]
    batch = Collate(model.tokenizer, model.image_processor)([Picture(image, "apples")], said)
    with torch.no_grad():
        logits = plain(**plain_inputs(batch)).logits[0]
    log_p = logits.log_softmax(dim=-1)
    tokens = model.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    digits = [place for place, token in enumerate(tokens) if token.isdigit()]
    return sum(log_p[place - 1, batch["input_ids"][0, place]].item() for place in digits)


@pytest.mark.medium
@pytest.mark.parametrize("fill", ["grey", "blur"])
def test_occlusion_is_the_fall_in_pictures_edited_by_hand(dual, plain_dual, whole, fill, monkeypatch):
    """A user's own window and filling, registered; image by image and window by window."""
    monkeypatch.setattr(heatmaps, "METHODS", dict(METHODS))
    register(type("Mine", (OcclusionMap,), {"name": "mine", "fill": fill, "window": 7}))
    seen = look(dual, whole, answer="true", method="mine").maps
    for sample, got in zip(whole, seen, strict=True):
        text = f"COUNT: {sample.count}"
        before, falls = log_probability_by_hand(dual, sample.image, text, plain_dual), np.zeros((14, 14))
        for rows in (slice(0, 7), slice(7, 14)):
            for columns in (slice(0, 7), slice(7, 14)):
                cells = np.zeros((14, 14), bool)
                cells[rows, columns] = True
                after = log_probability_by_hand(dual, hide(sample, cells, fill).image, text, plain_dual)
                falls[rows, columns] = max(0.0, before - after)
        assert falls.std() > 0, "no window of this picture matters, so nothing is tested"
        np.testing.assert_allclose(got, falls / falls.sum(), atol=1e-5)


@pytest.mark.medium
def test_the_count_s_fall_is_that_of_predictions(dual, plain_dual, whole):
    found = occlude(dual, whole, window=6, step=4)
    assert found.windows.shape == (9, 14, 14) and found.count.shape == found.objects.shape == (2, 9)
    for i, sample in enumerate(whole):
        before = predict_samples(dual, [sample])[0]
        assert found.answers[i] == before.answer
        for w in (0, 4, 8):
            after = count_without(dual, sample, found.windows[w])
            assert found.count[i, w] == pytest.approx(before.mean - after.mean, abs=1e-3)
            assert found.objects[i, w] == sample.count - after.sample.count
            fall = log_probability_by_hand(dual, sample.image, before.answer, plain_dual)
            fall -= log_probability_by_hand(dual, after.sample.image, before.answer, plain_dual)
            assert found.log_probability[i, w] == pytest.approx(fall, abs=1e-3)


def test_occlusion_needs_pixels(dual, whole):
    batch = Collate(dual.tokenizer, dual.image_processor, pixels=False)(whole)
    with pytest.raises(ConfigError, match="occlusion hides pixels.*without a cache"):
        next(hide_in_batch(dual.network, batch, 0, windows(7), "grey"))
