"""Gradient heatmaps are finite differences of the answer's log-probability; so are the gradients that train them."""

import pytest
import torch

from fsc147lib.data.targets import resample_map
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import answer_logits, encode_images, normalised_pixels
from fsc147lib.model.heatmaps import METHODS, make_heatmap
from fsc147lib.model.load import load_model
from fsc147lib.model.network import freeze_vision
from fsc147lib.training.loop import TrainConfig, train
from fsc147lib.training.losses import DualLoss
from fsc147lib.training.step import lazy_weight

TRAINABLE = ("attention", "token_gradient", "input_gradient")


def in_float64(batch):
    return {key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in batch.items()}  # fmt: skip


@pytest.fixture
def exact(float64, mixed_samples):
    """The tiny model and a batch of two images in float64."""
    model = load_model("tiny-random", dtype=torch.float64)
    return model.network, in_float64(Collate(model.tokenizer, model.image_processor)(mixed_samples[1:3]))


def score(network, batch, **choices):
    """Log-probability of each answer's digits, read off the logits: [B]."""
    logits = answer_logits(network, batch, **choices)[0].log_softmax(dim=-1)
    picked = logits.gather(-1, batch["answer_labels"].clamp_min(0)[..., None])[..., 0]
    return (picked * (batch["digit_weights"] > 0)).sum(dim=1)


def on_grid(tokens, batch):
    """Values of the visual tokens [V] of a batch, image by image: folded, moved to 14x14, scaled to sum 1."""
    maps, start = [], 0
    for _, height, width in (batch["image_grid_thw"] // 2).tolist():
        part = tokens[start : start + height * width].reshape(height, width)
        moved = torch.from_numpy(resample_map(part.numpy(), (14, 14)))
        maps.append(moved / moved.sum())
        start += height * width
    return torch.stack(maps)


def test_token_gradient_is_the_features_finite_difference(exact):
    """A dozen channels of random tokens, embedded and deepstack, by differences; the map is their |g * e| summed."""
    network, batch = exact
    with torch.no_grad():
        features = encode_images(network, batch)
    leaves = [feature.clone().requires_grad_() for feature in features]
    score(network, batch, features=leaves).sum().backward()
    generator = torch.Generator().manual_seed(0)
    for kind, leaf in enumerate(leaves):
        for index in torch.randint(leaf.numel(), (6,), generator=generator).tolist():
            place, sides = divmod(index, leaf.shape[1]), []
            for step in (1e-5, -1e-5):
                moved = [feature.clone() for feature in features]
                moved[kind][place] += step
                with torch.no_grad():
                    sides.append(score(network, batch, features=moved).sum().item())
            assert leaf.grad[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-8), kind
    assert len(leaves) == 2
    tokens = sum((feature * leaf.grad).abs().sum(dim=-1) for feature, leaf in zip(features, leaves, strict=True))
    got = make_heatmap(network, "token_gradient")(batch)
    torch.testing.assert_close(got, on_grid(tokens, batch), atol=1e-9, rtol=1e-6)


@pytest.mark.slow
def test_input_gradient_is_the_pixels_finite_difference(exact):
    """Each pixel of two visual tokens of one image; the rest of that image follows from a ratio of the map."""
    network, batch = exact
    heatmap = make_heatmap(network, "input_gradient")
    pixels = normalised_pixels(batch)
    leaf = pixels.clone().requires_grad_()
    score(network, {**batch, "pixel_values": leaf}).sum().backward()
    generator = torch.Generator().manual_seed(0)
    for index in torch.randint(pixels.numel(), (12,), generator=generator).tolist():
        place, sides = divmod(index, pixels.shape[1]), []
        for step in (1e-4, -1e-4):
            moved = pixels.clone()
            moved[place] += step
            with torch.no_grad():
                sides.append(score(network, {**batch, "pixel_values": moved}).sum())
        assert float(leaf.grad[place]) == pytest.approx(float(sides[0] - sides[1]) / 2e-4, rel=1e-4, abs=1e-9)
    tokens = leaf.grad.abs().sum(dim=1).reshape(-1, 4).sum(dim=1)
    torch.testing.assert_close(heatmap(batch), on_grid(tokens, batch), atol=1e-9, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["vision trains", "vision frozen"])
@pytest.mark.parametrize("method", TRAINABLE)
def test_gradient_of_the_attention_loss_is_its_finite_difference(exact, method, frozen):
    network, batch = exact
    freeze_vision(network, frozen)
    loss = DualLoss(network, heatmap=make_heatmap(network, method))
    loss(batch, 0.1).attention.backward()
    names = ["embed_tokens.weight", "layers.0.mlp.down_proj.weight", "layers.2.self_attn.k_proj.weight"]
    names += ["norm.weight"] if method != "attention" else []  # nothing is attended to behind it
    names = [f"model.language_model.{name}" for name in names]
    if not frozen:
        names += ["model.visual.patch_embed.proj.weight", "model.visual.blocks.1.attn.qkv.weight"]
    generator = torch.Generator().manual_seed(1)
    for name in names:
        weight = network.get_parameter(name)
        direction = torch.randn(weight.shape, generator=generator)
        direction /= direction.norm()
        sides = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                weight += step * direction
                sides.append(loss(batch, 0.1).attention.item())
                weight -= step * direction
        slope = (weight.grad * direction).sum().item()
        assert abs(slope) > 1e-9, name
        # |.| has kinks: of 10,000 pixels' signs a few may turn between the two sides
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(slope, rel=5e-3, abs=1e-6), name


@pytest.mark.medium
@pytest.mark.parametrize("method", [name for name in METHODS if name != "occlusion"])  # hides bytes: test_occlusion
def test_every_method_is_a_distribution_and_leaves_no_trace(tiny, batch, method):
    """Also with gradients off, with a plain dict, and without hooks or gradients left behind."""
    heatmap = make_heatmap(tiny.network, method)
    with torch.no_grad():
        result = heatmap(dict(batch))
    assert not result.requires_grad and (result >= 0).all()
    torch.testing.assert_close(result.sum(dim=(1, 2)), torch.ones(4))
    assert all(p.grad is None for p in tiny.network.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.network.modules())
    logits, *_ = heatmap.with_logits(batch)
    used = batch["answer_labels"] != -100
    torch.testing.assert_close(logits[used], answer_logits(tiny.network, batch)[0][used], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINABLE)
def test_one_pass_serves_both_losses(tiny, batch, method):
    """The count loss beside a heatmap has the gradient that it has alone."""
    DualLoss(tiny.network)(batch, 0).count.backward()
    alone = [p.grad.clone() for p in tiny.network.parameters()]
    for create_graph in (False, True):
        tiny.network.zero_grad()
        logits, *_ = make_heatmap(tiny.network, method).with_logits(batch, create_graph)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["answer_labels"].flatten()).backward()
        for expected, parameter in zip(alone, tiny.network.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINABLE)
def test_checkpointing_gives_the_same_gradients(tiny, batch, method):
    heatmap, gradients = make_heatmap(tiny.network, method), []
    for checkpointing in (False, True):
        if checkpointing:
            tiny.network.activation_checkpointing_enable({"use_reentrant": False})
        tiny.network.train()
        tiny.network.zero_grad()
        DualLoss(tiny.network, heatmap=heatmap)(batch, 0.1).total.backward()
        gradients.append([p.grad.clone() for p in tiny.network.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_lazy_regularisation_has_the_same_mean_gradient(tiny, batch):
    """K steps, one of them with weight K w: their mean gradient is that of every step with weight w."""
    weights = [lazy_weight(0.1, 4, step) for step in range(8)]
    assert weights == pytest.approx([0.4, 0, 0, 0] * 2)
    loss, sums = DualLoss(tiny.network, heatmap=make_heatmap(tiny.network, "token_gradient")), []
    for plan in (weights[:4], [0.1] * 4):
        tiny.network.zero_grad()
        for weight in plan:
            (loss(batch, weight).total / 4).backward()
        sums.append([p.grad.clone() for p in tiny.network.parameters()])
    for lazy, every in zip(*sums, strict=True):
        torch.testing.assert_close(lazy, every, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_a_lazy_run_logs_what_it_looked_at(root, tmp_path):
    config = TrainConfig(data=root, model="tiny-random", out=tmp_path / "run", batch_size=4, epochs=1,
                         heatmap="token_gradient", heatmap_every=3, attention_weight=0.1,
                         log_every=1, tracking="disabled")  # fmt: skip
    result = train(config)
    seen = [line["attention_loss"] is not None for line in result.steps]
    assert seen == [True, False, False] * 2
    assert result.steps[0]["total"] == pytest.approx(
        result.steps[0]["count_loss"] + 0.3 * result.steps[0]["attention_loss"], rel=1e-5
    )
    assert result.steps[1]["total"] == pytest.approx(result.steps[1]["count_loss"], rel=1e-6)
