"""Deletion, insertion, re-drawn weights and chance levels, against computations by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from fsc147lib.data import FSC147, Picture, resample_map
from fsc147lib.evaluation import (
    alignment,
    evaluate_samples,
    faithfulness_table,
    measure_maps,
    own_against_true,
    own_against_true_table,
)
from fsc147lib.evaluation.faithfulness import CHANCE, rank_correlation, redrawn_networks, token_curves
from fsc147lib.model import Collate, choose_compute, load_model, make_heatmap
from fsc147lib.model.answers import digits_score
from fsc147lib.model.forward import answer_logits
from fsc147lib.model.looking import answered_batches
from fsc147lib.options import ConfigError


@pytest.fixture(scope="module")
def dual():
    return load_model("tiny-dual")


@torch.no_grad()
def test_curves_are_those_of_a_plain_loop_over_pictures_edited_by_hand(dual, mixed_samples):
    """Pictures of 6 x 8 and 7 x 7 tokens of 32 pixels, which the network gets as they are."""
    pictures = [Picture(sample.image.resize(size), "apples") for sample, size in
                zip(mixed_samples, ((256, 192), (224, 224)), strict=False)]  # fmt: skip
    collate = Collate(dual.tokenizer, dual.image_processor)
    answers = [dual.tokenizer.encode("COUNT: 3"), dual.tokenizer.encode("COUNT: 12")]
    maps = torch.from_numpy(np.random.default_rng(0).random((2, 14, 14)))
    curves = token_curves(dual.network, [collate(pictures, answers)], maps, 3)
    assert curves.shape == (2, 2, 4)
    for i, picture in enumerate(pictures):
        rows, columns = picture.size[0] // 32, picture.size[1] // 32
        values = resample_map(maps[i].numpy(), (rows, columns))
        order = sorted(((r, c) for r in range(rows) for c in range(columns)), key=lambda place: -values[place])
        for step in range(4):
            number = round(step * len(order) / 3)
            for kind, hidden in enumerate((order[:number], order[number:])):
                image = np.array(picture.image)
                for r, c in hidden:
                    image[32 * r : 32 * (r + 1), 32 * c : 32 * (c + 1)] = 127
                one = collate([Picture(Image.fromarray(image), "apples")], [answers[i]])
                expected = digits_score(answer_logits(dual.network, one)[0], one).item()
                assert curves[i, kind, step] == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_equal_cells_are_hidden_in_random_order(dual, mixed_samples):
    """Row by row they would hide the sky first, and a map with many zeros would look unfaithful for it."""
    batch = Collate(dual.tokenizer, dual.image_processor)(mixed_samples[:1])
    row_by_row = torch.linspace(1, 0, 196, dtype=torch.float64).view(1, 14, 14)
    even, rows = (token_curves(dual.network, [batch], maps, 4) for maps in
                  (torch.full_like(row_by_row, 1 / 196), row_by_row))  # fmt: skip
    assert np.abs(even - rows)[0, 0, 1:4].max() > 0.01
    np.testing.assert_allclose(even[:, :, [0, -1]], rows[:, :, [0, -1]], atol=1e-4)


def test_layers_are_redrawn_one_after_the_other(tiny):
    """From the last to the first, then the vision encoder; each tensor keeps its values in another order."""
    before = {name: weight.clone() for name, weight in tiny.network.named_parameters()}
    changed = []
    for layer, network in redrawn_networks(tiny.network):
        now = dict(network.named_parameters())
        changed.append((layer, {name for name in before if not torch.equal(now[name], before[name])}))
    assert [layer for layer, _ in changed] == ["layer 3", "layer 2", "layer 1", "layer 0", "vision"]
    assert all("layers.3." in name for name in changed[0][1]) and len(changed[0][1]) >= 7
    for (_, fewer), (_, more) in zip(changed, changed[1:], strict=False):
        assert fewer < more
    assert not any("embed_tokens" in name for name in changed[-1][1])
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(now[name].flatten().sort().values, before[name].flatten().sort().values)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.network.named_parameters())


def test_rank_correlation_is_scipy_s():
    rng = np.random.default_rng(0)
    first, second = (torch.from_numpy(rng.random((3, 14, 14))).round(decimals=1) for _ in range(2))
    second[2] = 1 / 196
    got = rank_correlation(first, second)
    for i in range(2):
        assert got[i] == pytest.approx(spearmanr(first[i].flatten(), second[i].flatten()).statistic)
    assert got[2] == 0, "a constant map has no order"


def test_another_image_is_needed(dual, mixed_samples, empty_samples):
    for samples in (mixed_samples[:1], [mixed_samples[0], empty_samples[0]]):
        with pytest.raises(ConfigError, match="give two samples or more, all with objects"):
            measure_maps(dual, samples, ["attention"])


@pytest.mark.medium
def test_measures_of_methods_and_of_chance(dual, mixed_samples):
    samples = mixed_samples[:2]
    found = measure_maps(dual, samples, ["attention", "token_gradient"], ["attention"], steps=2)
    assert list(found) == ["attention", "token_gradient", "target", *CHANCE, "random order"]
    target = torch.from_numpy(np.stack([sample.target for sample in samples]))
    ((batch, _),) = answered_batches(dual, samples, choose_compute())
    attention = make_heatmap(dual.network)(batch).detach()
    np.testing.assert_allclose(found["attention"].alignment["kl"], alignment(attention, target)["kl"], rtol=1e-3)
    np.testing.assert_allclose(found["target"].alignment["kl"], 0, atol=1e-4)
    other = alignment(target.flip(0), target)["mass_on_objects"]
    np.testing.assert_allclose(found["another image's target"].alignment["mass_on_objects"], other, rtol=1e-5)
    assert (found["uniform"].alignment["pearson"] == 0).all() and found["uniform"].curves is None
    one, random = found["attention"], found["random order"].curves
    for kind, sign, name in ((0, -1, "deletion"), (1, 1, "insertion")):
        area = (one.curves[:, kind] - random[:, kind]) @ np.array([0.25, 0.5, 0.25])
        np.testing.assert_allclose(one.better[name], sign * area, atol=1e-6)
    for curves in (one.curves, found["target"].curves):
        np.testing.assert_allclose(curves[:, :, [0, 2]], random[:, :, [0, 2]], atol=1e-4)
    assert len(one.similarity) == 5 and not found["token_gradient"].similarity
    (network,) = [network for layer, network in redrawn_networks(dual.network) if layer == "vision"]
    again = make_heatmap(network)(batch).detach()
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(attention, again, strict=True)]
    np.testing.assert_allclose(one.similarity["vision"], expected, atol=0.02)
    table = faithfulness_table(found)
    assert "random order" not in table and all(name in table for name in CHANCE)
    (row,) = [line for line in table.splitlines() if line.startswith("token_gradient")]
    assert row.split()[-1] == "-"


def test_own_maps_are_those_of_the_true_answer_where_it_is_right(tiny, root):
    """An untaught model is never right, and looks elsewhere when it babbles."""
    samples = list(FSC147(root, "val"))[:4]
    groups = own_against_true(tiny, samples)
    assert list(groups) == ["all", "not right"] and groups["all"] == groups["not right"]
    assert groups["all"]["images"] == 4 and groups["all"]["kl_between"] > 1e-4
    measured = evaluate_samples(tiny, samples).metrics
    for key in ("kl", "mass_on_objects", "pearson", "pointing"):
        assert groups["all"][f"{key}_true"] == pytest.approx(measured[key], rel=1e-3, abs=1e-5)
    assert "kl_between" in own_against_true_table(groups)
