"""Pictures draw the numbers that they are given: read back from the axes."""

import io
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from fsc147lib.data import FSC147, Picture
from fsc147lib.evaluation.answering import ImageResult
from fsc147lib.evaluation.faithfulness import Faithfulness
from fsc147lib.model import Look, Occlusion, Prediction
from fsc147lib.report import faithful, figures

FLAT = np.full((14, 14), 1 / 196)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def samples(root):
    return list(FSC147(root, "train"))[:5]


def titles(figure) -> list[str]:
    return [axes.get_title().replace("\n", " ") for axes in figure.axes]


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def heights(axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]


# --- Samples and maps


def test_dots_boxes_and_map_are_the_sample_s(samples):
    _, (left, right) = plt.subplots(1, 2)
    figures.show_dots(left, samples[0])
    figures.show_map(right, samples[0].image, samples[0].target)
    np.testing.assert_allclose(left.collections[0].get_offsets(), samples[0].points)
    corners = [[p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height()] for p in left.patches]
    np.testing.assert_allclose(corners, samples[0].boxes)
    assert left.get_title() == f"{samples[0].count} {samples[0].category}"
    overlay = right.images[1]
    assert overlay.get_extent() == [0, samples[0].size[1], samples[0].size[0], 0]
    np.testing.assert_array_equal(overlay.get_array(), samples[0].target)


def test_views_and_gallery(samples):
    figure = figures.sample_views(samples[1])
    assert f"{samples[1].count}.00" in titles(figure)[1]
    np.testing.assert_allclose(figure.axes[1].images[1].get_array(), samples[1].density)
    assert titles(figures.gallery(samples, columns=2)) == [f"{s.count} {s.category}" for s in samples] + [""]


def test_histogram_counts_every_image_on_log_axes():
    axes = figures.count_histogram({"train": [5, 8, 13, 400], "val": [9, 3701]}).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log") and 0 < axes.get_xlim()[0] < 5
    assert legend(axes) == ["train (4 images)", "val (2 images)"]
    axes = figures.count_histogram({"train": [0, 0, 3, 40]}).axes[0]
    assert axes.get_xlim()[0] < 0 and axes.patches[0].get_xy()[:, 1].max() == 2


@pytest.mark.medium
def test_empty_scenes_are_drawn(samples):
    empty = replace(samples[0], points=np.zeros((0, 2), np.float32), boxes=np.zeros((0, 4), np.float32))
    assert titles(figures.sample_views(empty))[2] == figures.NO_TARGET
    comparison = figures.map_comparison([samples[1], empty], {"after": np.stack([FLAT, FLAT])})
    assert [titles(comparison)[i] for i in (1, 4)] == ["target", figures.NO_TARGET]
    comparison.savefig(io.BytesIO())


def test_comparison_puts_each_map_in_its_column(samples):
    maps = np.random.default_rng(0).random((2, 2, 14, 14))
    figure = figures.map_comparison(samples[:2], {"before": maps[0], "after": maps[1]}, ["one", "two"])
    grid = np.array(figure.axes[:8]).reshape(2, 4)
    for i in range(2):
        shown = [place.images[1].get_array() for place in grid[i, 1:]]
        np.testing.assert_array_equal(shown, [samples[i].target, maps[0, i], maps[1, i]])
    assert grid[1, 0].get_title() == "two"


def test_a_map_names_the_answer_that_it_belongs_to(samples):
    own = Look(np.stack([FLAT, FLAT]), ["COUNT: 7", "no idea at all, I am afraid"], "own")
    true = Look(own.maps, ["COUNT: 5", "COUNT: 6"], "true")
    found = titles(figures.map_comparison(samples[:2], {"after": own, "forced": true, "plain": own.maps}))
    assert found[2:5] == ["after: own answer 7", "forced: true answer 5", "plain"]
    assert found[7:10] == ["own answer 'no idea at all, I a…'", "true answer 6", ""]


def test_maps_in_one_figure_share_scale_and_opacity_and_have_a_bar(samples):
    peak = np.zeros((14, 14))
    peak[3, 4] = 1
    figure = figures.map_comparison(samples[:1], {"flat": FLAT[None], "peak": peak[None]})
    drawn = [axes.images[1] for axes in figure.axes[1:4]]
    assert len({(image.norm.vmin, image.norm.vmax, image.get_alpha()) for image in drawn}) == 1
    assert drawn[1].norm.vmax > 2 / 196  # a flat map does not glow like a peak
    assert figure.axes[4].get_ylabel() == "part of the map in a cell"


@pytest.mark.parametrize("name", [figures.MAP_COLOURS, figures.DIFFERENCE_COLOURS])
def test_maps_are_lighter_where_there_is_more_also_in_grey(name):
    grey = plt.get_cmap(name)(np.linspace(0, 1, 64))[:, :3] @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(grey) > 0).all()


def test_layer_head_grid_tells_the_mass(samples):
    maps = np.full((2, 3, 14, 14), 0.25 / 196)
    assert titles(figures.layer_head_grid(maps, samples[0].image, (2, 3)))[5] == "layer 3, head 2: 25 %"


@pytest.mark.medium
@pytest.mark.parametrize("words", [r"$\frac{$ bolts", "$5 and $10 bills", r"\alpha", "100 % {_}^"])
def test_categories_and_answers_are_no_formulas(samples, words):
    """An odd formula raises when the figure is saved."""
    named = [replace(sample, category=words) for sample in samples]
    comparison = figures.map_comparison(named[:1], {words: FLAT[None]}, [words])
    grid = figures.layer_head_grid(FLAT[None, None], named[0].image, [0], words)
    for figure in (figures.gallery(named), figures.category_bars(named), comparison, grid):
        figure.savefig(io.BytesIO(), format="png")
        shown = [text for text in figure.findobj(plt.Text) if words in text.get_text()]
        assert shown and not any(text.get_parse_math() for text in shown)


# --- Timings


def timings():
    base = {"name": "count only", "method": "none", "trained": False, "every": 1, "out_of_memory": False,
            "peak_memory": None, "overhead_low": 0.0, "overhead_median": 0.0, "overhead_high": 0.0}  # fmt: skip
    trained = {**base, "name": "a, trained", "method": "a", "trained": True, "every": 16, "peak_memory": 300.0,
               "overhead_low": 0.7, "overhead_median": 0.8, "overhead_high": 1.0}  # fmt: skip
    return [base, trained, {**trained, "name": "b, trained", "method": "b", "out_of_memory": True}]


def test_overhead_is_drawn():
    overhead, memory = figures.overhead_bars(timings()).axes
    assert heights(overhead) == [80] and heights(memory) == [0, 300 / 1024] and len(legend(overhead)) == 3
    assert "b, trained: out of memory" in memory.get_title()


def test_throughput_bars_name_batch_and_multiple():
    rows = [{"name": name, "batch_size": 8, "images_per_second": speed, "rates": [speed - 1, speed + 1]}
            for name, speed in (("plain", 10), ("fast", 50))]  # fmt: skip
    axes = figures.throughput_bars([*rows, {"name": "large", "batch_size": 8, "out_of_memory": True}]).axes[0]
    assert [patch.get_width() for patch in axes.patches] == [10, 50]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain (batch 8)", "fast (batch 8)"]
    assert [text.get_text().split() for text in axes.texts] == [["10", "1.0x"], ["50", "5.0x"]]


# --- Answers


def test_predictions_and_lost_answers():
    def axes_of(*pairs):
        images = [ImageResult("x", "y", count, predicted, "", 0) for count, predicted in pairs]
        return figures.predictions_against_truth(images).axes[0]

    axes = axes_of((10, 12), (30, 25), (7, None), (9, 8))
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[10, 12], [30, 25], [9, 8]])
    assert legend(axes) == ["1 unparsed"] and legend(axes_of((10, None))) == ["1 unparsed"]
    axes = axes_of((0, 0), (9, 0), (0, None))
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[0, 0], [9, 0]])
    assert axes.lines[1].get_ydata()[0] < 0  # silence is not a true 0


@pytest.mark.medium
def test_a_prediction_shows_picture_map_and_distribution(tmp_path):
    distribution = np.zeros(10_000)
    distribution[[10, 11, 12, 40]] = 0.3, 0.4, 0.24, 0.06
    picture = Picture(Image.new("RGB", (300, 200)), "apples for 3$ or 4$")
    said = Prediction(picture, "COUNT: 12", 12, distribution, 1.0, FLAT.astype(np.float32))
    figures.save_prediction(said, tmp_path / "new" / "map.png")  # text from files is no formula
    assert Image.open(tmp_path / "new" / "map.png").width > 800
    axes = plt.figure().add_subplot()
    figures.show_distribution(axes, said, 9)
    (bars,) = [patch for patch in axes.patches if hasattr(patch, "get_data")]
    np.testing.assert_array_equal(bars.get_data().values, distribution)
    assert legend(axes) == ["90 %: 10 to 40", "own answer 12", "true count 9"] and axes.get_xlim()[0] < 9
    assert axes.get_title() == "mode 11, mean 12.7"
    said.covered, said.count = 0.123, 12_345
    figures.show_distribution(axes, said)
    assert axes.get_title() == "mode 11, mean 12.7; a number is said with 12%" and axes.get_xlim()[1] > 12_345


def test_calibration_and_said_numbers():
    rows = [{"level": 0.5, "claimed": 0.6, "inside": 0.5, "low": 0.4, "high": 0.7, "width": 3.0},
            {"level": 0.9, "claimed": 0.95, "inside": 0.9, "low": 0.85, "high": 0.94, "width": 9.0}]  # fmt: skip
    axes = figures.calibration_figure(rows).axes[0]
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[60, 50], [95, 90]])
    axes = figures.answer_bars({0: (1, 0), 4: (2, 3), 5: (0, 1)}).axes[0]
    assert heights(axes) == [1, 2, 0, 0, -3, -1] and legend(axes)[1] == "said: 2, never said: 1"


# --- Faithfulness


@pytest.fixture
def models():
    """Two models' measures of two images."""
    similarity = {"layer 0": np.array([0.5, 0.7]), "vision": np.array([0.0, 0.2])}
    maps = {"attention": Faithfulness(curves=np.arange(12.0).reshape(2, 2, 3), similarity=similarity)}
    maps["random order"] = Faithfulness(curves=np.zeros((2, 2, 3)))
    return {"dual": maps, "control": maps}


def test_faithfulness(models):
    figure = faithful.curves_figure(models)
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    np.testing.assert_allclose(lines["attention"].get_xydata(), [[0, 6], [50, 7], [100, 8]])
    assert set(lines) == {"attention", "random order"} and len(figure.axes) == 4
    np.testing.assert_allclose(faithful.redrawn_figure(models).axes[0].lines[0].get_ydata(), [1, 0.6, 0.1])


def test_falls_beside_objects(mixed_samples):
    windows = np.zeros((2, 14, 14), bool)
    windows[0, :7] = windows[1, 7:] = True
    falls, objects = np.array([[1.0, -0.5], [2.0, np.nan]]), np.array([[1, 0], [1, 0]])
    figure = faithful.occlusion_figure(
        mixed_samples[:2], {"dual": Occlusion(windows, np.zeros((2, 2)), falls, objects, ["4$", "5"])}
    )
    overlay = figure.axes[1].images[1].get_array()
    assert (overlay[:7] == 1).all() and (overlay[7:] == -0.5).all()
    (means,) = [line for line in figure.axes[3].lines if line.get_label() == "mean fall"]
    np.testing.assert_allclose(means.get_ydata(), [-0.5, 1.5])
    figure.canvas.draw()
