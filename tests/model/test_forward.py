"""The fast pass is the library's pass: outputs, gradients, greedy answers; compiled or not."""

import copy
import pickle
import shutil

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache

from fsc147lib.model.answers import agreement, greedy_tokens
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import answer_logits, encode_images, normalised_pixels
from fsc147lib.model.heatmaps import Heatmap
from fsc147lib.model.layers import attention_by_size
from fsc147lib.model.load import load_model
from fsc147lib.model.network import freeze_vision
from fsc147lib.training.losses import DualLoss


@pytest.mark.parametrize("lengths", [(6, 6, 6), (4, 4, 9, 1, 4), (7,)])
def test_attention_by_size_is_attention_image_by_image(lengths):
    query, key, value = (torch.randn(4, sum(lengths), 16, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    got = attention_by_size(query, key, value, bounds, scaling=0.3)
    parts = [x.split(lengths, dim=1) for x in (query, key, value)]
    each = [F.scaled_dot_product_attention(*one, scale=0.3) for one in zip(*parts, strict=True)]
    expected = torch.cat(each, dim=1).transpose(0, 1)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (got, expected)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.fixture
def library():
    """The same tiny model, for transformers' own forward methods."""
    return load_model("tiny-random").network


@pytest.mark.medium
@pytest.mark.parametrize("form", ["bytes", "numbers"])
def test_image_features_are_the_library_s(tiny, library, mixed_samples, form):
    """Of images of four sizes, with the gradients of the encoder's weights."""
    made = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    pixels = normalised_pixels(made)
    embeddings, *deepstack = encode_images(tiny.network, made if form == "bytes" else {**made, "pixel_values": pixels})
    theirs = library.model.visual(pixels, grid_thw=made["image_grid_thw"])
    pairs = [(embeddings, theirs.pooler_output), *zip(deepstack, theirs.deepstack_features, strict=True)]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    sum((got**2).sum() for got, _ in pairs).backward()
    sum((expected**2).sum() for _, expected in pairs).backward()
    for name in ("patch_embed.proj.weight", "pos_embed.weight", "blocks.1.attn.qkv.weight", "merger.linear_fc2.weight"):
        got, expected = (network.model.visual.get_parameter(name).grad for network in (tiny.network, library))
        torch.testing.assert_close(got, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


def test_gradients_of_the_language_model_are_the_library_s(tiny, library, batch):
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "labels")
    library(**{key: batch[key] for key in keys}).loss.backward()
    DualLoss(tiny.network, weight=0)(batch).total.backward()
    for (name, ours), theirs in zip(tiny.network.named_parameters(), library.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-2, msg=name)


def test_a_deep_copy_computes_with_its_own_weights(tiny, batch):
    """Also after the original's patch embedding, attention and head have moved on."""
    expected, _ = answer_logits(tiny.network, batch)
    copied = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in tiny.network.parameters():
            parameter.mul_(0.5)
    assert torch.equal(answer_logits(copied.network, batch)[0], expected)
    assert not torch.allclose(answer_logits(tiny.network, batch)[0], expected, atol=0.1)


def test_a_model_is_pickled_whole(tiny, batch):
    """As worker processes get it."""
    again = pickle.loads(pickle.dumps(tiny))
    assert torch.equal(answer_logits(again.network, batch)[0], answer_logits(tiny.network, batch)[0])
    assert again.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()


@pytest.mark.slow
@torch.no_grad()
def test_the_right_answer_is_hidden_from_free_answers(taught, mixed_samples):
    """The keys of the forced answer stand behind each prompt: another forced answer must change nothing."""
    tiny = taught(12)
    spoken = []
    for change in (0, 1):
        batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
        forced = batch["answer_positions"] + 1
        other = (batch["input_ids"].gather(1, forced) + change) % 200  # other tokens in the answer's place
        batch["input_ids"] = batch["input_ids"].scatter(1, forced, other)
        batch["answer_labels"] = batch["answer_labels"].where(batch["answer_labels"] < 0, other)
        logits, trace = answer_logits(tiny.network, batch, keep_keys=True)
        end = tiny.tokenizer.eos_token_id
        agreed = agreement(batch, logits, end)
        spoken.append(greedy_tokens(tiny.network, batch, logits, trace.keys_values, agreed, 9, end))
    assert torch.equal(*spoken)


def test_the_trace_holds_what_enters_a_layer(tiny, batch):
    caught = {}
    for layer in (0, 2):
        norm = tiny.network.model.language_model.layers[layer].input_layernorm
        hook = norm.register_forward_pre_hook(lambda module, args: caught.update(state=args[0]))
        logits, trace = answer_logits(tiny.network, batch, gradient_from=layer)
        hook.remove()
        assert torch.equal(trace.inputs[0], caught["state"])
        assert len(trace.inputs) == 1 + (layer == 0)  # and the features of the one deepstack layer, 0
        assert torch.equal(logits, answer_logits(tiny.network, batch)[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_do_the_same_with_few_graphs(tiny, mixed_samples):
    """Two batches of other shapes: the same losses and gradients, and no graph for each layer or each width."""
    collate = Collate(tiny.tokenizer, tiny.image_processor)
    batches = [collate(mixed_samples[:3]), collate(mixed_samples[2:])]
    freeze_vision(tiny.network, True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        tiny.network.zero_grad()
        loss = DualLoss(tiny.network, heatmap=Heatmap(tiny.network, compiled=compiled))
        parts = [loss(batch) for batch in batches]
        sum(part.total for part in parts).backward()
        gradients = [p.grad.clone() for p in tiny.network.parameters() if p.grad is not None]
        found.append(([part.attention.item() for part in parts], gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for plain, compiled in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(plain, compiled, atol=1e-5, rtol=1e-3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@torch.no_grad()
def test_a_second_start_finds_every_graph(tiny, batch):
    """Those that leave autocast for their rows as well, and none is traced twice."""
    found, heatmap = torch._dynamo.utils.counters, Heatmap(tiny.network, compiled=True)
    with fresh_cache(), torch.autocast("cpu", torch.bfloat16):
        for start in ("first", "second"):
            torch._dynamo.reset()
            found.clear()
            heatmap(batch)
            hits = found["aot_autograd"]["autograd_cache_hit"]
            assert hits == (found["stats"]["unique_graphs"] if start == "second" else 0)
