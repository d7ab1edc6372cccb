"""The figures show the numbers that they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from fsc147lib.evaluation.faithfulness import CHANCE, Faithfulness
from fsc147lib.model import Occlusion
from fsc147lib.report.faithful import alignment_figure, curves_figure, occlusion_figure, redrawn_figure


@pytest.fixture
def found():
    """Two images."""
    maps = {
        name: Faithfulness({"kl": np.array([i, i + 1.0]), "mass_on_objects": np.array([0.1, 0.2])})
        for i, name in enumerate(["attention", "target", *CHANCE])
    }
    maps["attention"].curves = np.arange(12.0).reshape(2, 2, 3)
    maps["attention"].similarity = {"layer 0": np.array([0.5, 0.7]), "vision": np.array([0.0, 0.2])}
    maps["random order"] = Faithfulness(curves=np.zeros((2, 2, 3)))
    return {"dual": maps, "control": maps}


def test_curves(found):
    figure = curves_figure(found)
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    np.testing.assert_allclose(lines["attention"].get_ydata(), [6, 7, 8])
    np.testing.assert_allclose(lines["attention"].get_xdata(), [0, 50, 100])
    assert set(lines) == {"attention", "random order"} and len(figure.axes) == 4
    plt.close(figure)


def test_redrawn(found):
    figure = redrawn_figure(found)
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [1, 0.6, 0.1])
    plt.close(figure)


def test_alignment_beside_chance(found):
    figure = alignment_figure(found)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["attention"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5, 0.5]
    assert {line.get_label(): line.get_xdata()[0] for line in figure.axes[0].lines} == {
        name: i + 0.5 for i, name in enumerate(CHANCE, start=2)
    }
    plt.close(figure)


def test_falls_beside_objects(mixed_samples):
    windows = np.zeros((2, 14, 14), bool)
    windows[0, :7] = windows[1, 7:] = True
    one = Occlusion(
        windows, np.zeros((2, 2)), np.array([[1.0, -0.5], [2.0, np.nan]]), np.array([[1, 0], [1, 0]]), ["4$", "5"]
    )
    figure = occlusion_figure(mixed_samples[:2], {"dual": one}, 0)
    overlay = figure.axes[1].images[1].get_array()
    assert (overlay[:7] == 1).all() and (overlay[7:] == -0.5).all()
    means = [line for line in figure.axes[3].lines if line.get_label() == "mean fall"][0]
    np.testing.assert_allclose(means.get_ydata(), [-0.5, 1.5])
    figure.canvas.draw()
    plt.close(figure)
