"""Pictures of predictions and of their calibration: read back from the axes."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from fsc147lib.data import Picture
from fsc147lib.model import Look, Prediction
from fsc147lib.report import figures, predictions


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def prediction():
    distribution = np.zeros(10_000)
    distribution[[10, 11, 12, 40]] = 0.3, 0.4, 0.24, 0.06
    picture = Picture(Image.new("RGB", (300, 200)), "apples for 3$ or 4$")
    return Prediction(picture, "COUNT: 12", 12, distribution, 1.0, np.full((14, 14), 1 / 196, np.float32))


@pytest.mark.medium
def test_a_prediction_shows_picture_map_and_distribution(prediction, tmp_path):
    photograph, heatmap, _, _ = predictions.prediction_figure(prediction).axes
    assert photograph.get_title() == "apples for 3$ or 4$: 'COUNT: 12'" and heatmap.get_title() == "own answer 12"
    numbers = plt.figure().add_subplot()
    predictions.show_distribution(numbers, prediction, 9)
    (bars,) = [patch for patch in numbers.patches if hasattr(patch, "get_data")]
    values, edges, _ = bars.get_data()
    shown = dict(zip((edges[:-1] + 0.5).astype(int).tolist(), values.tolist(), strict=True))
    assert {number: p for number, p in shown.items() if p} == pytest.approx({10: 0.3, 11: 0.4, 12: 0.24, 40: 0.06})
    labels = [text.get_text() for text in numbers.get_legend().get_texts()]
    assert labels == ["90 %: 10 to 40", "own answer 12", "true count 9"] and min(shown) < 9
    predictions.save_prediction(prediction, tmp_path / "new" / "map.png")  # text from files is no formula
    assert Image.open(tmp_path / "new" / "map.png").width > 800


@pytest.mark.medium
def test_a_model_that_says_no_number_is_seen_to(prediction):
    assert predictions.prediction_figure(prediction).axes[2].get_title() == "mode 11, mean 12.7"
    prediction.covered = 0.123
    title = predictions.prediction_figure(prediction).axes[2].get_title()
    assert title == "mode 11, mean 12.7; a number is said with 12%"


def test_an_answer_beyond_the_last_number_is_drawn(prediction):
    prediction.count = 12_345
    assert predictions.prediction_figure(prediction).axes[2].get_xlim()[1] > 12_345


def test_a_map_names_the_answer_that_it_belongs_to(root):
    from fsc147lib import FSC147

    samples = list(FSC147(root, "val"))[:2]
    own = Look(np.ones((2, 14, 14)) / 196, ["COUNT: 7", "no idea at all, I am afraid"], "own")
    true = Look(own.maps, ["COUNT: 5", "COUNT: 6"], "true")
    figure = figures.map_comparison(samples, {"after": own, "forced": true, "plain": own.maps})
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert titles[2:5] == ["after: own answer 7", "forced: true answer 5", "plain"]
    assert titles[7:10] == ["own answer 'no idea at all, I a…'", "true answer 6", ""]


def test_calibration_points_are_the_rows():
    rows = [{"level": 0.5, "claimed": 0.6, "inside": 0.5, "low": 0.4, "high": 0.7, "width": 3.0},
            {"level": 0.9, "claimed": 0.95, "inside": 0.9, "low": 0.85, "high": 0.94, "width": 9.0}]  # fmt: skip
    axes = predictions.calibration_figure(rows).axes[0]
    points = axes.lines[1].get_xydata()
    np.testing.assert_allclose(points, [[60, 50], [95, 90]])


def test_answer_bars_stand_for_true_and_said():
    axes = predictions.answer_bars({0: (1, 0), 4: (2, 3), 5: (0, 1)}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 0, 0, -3, -1]
    assert axes.get_legend().get_texts()[1].get_text() == "said: 2, never said: 1"
