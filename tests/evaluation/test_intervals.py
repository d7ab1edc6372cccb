import numpy as np
import pytest

from fsc147lib import FSC147
from fsc147lib.evaluation import calibration, own_against_true, own_against_true_table
from fsc147lib.model import Prediction


def poisson(rates, factor=1.0):
    """Predictions that claim a normal distribution of variance `factor` x rate around each rate."""
    numbers, found = np.arange(10_000), []
    for rate in rates:
        distribution = np.exp(-((numbers - rate) ** 2) / (2 * factor * rate))
        found.append(Prediction(None, "", None, distribution / distribution.sum(), 1.0, None))
    return found


@pytest.mark.medium
def test_honest_probabilities_hold_the_truth_as_often_as_they_claim():
    rng = np.random.default_rng(0)
    rates = rng.uniform(20, 400, 2000)
    counts = rng.normal(rates, np.sqrt(rates)).round().astype(int)
    honest, sure = (calibration(poisson(rates, factor), counts) for factor in (1.0, 0.25))
    for row in honest:
        assert row["level"] <= row["claimed"] < row["level"] + 0.05
        assert row["low"] <= row["claimed"] <= row["high"] and row["low"] < row["inside"] < row["high"]
    half = [row for row in sure if row["level"] == 0.9][0]
    assert half["inside"] == pytest.approx(0.6, abs=0.04)  # half the width of a 90 % interval holds 59 %
    assert half["width"] == pytest.approx(np.mean(2 * 1.645 * np.sqrt(rates / 4)) + 1, rel=0.02)


def test_a_true_count_out_of_reach_is_outside():
    (row,) = calibration(poisson([30.0]), [20_000], levels=[0.99])
    assert row["inside"] == 0


def test_own_maps_are_those_of_the_true_answer_where_it_is_right(tiny, root, monkeypatch):
    """An untaught model is never right, and looks elsewhere when it babbles."""
    samples = list(FSC147(root, "val"))[:4]
    groups = own_against_true(tiny, samples)
    assert list(groups) == ["all", "not right"] and groups["all"] == groups["not right"]
    assert groups["all"]["images"] == 4 and groups["all"]["kl_between"] > 1e-4
    from fsc147lib.evaluation import evaluate_samples

    measured = evaluate_samples(tiny, samples).metrics
    for key in ("kl", "mass_on_objects", "pearson", "pointing"):
        assert groups["all"][f"{key}_true"] == pytest.approx(measured[key], rel=1e-3, abs=1e-5)
    assert "kl_between" in own_against_true_table(groups)
