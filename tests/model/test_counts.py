"""Probabilities of numbers, against plain transformers scoring each whole answer."""

import numpy as np
import pytest
import torch

from fsc147lib.model import Collate, ModelError, answer_logits
from fsc147lib.model.answers import count_log_probabilities, number_tokens
from fsc147lib.model.forward import normalised_pixels


@torch.no_grad()
def scored(model, sample, numbers):
    """Log-probability of each number's whole answer, by a plain forward pass over prompt and answer."""
    end, alone = model.tokenizer.eos_token_id, Collate(model.tokenizer, model.image_processor)([sample])
    start, found = int(alone["answer_positions"][0, 0]) + 1, []
    pixels = {"pixel_values": normalised_pixels(alone), "image_grid_thw": alone["image_grid_thw"]}
    for number in numbers:
        answer = model.tokenizer.encode(f"COUNT: {number}", add_special_tokens=False) + [end]
        ids = torch.cat([alone["input_ids"][:, :start], torch.tensor([answer])], dim=1)
        kinds = torch.cat([alone["mm_token_type_ids"][:, :start], torch.zeros(1, len(answer), dtype=torch.int)], dim=1)
        logits = model.network(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits[0, start - 1 : -1]
        found.append(logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item())
    return found


@pytest.fixture
def half_taught(taught, mixed_samples):
    """A model after a few steps towards the answers, and their batch: digits are likely then, but not sure."""
    model = taught(12)
    return model, Collate(model.tokenizer, model.image_processor)(mixed_samples)


@torch.no_grad()
def log_probabilities(model, batch, **choices):
    logits, trace = answer_logits(model.network, batch, keep_keys=True)
    return count_log_probabilities(model, batch, logits, trace.keys_values, **choices)


@pytest.mark.slow
def test_each_number_is_as_probable_as_its_whole_answer(half_taught, mixed_samples):
    """All numbers up to 99, and some of three digits, for images of different sizes in one batch."""
    tiny, batch = half_taught
    found = log_probabilities(tiny, batch, digits=3, followed=900)
    assert found.shape == (4, 1000) and found.isfinite().all()
    assert (found.exp().sum(dim=1) <= 1 + 1e-6).all() and (found.exp().sum(dim=1) > 0.05).all()
    for i, numbers in ((0, [*range(100), 100, 123, 999]), (3, [0, 7, 30, 100, 123, 547, 999])):
        np.testing.assert_allclose(found[i, numbers], scored(tiny, mixed_samples[i], numbers), atol=2e-4)


@pytest.mark.slow
def test_following_the_most_probable_digits_loses_only_the_improbable(half_taught):
    tiny, batch = half_taught
    all_of_them, few = (log_probabilities(tiny, batch, digits=3, followed=k) for k in (900, 60))
    reached = few.isfinite()
    torch.testing.assert_close(few[reached], all_of_them[reached], atol=1e-4, rtol=0)
    assert (reached.sum(dim=1) == 10 + 60 + 60).all()
    assert (few.exp().sum(dim=1) > 0.9 * all_of_them.exp().sum(dim=1)).all()


def test_the_answer_in_the_batch_does_not_matter(tiny, mixed_samples):
    """Only prompts enter: the same distribution whatever number is forced."""
    collate, said = Collate(tiny.tokenizer, tiny.image_processor), "COUNT: 5"
    other = [[*tiny.tokenizer.encode(said, add_special_tokens=False), tiny.tokenizer.eos_token_id]] * 4
    tiny.network.eval()
    true, forced = (
        log_probabilities(tiny, batch, digits=2) for batch in (collate(mixed_samples), collate(mixed_samples, other))
    )
    torch.testing.assert_close(true, forced, atol=1e-4, rtol=0)


def test_a_tokenizer_that_joins_digits_is_refused(tiny, monkeypatch):
    tiny.tokenizer.add_tokens(["98"])
    with pytest.raises(ModelError, match="does not write each digit as one token"):
        number_tokens(tiny.tokenizer)
