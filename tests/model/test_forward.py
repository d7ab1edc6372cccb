"""The pass is transformers' own: outputs and gradients, images at once or one by one, compiled or not."""

import copy
import pickle
import shutil

import pytest
import torch
import torch._dynamo
from plain import plain_inputs
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface

from fsc147lib.model import attention
from fsc147lib.model.attention import IMPLEMENTATIONS, vision_attention
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import answer_logits, encode_images, normalised_pixels, read_prompts
from fsc147lib.model.heatmaps import make_heatmap
from fsc147lib.model.load import load_model
from fsc147lib.model.network import CountingModel, PatchProduct, compile_layers, freeze_vision
from fsc147lib.training.losses import DualLoss


@pytest.mark.parametrize("form", ["bytes", "numbers"])
def test_image_features_are_the_library_s(tiny, plain, mixed_samples, form):
    """Of images of four sizes, with the gradients of the encoder's weights."""
    made = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    pixels = normalised_pixels(made)
    embeddings, *deepstack = encode_images(tiny.network, made if form == "bytes" else {**made, "pixel_values": pixels})
    theirs = plain.model.visual(pixels, grid_thw=made["image_grid_thw"])
    pairs = [(embeddings, theirs.pooler_output), *zip(deepstack, theirs.deepstack_features, strict=True)]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    sum((got**2).sum() for got, _ in pairs).backward()
    sum((expected**2).sum() for _, expected in pairs).backward()
    for (name, ours), other in zip(
        tiny.network.model.visual.named_parameters(), plain.model.visual.parameters(), strict=True
    ):
        bound = 1e-3 * float(other.grad.abs().max())
        torch.testing.assert_close(ours.grad, other.grad, atol=bound, rtol=1e-3, msg=name)


def test_gradients_of_every_weight_are_the_library_s(tiny, plain, batch):
    """Of the count loss: transformers' own loss over its own eager attention."""
    plain(**plain_inputs(batch), labels=batch["labels"]).loss.backward()
    DualLoss(tiny.network)(batch, 0).total.backward()
    for (name, ours), theirs in zip(tiny.network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-2, msg=name)


def test_places_of_patches_are_what_the_encoder_would_compute(tiny, plain, batch, monkeypatch):
    """Plain transformers gives the same features without them, and others with wrong ones."""
    given, real = {}, tiny.network.model.get_image_features
    monkeypatch.setattr(
        tiny.network.model, "get_image_features", lambda *args, **named: given.update(named) or real(*args, **named)
    )
    made = encode_images(tiny.network, batch)[0]
    grid, pixels = batch["image_grid_thw"], normalised_pixels(batch)
    places = {name: given[name] for name in ("interp_indices", "interp_weights", "position_ids")}
    wrong = {**places, "position_ids": places["position_ids"].flip(0)}
    with_them, without, moved = (
        torch.cat(plain.model.get_image_features(pixels, grid, return_dict=True, **named).pooler_output)
        for named in (places, {}, wrong)
    )
    assert torch.equal(with_them, without)
    torch.testing.assert_close(made, without, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(made, moved, atol=1e-3), "the tables are not looked at"


def test_the_product_of_patches_is_their_convolution(plain, batch, tmp_path):
    """Same outputs and gradients, same names, in a copy and in a saved folder."""
    conv, patches = plain.model.visual.patch_embed.proj, normalised_pixels(batch).unflatten(1, (3, 2, 16, 16))
    names = list(plain.state_dict())
    tiny = load_model("tiny-random")
    model = CountingModel(plain, tiny.tokenizer, tiny.image_processor)
    product = plain.model.visual.patch_embed.proj
    assert type(product) is PatchProduct and product.weight is conv.weight and list(plain.state_dict()) == names
    model.save(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(saved["model.visual.patch_embed.proj.weight"], conv.weight)
    wanted = conv(patches)
    for one in (product, copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        torch.testing.assert_close(one(patches), wanted, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(one(patches).square().sum(), conv.weight)[0] for one in (product, conv))
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


def test_a_name_with_flash_gets_all_images_in_one_call(tiny, batch):
    """No contract of transformers says so: a release that drops it would attend image by image, or across images."""
    calls = []

    def watched(module, query, *args, **kwargs):
        calls.append((query.shape[2], kwargs["cu_seq_lens_q"].tolist(), kwargs["max_length_q"]))
        return vision_attention(module, query, *args, **kwargs)

    AttentionInterface.register(IMPLEMENTATIONS["vision_config"], watched)
    try:
        encode_images(tiny.network, batch)
        tiny.network.model.visual(normalised_pixels(batch), grid_thw=batch["image_grid_thw"])  # as `generate` does
    finally:
        AttentionInterface.register(IMPLEMENTATIONS["vision_config"], vision_attention)
    lengths = batch["image_grid_thw"].prod(dim=1)
    bounds = [0, *lengths.cumsum(0).tolist()]
    assert calls == [(bounds[-1], bounds, int(lengths.max()))] * 2 * len(tiny.network.model.visual.blocks)


@pytest.mark.parametrize("method", ["attention", "token_gradient", "input_gradient"])
def test_only_what_is_differentiated_twice_leaves_the_fast_backend(tiny, batch, monkeypatch, method):
    """Flash and memory-efficient attention have no second derivative.  Language model and encoder have four layers."""
    chosen, real = [], attention.sdpa_kernel
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backends: chosen.append(backends) or real(backends))
    heatmap = make_heatmap(tiny.network, method)
    heatmap(batch, create_graph=True)
    assert chosen.count(SDPBackend.MATH) == {"attention": 0, "token_gradient": 4, "input_gradient": 8}[method]
    chosen.clear()
    heatmap(batch)
    assert len(chosen) == 8 and SDPBackend.MATH not in chosen


def test_a_deep_copy_computes_with_its_own_weights(tiny, batch):
    """Also after the original has moved on."""
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


# --- Compiled layers


@pytest.fixture
def eager_graphs(monkeypatch):
    """Layers are traced and guarded as ever, but each graph runs as it is: no C++ compiler, seconds for minutes."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile_(module, backend="aot_eager", **how))
    limit = torch.compiler.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.config.recompile_limit = limit
    torch._dynamo.reset()


def losses_and_gradients(network, batches, rows_of):
    network.zero_grad()
    loss = DualLoss(network, heatmap=make_heatmap(network, layers=rows_of))
    parts = [loss(batch, 0.1) for batch in batches]
    sum(part.total for part in parts).backward()
    return [part.attention.item() for part in parts], [p.grad.clone() for p in network.parameters() if p.requires_grad]


def check_compiled(network, batches):
    """Losses and gradients of several batches are as before once the layers are compiled; the layers looked at."""
    rows_of = (1, 3)
    plain = losses_and_gradients(network, batches, rows_of)
    compile_layers(network, rows_of)
    compiled = losses_and_gradients(network, batches, rows_of)
    assert plain[0] == pytest.approx(compiled[0], rel=1e-5)
    for one, other in zip(plain[1], compiled[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    return rows_of


@pytest.mark.slow
@pytest.mark.parametrize(("images", "most"), [("kept", 4), ("pixels", 15)])
def test_compiled_layers_make_few_graphs(tiny, mixed_samples, eager_graphs, images, most):
    """None for a width, a number of images or a layer.  On a CPU the encoder's attention lies between two graphs."""
    network, collate = tiny.network, Collate(tiny.tokenizer, tiny.image_processor)
    batches = [collate([mixed_samples[i] for i in places]) for places in ((0, 1, 2, 3), (2, 3), (0, 1, 2), (1, 0))]
    if images == "kept":
        freeze_vision(network, True)
        batches = [{**batch, "image_features": torch.stack(encode_images(network, batch), dim=1)} for batch in batches]
    counted = eager_graphs["stats"]
    rows_of = check_compiled(network, batches[:2])
    assert counted["unique_graphs"] <= most and bool(eager_graphs["graph_break"]) == (images == "pixels")
    with torch.compiler.set_stance("fail_on_recompile"):
        losses_and_gradients(network, batches[2:], rows_of)
    with torch.no_grad():  # is a kind of its own
        answer_logits(network, batches[0], rows_of=rows_of)
        assert counted["unique_graphs"] <= 2 * most
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in batches[1:]:
                answer_logits(network, batch, rows_of=rows_of)
        if images == "kept":
            made = counted["unique_graphs"]
            read_prompts(network, batches[0]).greedy(3, tiny.tokenizer.eos_token_id)
            assert counted["unique_graphs"] == made, "token by token nothing is compiled"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_do_the_same(tiny, mixed_samples):
    """With torch's own compiler."""
    collate = Collate(tiny.tokenizer, tiny.image_processor)
    check_compiled(tiny.network, [collate(mixed_samples[:3]), collate(mixed_samples[2:])])
