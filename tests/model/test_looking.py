"""`look` shows any method, during any word of an answer."""

import pytest
import torch

from fsc147lib.model import METHODS, Collate, Heatmap, heatmaps, look, make_heatmap, mean_map, register
from fsc147lib.model.looking import with_word
from fsc147lib.options import ConfigError


@pytest.mark.medium
@pytest.mark.parametrize("method", ["token_gradient", "input_gradient"])
def test_a_gradient_method_is_shown_as_it_is_trained(tiny, mixed_samples, method):
    seen = look(tiny, mixed_samples, answer="true", batch_size=3, method=method)
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    expected = make_heatmap(tiny.network, method)(batch)
    torch.testing.assert_close(seen.maps, expected, atol=1e-5, rtol=1e-3)
    assert mean_map(seen) is seen and [f"COUNT: {sample.count}" for sample in mixed_samples] == seen.answers


def test_a_method_of_one_s_own_is_shown(tiny, mixed_samples, monkeypatch):
    monkeypatch.setattr(heatmaps, "METHODS", METHODS.copy())

    @register
    class TopRows(Heatmap):
        name, trainable = "top_rows", False

        def mass(self, batch, create_graph=False, prompts=None):
            logits, _ = prompts.read_answers(batch)
            mass = torch.zeros(len(logits), 14, 14)
            mass[:, :2] = 3
            return logits, mass

    seen = look(tiny, mixed_samples[:2], method="top_rows")
    assert seen.maps.shape == (2, 14, 14)
    torch.testing.assert_close(seen.maps[:, :2], torch.full((2, 2, 14), 1 / 28))


def test_chosen_heads_are_those_of_all(tiny, mixed_samples):
    all_heads = look(tiny, mixed_samples[:2], (1, 3))
    torch.testing.assert_close(look(tiny, mixed_samples[:2], (1, 3), heads=(2, 0)).maps, all_heads.maps[:, :, [2, 0]])


@pytest.mark.medium
@pytest.mark.parametrize("method", ["attention", "token_gradient"])
def test_the_map_of_a_word_is_that_of_its_position_alone(tiny, mixed_samples, method):
    """Counts have one, two and three digits; "COUNT: 12" is COUNT, :, space, 1, 2, end."""
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    labels = tiny.tokenizer.convert_ids_to_tokens(batch["answer_labels"].clamp_min(0).flatten().tolist())
    width = batch["answer_labels"].shape[1]
    for word in ("first", "last", "before"):
        weights = torch.zeros(len(mixed_samples), width)
        for i, sample in enumerate(mixed_samples):
            first = labels[i * width : (i + 1) * width].index(str(sample.count)[0])
            weights[i, {"first": first, "last": first + len(str(sample.count)) - 1, "before": first - 1}[word]] = 1
        expected = make_heatmap(tiny.network, method)({**batch, "digit_weights": weights})
        seen = mean_map(look(tiny, mixed_samples, answer="true", method=method, word=word)).maps
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-3)


def test_words_of_an_answer_without_digits(tiny, mixed_samples):
    said = [tiny.tokenizer.encode("COUNT: none", add_special_tokens=False)]
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples[:1], said)
    for word, place in (("first", 0), ("last", len(said[0]) - 1), ("before", 0)):
        assert with_word(batch, word)["digit_weights"].argmax() == place
    assert with_word(batch, "all") is batch


def test_a_word_that_is_none_is_refused(tiny, mixed_samples):
    with pytest.raises(ConfigError, match="word is 'second', but must be one of all, first, last, before"):
        look(tiny, mixed_samples[:1], word="second")
