"""Questions are read once; answers that follow, given or the model's own, are those of whole passes."""

import pytest
import torch
from plain import generated, plain_inputs, plain_network

from fsc147lib.model.answers import count_log_probabilities, own_answers
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import answer_logits, read_prompts
from fsc147lib.model.load import SHIPPED, load_model

LAYERS = (0, 1, 2, 3)


@pytest.fixture
def prompts(tiny, batch):
    return read_prompts(tiny.network.eval(), batch)


@torch.no_grad()
def test_answers_read_behind_their_questions_are_those_of_one_pass(tiny, prompts, batch):
    """Logits and attention rows, on a padded batch; a row of a shorter question knows nothing of the padding."""
    expected, whole = answer_logits(tiny.network, batch, rows_of=LAYERS)
    logits, rows = prompts.read_answers(batch, LAYERS)
    used, length = batch["answer_labels"] != -100, prompts.seen.shape[1]
    torch.testing.assert_close(logits[used], expected[used], atol=1e-5, rtol=1e-5)
    for i, size in enumerate((batch["answer_positions"][:, 0]).tolist()):  # tokens before the question's last one
        for layer in LAYERS:
            got, wanted = rows[layer][i][:, used[i]], whole[layer][i][:, used[i]]  # [H, A, K]
            torch.testing.assert_close(got[..., :size], wanted[..., :size], atol=1e-6, rtol=1e-5)
            answers = got.shape[1]
            of_answer = got[..., length : length + answers], wanted[..., size : size + answers]
            torch.testing.assert_close(*of_answer, atol=1e-6, rtol=1e-5)
            assert not got[..., size:length].any() and not got[..., length + answers :].any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-dual", "tiny-random"])
def test_greedy_answers_are_generate_s(name, tiny_folder, mixed_samples):
    """Token by token, of images of four sizes in one batch; one model says numbers, the other one never ends."""
    model = load_model(name)
    plain = plain_network(tiny_folder if name == "tiny-random" else SHIPPED / name)
    batch = Collate(model.tokenizer, model.image_processor)(mixed_samples)
    said, _ = own_answers(model, batch, 12)
    assert said == generated(plain, batch, model.tokenizer, 12)
    assert len({tuple(answer) for answer in said}) > 1, "one answer to all images tests little"


@torch.no_grad()
def test_each_greedy_token_is_the_most_probable_of_a_whole_pass(tiny, plain, mixed_samples):
    """Without a cache, image by image, in transformers' own eager attention."""
    collate = Collate(tiny.tokenizer, tiny.image_processor)
    said, _ = own_answers(tiny, collate(mixed_samples))
    for sample, answer in zip(mixed_samples, said, strict=True):
        alone = collate([sample], [answer])
        logits = plain(**plain_inputs(alone)).logits[0, alone["answer_positions"][0]]
        assert logits.argmax(dim=-1).tolist() == answer


def test_the_right_answer_is_hidden_from_own_ones(tiny, mixed_samples):
    """A batch holds it behind each question."""
    collate, tokenizer = Collate(tiny.tokenizer, tiny.image_processor), tiny.tokenizer
    other = [tokenizer.encode("COUNT: 5 apples, as anybody can see") for _ in mixed_samples]
    tiny.network.eval()
    (said, _), (again, _) = (
        own_answers(tiny, batch) for batch in (collate(mixed_samples), collate(mixed_samples, other))
    )
    assert said == again


def test_after_an_end_there_are_only_ends(tiny, prompts):
    said = prompts.greedy(12, end=-1)
    end = int(said[0, 2])  # as if the first image's answer were over then
    again = prompts.greedy(12, end)
    for answer, ended in zip(said.tolist(), again.tolist(), strict=True):
        kept = answer.index(end) + 1 if end in answer else len(ended)
        assert ended[:kept] == answer[:kept] and set(ended[kept:]) <= {end}


@torch.no_grad()
@pytest.mark.parametrize("use", ["read_answers", "greedy", "count_log_probabilities"])
def test_the_cache_is_as_before(tiny, prompts, batch, use):
    """So that any of them may follow another."""
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prompts.cache.layers]
    if use == "read_answers":
        prompts.read_answers(batch, LAYERS)
    elif use == "greedy":
        prompts.greedy(7, tiny.tokenizer.eos_token_id)
    else:
        count_log_probabilities(tiny, prompts, digits=2)
    assert len(before) == len(prompts.cache.layers) == 4
    for (keys, values), layer in zip(before, prompts.cache.layers, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    assert prompts.cache.get_seq_length() == prompts.seen.shape[1]
