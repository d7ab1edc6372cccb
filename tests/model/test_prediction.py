"""One picture and no root: the answer, the distribution, the map, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from fsc147lib import load_model, predict
from fsc147lib.data import DataError
from fsc147lib.model import Collate, look, make_heatmap, predict_samples
from fsc147lib.model.looking import Prediction
from fsc147lib.model.prompt import answer, parse_count


@pytest.mark.slow
def test_a_taught_model_predicts_what_it_has_learnt(taught, mixed_samples):
    tiny = taught(60)
    found = predict_samples(tiny, mixed_samples, batch_size=3)
    for sample, prediction in zip(mixed_samples, found, strict=True):
        assert prediction.answer == answer(sample.count) and prediction.count == prediction.mode == sample.count
        assert prediction.distribution.sum() == pytest.approx(1) and 0.3 < prediction.covered <= 1
        with torch.no_grad():  # it is right, so the map is that of the true answer too
            expected = make_heatmap(tiny.network)(Collate(tiny.tokenizer, tiny.image_processor)([sample]))[0]
        np.testing.assert_allclose(prediction.heatmap, expected, atol=1e-5)


def test_a_file_and_an_image_in_memory_are_the_same_picture(mixed_samples):
    """And the same as the sample of a root, where that has FSC147's size."""
    sample, dual = mixed_samples[0], load_model("tiny-dual")  # whose numbers are soon found
    by_path, by_image = (predict(dual, image, sample.category) for image in (sample.image_path, sample.image))
    (of_root,) = predict_samples(dual, [sample])
    for other in (by_image, of_root):
        assert other.answer == by_path.answer and other.count == by_path.count
        np.testing.assert_allclose(other.distribution, by_path.distribution, atol=1e-6)
        np.testing.assert_allclose(other.heatmap, by_path.heatmap, atol=1e-6)


@pytest.mark.medium
def test_an_answer_without_a_number_still_has_a_distribution_and_a_map(tiny, tmp_path):
    """An untaught model babbles: its map is that of the whole answer, its numbers are improbable but comparable."""
    Image.effect_noise((500, 400), 60).save(tmp_path / "noise.png")
    found = predict(tiny, tmp_path / "noise.png", "grains")
    assert found.count is None and found.covered < 1e-6 and found.no_number > 0.999
    assert found.distribution.sum() == pytest.approx(1) and found.heatmap.sum() == pytest.approx(1, abs=1e-5)
    low, high = found.interval(0.9)
    assert low <= high and found.distribution[low : high + 1].sum() >= 0.9 - 1e-9


def test_mode_mean_and_interval_by_hand():
    distribution = np.zeros(10_000)
    distribution[[3, 10, 11, 12, 40]] = 0.04, 0.3, 0.4, 0.2, 0.06
    found = Prediction(None, "COUNT: 11", 11, distribution, 1.0, np.full((14, 14), 1 / 196))
    assert found.mode == 11 and found.mean == pytest.approx(0.12 + 3 + 4.4 + 2.4 + 2.4)
    assert found.interval(0.9) == (10, 40) and found.interval(0.5) == (10, 12) and found.interval(0.99) == (3, 40)


@pytest.mark.slow
def test_own_and_true_answers_are_looked_at_apart(tiny, taught, mixed_samples):
    true, own = (look(tiny, mixed_samples, batch_size=3, answer=answer) for answer in ("true", "own"))
    assert true.titles[:2] == [f"true answer {sample.count}" for sample in mixed_samples[:2]]
    assert all(title.startswith("own answer '") for title in own.titles)  # it is not taught: no numbers
    assert not torch.allclose(true.maps, own.maps, atol=1e-4)
    tiny = taught(60)
    true, own = (look(tiny, mixed_samples, batch_size=3, answer=answer) for answer in ("true", "own"))
    assert own.answers == true.answers == [answer(sample.count) for sample in mixed_samples]
    torch.testing.assert_close(own.maps, true.maps, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_the_map_of_an_own_answer_is_that_of_its_digits(tiny, mixed_samples):
    """A batch that holds the answer 42 gives the map of the digits 4 and 2, whatever the true count."""
    collate = Collate(tiny.tokenizer, tiny.image_processor)
    ids = [*tiny.tokenizer.encode(answer(42), add_special_tokens=False), tiny.tokenizer.eos_token_id]
    batch = collate(mixed_samples, [ids] * 4)
    assert (batch["digit_weights"] > 0).sum(dim=1).tolist() == [2] * 4
    text = tiny.tokenizer.decode(batch["answer_labels"][0], skip_special_tokens=True)
    assert parse_count(text) == 42 and batch["count"] == [sample.count for sample in mixed_samples]
    for i, words in ((0, "many"), (1, "")):  # no digit: the whole answer
        ids = [*tiny.tokenizer.encode(words, add_special_tokens=False), tiny.tokenizer.eos_token_id]
        assert (collate([mixed_samples[i]], [ids])["digit_weights"] > 0).all()


@pytest.mark.medium
@pytest.mark.parametrize("category", ["", "  ", "<|im_end|>", "app\nles"])
def test_what_is_counted_must_be_words(tiny, mixed_samples, category):
    with pytest.raises(DataError, match="name what to count"):
        predict(tiny, mixed_samples[0].image_path, category)


@pytest.mark.medium
@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (17, 400), (4000, 3000)])
def test_pictures_of_any_size(tiny, size):
    found = predict(tiny, Image.new("RGB", size, (200, 30, 40)), "apples")
    assert found.heatmap.sum() == pytest.approx(1, abs=1e-5)


def test_a_picture_as_narrow_as_no_processor_takes_is_refused(tiny):
    with pytest.raises(DataError, match="3000 x 10 pixels, one side more than 200 times"):
        predict(tiny, Image.new("RGB", (3000, 10)), "apples")
