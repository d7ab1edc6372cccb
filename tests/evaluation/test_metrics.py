import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.evaluation.metrics import alignment, constant_baselines, counting_metrics, metrics_by_bin

REAL = Path(__file__).resolve().parents[3] / "shared" / "fsc147"


def test_by_hand():
    result = counting_metrics([12, 5, 0], [10, 5, 20])  # errors 2, 0, 20
    assert result["mae"] == pytest.approx(22 / 3)
    assert result["rmse"] == pytest.approx((404 / 3) ** 0.5)
    assert result["nae"] == pytest.approx((0.2 + 0 + 1) / 3)
    assert result["sre"] == pytest.approx(((4 / 10 + 0 + 400 / 20) / 3) ** 0.5)


@pytest.mark.parametrize(("predicted", "target"), [([1], [1, 2]), ([], []), ([1], [0])])
def test_what_cannot_be_measured_is_refused(predicted, target):
    with pytest.raises(ValueError, match="predicted and target|relative errors"):
        counting_metrics(predicted, target)


def test_bins_hold_every_image_once():
    target = [5, 20, 21, 50, 51, 300]
    bins = metrics_by_bin(np.array(target) + 1, target, [True, False, False, False, False, False])
    assert {name: row["images"] for name, row in bins.items()} == {"0-20": 2, "21-50": 2, "51-100": 1, "201+": 1}
    assert all(row["mae"] == 1 for row in bins.values())
    assert [row["unparsed"] for row in bins.values()] == [0.5, 0, 0, 0]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real annotations are not beside the project")
@pytest.mark.parametrize(("constant", "mae", "rmse"), [(49.96, 53.38, 124.53), (25, 48.68, 129.70)])
def test_constants_give_the_papers_rows(constant, mae, rmse):
    """Ranjan et al. (CVPR 2021), table of baselines: "Mean" and "Median" on the validation set."""
    target = [sample.count for sample in FSC147(REAL, "val", require_images=False)]
    result = counting_metrics([constant] * len(target), target)
    assert (round(result["mae"], 2), round(result["rmse"], 2)) == (mae, rmse)


def test_baselines_use_training_counts_alone():
    rows = constant_baselines([1, 2, 9], [4, 4])
    assert rows["mean"] == {"constant": 4, "mae": 0, "rmse": 0, "nae": 0, "sre": 0}
    assert rows["median"]["constant"] == 2 and rows["median"]["mae"] == 2
    json.dumps(rows)


def one_hot(*cells):
    heatmap = torch.zeros(1, 14, 14)
    for y, x in cells:
        heatmap[0, y, x] = 1 / len(cells)
    return heatmap


def test_alignment_of_a_perfect_map():
    target = one_hot((3, 4), (10, 2))
    result = alignment(target, target)
    assert result["kl"].item() == pytest.approx(0, abs=1e-6)
    assert result["mass_on_objects"].item() == pytest.approx(1)
    assert result["pearson"].item() == pytest.approx(1)
    assert result["pointing"].item() == 1


def test_alignment_of_a_uniform_map():
    target = one_hot((3, 4), (10, 2))
    result = alignment(torch.full((1, 14, 14), 1 / 196), target)
    assert result["kl"].item() == pytest.approx(np.log(196 / 2), rel=1e-5)
    assert result["mass_on_objects"].item() == pytest.approx(2 / 196)
    assert result["pearson"].item() == 0  # a constant map correlates with nothing


def test_alignment_of_a_map_beside_the_objects():
    result = alignment(one_hot((0, 0)), one_hot((3, 4), (10, 2)))
    assert result["mass_on_objects"].item() == 0 and result["pointing"].item() == 0
    assert result["pearson"].item() < 0
    assert result["kl"].item() > 10


def test_pearson_is_numpys():
    generator = torch.Generator().manual_seed(0)
    a, p = (x / x.sum() for x in torch.rand(2, 14, 14, generator=generator))
    expected = np.corrcoef(a.flatten(), p.flatten())[0, 1]
    assert alignment(a[None], p[None])["pearson"].item() == pytest.approx(expected, abs=1e-5)
