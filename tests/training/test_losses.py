"""The losses are the ones on paper, and their gradients are theirs."""

from itertools import combinations

import numpy as np
import pytest
import torch

from fsc147lib.data.targets import kl_divergence
from fsc147lib.model.answers import count_loss
from fsc147lib.model.collate import Collate, select_rows
from fsc147lib.model.device import choose_compute
from fsc147lib.model.forward import answer_logits, encode_images, normalised_pixels
from fsc147lib.model.heatmaps import make_heatmap
from fsc147lib.model.load import load_model
from fsc147lib.training.losses import DualLoss, squared_error
from fsc147lib.training.step import NonFiniteLoss, TrainingStep, make_accelerator


def test_count_loss_is_cross_entropy_of_the_answer(tiny, batch):
    logits = answer_logits(tiny.network, batch)[0].detach()
    total, tokens = 0.0, 0
    for row, labels in zip(logits.double().numpy(), batch["answer_labels"].numpy(), strict=True):
        for scores, label in zip(row, labels, strict=True):
            if label != -100:
                top = scores.max()
                total += top + np.log(np.exp(scores - top).sum()) - scores[label]
                tokens += 1
    assert float(count_loss(logits, batch["answer_labels"])) == pytest.approx(total, rel=1e-6)
    parts = DualLoss(tiny.network)(batch, 0.1)
    assert float(parts.count) == pytest.approx(total / tokens, rel=1e-6)


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    target, heatmap = torch.rand(2, 3, 14, 14, generator=generator, dtype=torch.float64)
    target[0, :7] = 0  # empty cells add nothing
    return [x / x.sum(dim=(1, 2), keepdim=True) for x in (target, heatmap)]


def test_kl_by_hand(maps):
    p, a = (x.numpy() for x in maps)
    expected = [
        sum(pi * np.log(pi / ai) for pi, ai in zip(x.ravel(), y.ravel(), strict=True) if pi > 0)
        for x, y in zip(p, a, strict=True)
    ]
    np.testing.assert_allclose(kl_divergence(*maps).numpy(), expected, rtol=1e-5)


def test_squared_error_by_hand(maps):
    p, a = (x.numpy() for x in maps)
    np.testing.assert_allclose(squared_error(*maps).numpy(), ((p - a) ** 2).sum(axis=(1, 2)), rtol=1e-5)


def test_kl_of_a_map_that_misses_is_finite():
    target, heatmap = torch.zeros(2, 1, 14, 14)
    target[0, 0, 0] = heatmap[0, 5, 5] = 1
    heatmap.requires_grad_()
    loss = kl_divergence(target, heatmap).sum()
    loss.backward()
    assert loss.isfinite() and heatmap.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_total_is_the_weighted_sum(tiny, batch, kind):
    parts = DualLoss(tiny.network, attention_loss=kind)(batch, 0.3)
    assert float(parts.total) == pytest.approx(float(parts.count) + 0.3 * float(parts.attention), rel=1e-6)
    assert float(parts.attention) > 0


def step_that_moves_nothing(network):
    optimizer, compute = torch.optim.SGD(network.parameters(), lr=0.0), choose_compute("fp32")
    return TrainingStep(DualLoss(network), optimizer, make_accelerator(compute), compute)


@pytest.mark.medium
@pytest.mark.parametrize("part", ["count", "attention"])
def test_a_part_that_is_not_finite_is_named(tiny, batch, part):
    step = step_that_moves_nothing(tiny.network)
    step([batch], 1.0)
    step.check()
    if part == "attention":
        batch["target"][0, 0, 0] = float("nan")
    else:
        torch.nn.init.constant_(tiny.network.model.language_model.norm.weight, float("nan"))
    step([batch], 1.0)
    with pytest.raises(NonFiniteLoss, match=f"the {part} loss is nan on {batch['names'][0]}"):
        step.check()


@pytest.mark.medium
@torch.no_grad()
def test_a_part_of_a_batch_is_a_batch(tiny, mixed_samples):
    """Rows 3 and 1 of bytes, of numbers and of kept features give the losses that they give in the whole."""
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    features = torch.stack(encode_images(tiny.network, batch), dim=1)
    whole, rows = answer_logits(tiny.network, batch)[0], [3, 1]
    for form in (batch, {**batch, "pixel_values": normalised_pixels(batch)}, {**batch, "image_features": features}):
        part = select_rows(form, rows)
        assert part["names"] == [batch["names"][row] for row in rows]
        torch.testing.assert_close(answer_logits(tiny.network, part)[0], whole[rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            make_heatmap(tiny.network)(part), make_heatmap(tiny.network)(batch)[rows], atol=1e-6, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention", "token_gradient"])
def test_a_loss_on_some_images_is_on_average_that_of_all(tiny, batch, monkeypatch, method):
    """Every choice of 2 of 4 images once: the mean of losses and gradients is that of the whole batch."""
    heatmap = make_heatmap(tiny.network, method)
    whole = DualLoss(tiny.network, heatmap=heatmap)(batch, 0.1)
    whole.total.backward()
    expected = [p.grad.clone() for p in tiny.network.parameters()]
    tiny.network.zero_grad()
    loss, choices = DualLoss(tiny.network, heatmap=heatmap, heatmap_images=2), list(combinations(range(4), 2))
    attention = 0.0
    for rows in choices:
        monkeypatch.setattr(loss, "chosen", lambda *_, rows=rows: list(rows))
        parts = loss(batch, 0.1)
        attention += parts.attention.item() / len(choices)
        (parts.total / len(choices)).backward()
    assert attention == pytest.approx(whole.attention.item(), rel=1e-5)
    for wanted, parameter in zip(expected, tiny.network.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-3)


def test_all_images_have_their_turn():
    """Among many batches each row is chosen about as often, and the same batch has the same choice."""
    loss, seen = DualLoss(None, heatmap=object(), heatmap_images=2), np.zeros(8)
    for i in range(400):
        names = [f"{i}-{j}.jpg" for j in range(8)]
        assert loss.chosen(names, list(range(8))) == loss.chosen(list(names), list(range(8)))
        seen[loss.chosen(names, list(range(8)))] += 1
    assert seen.sum() == 800 and abs(seen - 100).max() < 40
    assert {len(loss.chosen([str(i)], [3, 5, 6])) for i in range(9)} == {2} and loss.chosen(names, [3]) == [3]


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(("method", "images"), [("attention", None), ("token_gradient", None), ("token_gradient", 5)])
def test_empty_scenes_have_no_attention_loss(tiny, mixed_samples, empty_samples, kind, method, images):
    """Neither their maps nor their number is in it: loss and gradient are those of the other images alone."""
    collate, found = Collate(tiny.tokenizer, tiny.image_processor), []
    loss = DualLoss(tiny.network, make_heatmap(tiny.network, method), kind, images)
    for samples in (mixed_samples, [empty_samples[0], *mixed_samples, empty_samples[1]]):
        tiny.network.zero_grad()
        parts = loss(collate(samples), 1.0)
        parts.attention.backward()
        gradients = [p.grad for p in tiny.network.parameters() if p.grad is not None]
        found.append((parts.attention.item(), gradients))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for wanted, gradient in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-3)
    count = DualLoss(tiny.network)(collate([empty_samples[0], *mixed_samples, empty_samples[1]]), 0.0).count
    assert parts.count.item() == pytest.approx(count.item(), rel=1e-5)  # but they are answered like all others


@pytest.mark.medium
@pytest.mark.parametrize("images", [None, 1])
def test_a_batch_of_empty_scenes_is_not_looked_at(tiny, empty_samples, images):
    batch = Collate(tiny.tokenizer, tiny.image_processor)(empty_samples)
    parts = DualLoss(tiny.network, heatmap_images=images)(batch, 1.0)
    parts.total.backward()
    assert parts.attention.item() == 0 and parts.total.item() == parts.count.item() > 0
    assert all(p.grad.isfinite().all() for p in tiny.network.parameters())


@pytest.mark.medium
def test_a_window_is_divided_by_its_images_with_objects(tiny, mixed_samples, empty_samples):
    """In whatever batches they come; a window without any says that there was no attention loss."""
    step, collate = step_that_moves_nothing(tiny.network), Collate(tiny.tokenizer, tiny.image_processor)
    whole, norm = step([collate([*mixed_samples, *empty_samples])], 1.0)
    for cut in (1, 4):  # one with and one without an empty scene; all with objects, and none
        samples = [*mixed_samples, *empty_samples]
        parts, parts_norm = step([collate(samples[:cut]), collate(samples[cut:])], 1.0)
        assert parts.attention.item() == pytest.approx(whole.attention.item(), rel=1e-5)
        assert parts_norm.item() == pytest.approx(norm.item(), rel=1e-4)
    alone, _ = step([collate(empty_samples[:1]), collate(empty_samples[1:])], 1.0)
    assert alone.attention is None and alone.total.item() == alone.count.item()
    step.check()


WEIGHTS = (
    "model.visual.patch_embed.proj.weight",
    "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    "model.visual.merger.linear_fc2.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.mlp.down_proj.weight",
    "model.language_model.layers.2.self_attn.k_proj.weight",
    "model.language_model.layers.3.self_attn.q_norm.weight",
)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_attention_gradient_is_the_finite_difference(float64, mixed_samples, kind):
    """Central differences along a random direction of each weight, in float64."""
    model = load_model("tiny-random", dtype=torch.float64)
    batch = Collate(model.tokenizer, model.image_processor)(mixed_samples[:2])
    batch = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in batch.items()
    }
    loss = DualLoss(model.network, attention_loss=kind)
    loss(batch, 0.1).attention.backward()
    generator = torch.Generator().manual_seed(0)
    for name in WEIGHTS:
        weight = model.network.get_parameter(name)
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        slope = float((weight.grad * direction).sum())
        step, sides = 1e-4, []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * step * direction
                sides.append(float(loss(batch, 0.1).attention))
                weight -= sign * step * direction
        assert abs(slope) > 1e-9, name
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-4), name
