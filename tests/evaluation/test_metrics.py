import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.evaluation.metrics import (
    absolute_errors,
    absurd_answers,
    alignment,
    answer_histogram,
    bootstrap_interval,
    calibration,
    constant_baselines,
    counting_metrics,
    metrics_by_bin,
    paired_difference,
    parse_count_leniently,
)
from fsc147lib.model import Prediction

REAL = Path(__file__).resolve().parents[3] / "shared" / "fsc147"


def test_an_answer_without_a_number_is_never_right():
    """It costs the true count, and on an empty scene the training mean: nothing is gained by silence."""
    target = [10, 1, 0, 0]
    errors = absolute_errors([None, None, None, 0], target, empty_cost=30)
    assert errors.tolist() == [10, 1, 30, 0]
    assert absolute_errors([None, None, None, 0], target).tolist() == [10, 1, 11 / 4, 0]  # the mean of these
    assert absolute_errors([float("nan")], [0]).tolist() == [1]  # not 0, though nothing is known
    result = counting_metrics([None, None, None, 0], target, empty_cost=30)
    assert [result[key] for key in ("exact", "within_1", "within_10_percent")] == [0.25, 0.25, 0.25]
    assert result["mae"] == 41 / 4 and result["nae"] == 1


def test_one_absurd_answer_hides_neither_the_median_nor_the_rest():
    predicted, target = [25081, 1000, 50, None, 3], [49, 990, 40, 7, 0]  # errors 25032, 10, 10, 7, 3
    assert counting_metrics(predicted, target)["mae"] == pytest.approx((25032 + 10 + 10 + 7 + 3) / 5)  # the field's
    assert counting_metrics(predicted, target)["median_error"] == 10
    told = absurd_answers(predicted, target, None, [4, 100, 7])  # 1000 is not above 10 times 100
    assert told == {"absurd": 1, "mae_without_absurd": pytest.approx((10 + 10 + 7 + 3) / 4)}
    assert absurd_answers(predicted, target, None, [99])["absurd"] == 2
    assert absurd_answers([11, 30], [1, 2], None, [1]) == {"absurd": 2, "mae_without_absurd": None}
    assert absurd_answers(predicted, target, None, []) == absurd_answers(predicted, target, None, [0, 0]) == {}


def test_errors_by_hand_and_relative_ones_without_empty_scenes():
    result = counting_metrics([12, 5, 0, 0, 7], [10, 5, 20, 0, 0], empty_cost=3)  # errors 2, 0, 20, 0, 7
    assert result["mae"] == pytest.approx(29 / 5) and result["rmse"] == pytest.approx((453 / 5) ** 0.5)
    assert result["nae"] == pytest.approx((0.2 + 0 + 1) / 3)
    assert result["sre"] == pytest.approx(((4 / 10 + 0 + 400 / 20) / 3) ** 0.5)
    empty = counting_metrics([0, 4], [0, 0])
    assert empty["nae"] is None and empty["sre"] is None and empty["mae"] == 2 and empty["exact"] == 0.5


def test_how_many_are_right():
    target = np.array([0, 9, 10, 30, 70, 200])
    off = np.array([1, 1, 1, 3, 7, 21])
    result = counting_metrics(target + off, target)
    assert result["exact"] == 0 and result["within_1"] == 3 / 6 and result["within_10_percent"] == 3 / 6
    assert counting_metrics(target - (off > 20), target)["exact"] == 5 / 6


@pytest.mark.parametrize(("predicted", "target"), [([1], [1, 2]), ([], []), ([1], [-1]), ([1], [float("nan")])])
def test_what_cannot_be_measured_is_refused(predicted, target):
    with pytest.raises(ValueError, match="predicted and target|at least 0"):
        counting_metrics(predicted, target)


def test_bins_hold_every_image_once():
    target = [0, 0, 5, 20, 21, 50, 51, 300]
    bins = metrics_by_bin([1, None, None, 21, 22, 51, 52, 301], target, empty_cost=9)
    images = {name: row["images"] for name, row in bins.items()}
    assert images == {"0": 2, "1-20": 2, "21-50": 2, "51-100": 1, "201+": 1}
    assert [row["mae"] for row in bins.values()] == [5, 3, 1, 1, 1]
    assert [row["unparsed"] for row in bins.values()] == [0.5, 0.5, 0, 0, 0]
    assert metrics_by_bin([None, 10], [0, 10])["0"]["mae"] == 5  # the mean of all, not of the bin's zeros
    json.dumps(bins, allow_nan=False)


@pytest.mark.medium
@pytest.mark.skipif(not REAL.is_dir(), reason="the real annotations are not beside the project")
@pytest.mark.parametrize(("constant", "mae", "rmse"), [(49.96, 53.38, 124.53), (25, 48.68, 129.70)])
def test_constants_give_the_papers_rows(constant, mae, rmse):
    """Ranjan et al. (CVPR 2021), table of baselines: "Mean" and "Median" on the validation set."""
    target = [sample.count for sample in FSC147(REAL, "val", images=False)]
    result = counting_metrics([constant] * len(target), target)
    assert (round(result["mae"], 2), round(result["rmse"], 2)) == (mae, rmse)


def test_baselines_use_training_counts_alone():
    rows = constant_baselines([1, 2, 9], [4, 4])
    assert all(rows["mean"][key] == 0 for key in ("mae", "rmse", "nae", "sre"))
    assert rows["mean"]["constant"] == 4 and rows["mean"]["exact"] == 1
    assert rows["median"]["constant"] == 2 and rows["median"]["mae"] == 2
    json.dumps(rows)


def test_answers_cluster_where_a_histogram_shows_it():
    counted = answer_histogram([12, 12, None, 12, 30], [11, 12, 12, 13, 0])
    assert counted == {0: (1, 0), 11: (1, 0), 12: (2, 3), 13: (1, 0), 30: (0, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_the_interval_covers_the_true_value(statistic):
    """Of a normal sample of 40, drawn 200 times, the 95 % interval holds it about 95 % of the time."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(200):
        low, middle, high = bootstrap_interval(rng.normal(1, 0.2, 40), statistic, draws=200)
        assert low <= middle <= high
        inside.append(low <= 1 <= high)
    assert 0.88 < np.mean(inside) <= 0.99


def test_paired_difference_is_sharper_than_the_errors():
    """Images differ far more than the models do; on the same images the difference shows all the same."""
    rng = np.random.default_rng(1)
    first = rng.gamma(1, 20, 100)
    second = first - 1 + rng.normal(0, 0.5, 100)
    low, difference, high = paired_difference(first, second)
    assert difference == pytest.approx(np.mean(first) - np.mean(second))
    assert 0.8 < low < difference < high < 1.2
    deviation = np.std(first - second) / 10
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.1)  # as in a normal approximation
    assert paired_difference(second, first)[1] == -difference


def test_runs_that_disagree_widen_the_interval():
    """Five runs on 1,000 images: the images agree, so all the doubt is between runs."""
    gain = np.array([3.0, 1.0, 2.0, 2.5, 1.5])
    errors = np.random.default_rng(2).gamma(1, 20, (5, 1000))
    low, difference, high = paired_difference(errors + gain[:, None], errors, draws=400)
    assert difference == pytest.approx(2) and 1.2 < low < 1.6 and 2.4 < high < 2.8
    low, _, high = paired_difference((errors + gain[:, None])[:1], errors[:1], draws=400)
    assert (low, high) == (pytest.approx(3), pytest.approx(3))
    with pytest.raises(ValueError, match="same images and runs"):
        paired_difference(errors, errors[:, :9])


def one_hot(*cells):
    heatmap = torch.zeros(1, 14, 14)
    for y, x in cells:
        heatmap[0, y, x] = 1 / len(cells)
    return heatmap


@pytest.mark.parametrize(
    ("heatmap", "kl", "mass", "pearson", "pointing"),
    [
        (one_hot((3, 4), (10, 2)), 0, 1, 1, 1),  # perfect
        (torch.full((1, 14, 14), 1 / 196), np.log(196 / 2), 2 / 196, 0, 0),  # uniform: correlates with nothing
        (one_hot((0, 0)), None, 0, -1 / (195 * 97) ** 0.5, 0),  # beside the objects
    ],
)
def test_alignment_of_a_map(heatmap, kl, mass, pearson, pointing):
    result = {key: value.item() for key, value in alignment(heatmap, one_hot((3, 4), (10, 2))).items()}
    assert result["kl"] == pytest.approx(kl, rel=1e-5, abs=1e-6) if kl is not None else result["kl"] > 10
    assert result["mass_on_objects"] == pytest.approx(mass) and result["pointing"] == pointing
    assert result["pearson"] == pytest.approx(pearson, abs=1e-6)


def test_an_empty_scene_has_no_alignment():
    target = torch.cat([one_hot((3, 4)), torch.zeros(1, 14, 14)])
    for values in alignment(torch.full((2, 14, 14), 1 / 196), target).values():
        assert values[0].isfinite() and values[1].isnan()


def test_pearson_is_numpys():
    generator = torch.Generator().manual_seed(0)
    a, p = (x / x.sum() for x in torch.rand(2, 14, 14, generator=generator))
    expected = np.corrcoef(a.flatten(), p.flatten())[0, 1]
    assert alignment(a[None], p[None])["pearson"].item() == pytest.approx(expected, abs=1e-5)


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
    (half,) = [row for row in sure if row["level"] == 0.9]
    assert half["inside"] == pytest.approx(0.6, abs=0.04)  # half the width of a 90 % interval holds 59 %
    assert half["width"] == pytest.approx(np.mean(2 * 1.645 * np.sqrt(rates / 4)) + 1, rel=0.02)


def test_a_true_count_out_of_reach_is_outside():
    (row,) = calibration(poisson([30.0]), [20_000], levels=[0.99])
    assert row["inside"] == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [("There are 37 apples.", 37), ("COUNT: 37.", 37), ("**COUNT: 37**", 37), ("count:37", 37), ("1,234 apples", 1234),
     ("<think>2 rows of 3, so 6?</think>\n\nCOUNT: 7", 7), ("37 apples, I count 37.", 37),
     ("COUNT: 37 (5 rows of 7, and 2)", 37), ("\\boxed{37}", 37), ("In IMG2 there are 37", 37),
     ("<think>There are 37", None), ("3 rows of 5", None), ("COUNT: 37\nCOUNT: 38", None), ("30-40", None),
     ("3.7", None), ("-2", None), ("1000000", None), ("9" * 400, None), ("٣٧", None), ("a dozen", None), ("", None)],
)  # fmt: skip
def test_a_lenient_parse_finds_the_one_number(text, count):
    assert parse_count_leniently(text) == count


@pytest.mark.parametrize(("text", "count"), [("There are 3", None), ("COUNT: 37", None), ("37 apples and", 37)])
def test_a_number_that_was_cut_off_is_not_read(text, count):
    assert parse_count_leniently(text, complete=False) == count
