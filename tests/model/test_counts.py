"""Probabilities of numbers, against plain transformers scoring each whole answer."""

from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image

from fsc147lib.data import Picture
from fsc147lib.model import Collate, ModelError, answer_logits, count_loss, predict_samples, read_prompts
from fsc147lib.model.answers import count_log_probabilities, follow_numbers
from fsc147lib.model.forward import normalised_pixels
from fsc147lib.model.prompt import number_tokens


@torch.no_grad()
def scored(model, sample, numbers):
    """Log-probability of each number's whole answer, by plain forward passes over prompt and answer."""
    end, alone = model.tokenizer.eos_token_id, Collate(model.tokenizer, model.image_processor)([sample])
    start, pixels, found = int(alone["answer_positions"][0, 0]) + 1, normalised_pixels(alone), []
    answers = [model.tokenizer.encode(f"COUNT: {number}", add_special_tokens=False) + [end] for number in numbers]
    for _, group in groupby(answers, len):
        for chunk in torch.tensor(list(group)).split(250):  # [N, A]
            rows = len(chunk)
            ids = torch.cat([alone["input_ids"][:, :start].expand(rows, -1), chunk], dim=1)
            kinds = alone["mm_token_type_ids"][:, :start].expand(rows, -1)
            logits = model.network(
                input_ids=ids, mm_token_type_ids=torch.cat([kinds, torch.zeros_like(chunk, dtype=torch.int)], dim=1),
                pixel_values=pixels.repeat(rows, 1), image_grid_thw=alone["image_grid_thw"].expand(rows, -1),
            ).logits[:, start - 1 : -1]  # fmt: skip
            log_p = logits.double().log_softmax(-1).gather(2, chunk[..., None])[..., 0]
            found += log_p.sum(dim=1).tolist()
    return np.array(found)


@pytest.fixture
def half_taught(taught, mixed_samples):
    """A model after a few steps towards the answers, and their batch: digits are likely then, but not sure."""
    model = taught(12)
    return model, Collate(model.tokenizer, model.image_processor)(mixed_samples)


@torch.no_grad()
def log_probabilities(model, batch, **choices):
    return count_log_probabilities(model, read_prompts(model.network, batch), **choices)[0]


@pytest.mark.slow
def test_each_number_is_as_probable_as_its_whole_answer(half_taught, mixed_samples):
    """All numbers up to 99, and the most probable ones, for images of different sizes in one batch."""
    tiny, batch = half_taught
    found = log_probabilities(tiny, batch, digits=3)
    assert found.shape == (4, 1000) and found[:, :100].isfinite().all()
    assert (found.exp().sum(dim=1) <= 1 + 1e-6).all() and (found.exp().sum(dim=1) > 0.05).all()
    for i, numbers in ((0, range(100)), (3, found[3].topk(12).indices.sort().values.tolist())):
        np.testing.assert_allclose(found[i, numbers], scored(tiny, mixed_samples[i], numbers), atol=2e-4)


@pytest.mark.slow
def test_a_model_that_answers_around_600_is_as_unsure_as_it_is(tiny):
    """Each number up to 1,299, and some beyond, scored in plain transformers: far more than one pass follows."""
    picture = Picture(Image.effect_noise((64, 64), 60), "apples")
    collate, network = Collate(tiny.tokenizer, tiny.image_processor), tiny.network
    optimizer, rng = torch.optim.AdamW(network.parameters(), lr=1e-3), np.random.default_rng(0)
    for _ in range(60):
        said = [f"COUNT: {number:.0f}" for number in rng.normal(600, 150, 16).clip(0)]
        ids = [[*tiny.tokenizer.encode(text, add_special_tokens=False), tiny.tokenizer.eos_token_id] for text in said]
        batch = collate([picture] * len(ids), ids)
        optimizer.zero_grad()
        (count_loss(answer_logits(network, batch)[0], batch["answer_labels"]) / batch["answer_tokens"]).backward()
        optimizer.step()
    (found,) = predict_samples(tiny, [picture])
    numbers, few = np.r_[:1300, 1300:10_000:87], 1300
    true, said = np.exp(scored(tiny, picture, numbers)), found.covered * found.distribution[numbers]
    assert np.abs(true - said).sum() < 0.01 and true[:few].sum() > 0.7
    assert found.covered + found.no_number + found.not_followed == pytest.approx(1) and found.not_followed < 0.01
    first, last = found.interval(0.9)
    assert last - first > 300 and last < few
    assert true[first : last + 1].sum() / found.covered == pytest.approx(0.9, abs=0.02)


# --- The search alone, over models that are a table of probabilities


def tree_of(tables):
    """`first` and `next_log_p` of models that answer number n with probability table[n]: [B, 100,000].

    What "0" holds beyond the table's is leading zeros: a hundredth.  The rest is words.
    """
    beginning = np.zeros((len(tables), 1_000_000))  # of all answers that begin so
    beginning[:, :100_000] = tables
    for low in (10_000, 1000, 100, 10, 1):
        beginning[:, low : 10 * low] += beginning[:, 10 * low : 100 * low].reshape(len(tables), -1, 10).sum(axis=2)
    beginning[:, 0] += 0.01
    followed = [set() for _ in tables]

    def next_log_p(numbers):
        for row, seen in zip(numbers.tolist(), followed, strict=True):
            assert all(n < 10 or n // 10 in seen for n in row), "each after the one that is shorter by a digit"
            seen.update(row)
        rows = np.arange(len(tables))[:, None]
        further = [beginning[rows, 10 * numbers + digit] * (numbers > 0).numpy() for digit in range(10)]
        after = np.stack([*further, tables[rows, numbers]], axis=-1) + 1e-40
        return torch.from_numpy(np.log(after / (beginning[rows, numbers][..., None] + 1e-30)))

    return torch.from_numpy(np.log(beginning[:, :10] + 1e-40)), next_log_p, followed


def normal(mean, deviation, share=0.9):
    table = np.exp(-((np.arange(100_000) - mean) ** 2) / (2 * deviation**2))
    return share * table / table.sum()


def said(*numbers, share=0.9):
    table = np.zeros(100_000)
    table[list(numbers)] = share / len(numbers)
    return table


TABLES = {
    "one digit": said(7), "around 37": normal(37, 3), "around 600": normal(600, 150), "around 3000": normal(3000, 800),
    "of any length": said(0, 4, 44, 444, 4444), "every number": said(*range(10_000)),
    "hardly any": normal(600, 150, 1e-9), "beyond 9,999": said(25081, 49), "across 9,999": normal(10_000, 400),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_search_finds_what_the_numbers_hold(name):
    table = TABLES[name][None]
    (log_p,), (rest,) = follow_numbers(*tree_of(table)[:2])
    true, found = table[0, :10_000], log_p.exp().numpy()
    assert np.abs(found - true).sum() <= 0.0011 * true.sum()
    reached = np.isfinite(found) & (found > 0)
    np.testing.assert_allclose(found[reached], true[reached], rtol=1e-6, atol=1e-20)
    assert found.sum() + float(rest) == pytest.approx(table.sum(), rel=1e-6), "leading zeros and words are in neither"
    found, true = found / found.sum(), true / true.sum()
    assert found @ np.arange(10_000) == pytest.approx(true @ np.arange(10_000), rel=0.01)


def test_a_picture_s_numbers_do_not_depend_on_its_neighbours():
    tables = np.stack([TABLES[name] for name in ("one digit", "around 37", "around 600", "beyond 9,999")])
    log_p, rest = follow_numbers(*tree_of(tables)[:2])
    for i in range(len(tables)):
        alone, its_rest = follow_numbers(*tree_of(tables[i : i + 1])[:2])
        torch.testing.assert_close(log_p[i], alone[0])
        assert rest[i] == its_rest


def test_a_sure_model_costs_few_passes():
    first, next_log_p, (followed,) = tree_of(TABLES["around 37"][None])
    follow_numbers(first, next_log_p)
    assert len(followed) <= 10 + 90


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
