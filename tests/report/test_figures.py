"""Pictures draw what they are given: read back from the axes."""

import io
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.evaluation.answering import ImageResult
from fsc147lib.report import figures, sweeps


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def samples(root):
    return list(FSC147(root, "train"))[:5]


def test_dots_and_boxes_are_the_samples(samples):
    figure, axes = plt.subplots()
    figures.show_dots(axes, samples[0])
    np.testing.assert_allclose(axes.collections[0].get_offsets(), samples[0].points)
    corners = [[p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height()] for p in axes.patches]
    np.testing.assert_allclose(corners, samples[0].boxes)
    assert axes.get_title() == f"{samples[0].count} {samples[0].category}"


def test_a_map_covers_the_whole_photograph(samples):
    figure, axes = plt.subplots()
    figures.show_map(axes, samples[0].image, samples[0].target)
    overlay = axes.images[1]
    assert overlay.get_extent() == [0, samples[0].size[1], samples[0].size[0], 0]
    np.testing.assert_array_equal(overlay.get_array(), samples[0].target)


def test_views_show_density_and_target(samples):
    figure = figures.sample_views(samples[1])
    assert f"{samples[1].count}.00" in figure.axes[1].get_title()
    np.testing.assert_allclose(figure.axes[1].images[1].get_array(), samples[1].density)


def test_gallery_has_a_place_for_each(samples):
    titles = [axes.get_title() for axes in figures.gallery(samples, columns=2).axes]
    assert titles == [f"{s.count} {s.category}" for s in samples] + [""]


def test_histogram_counts_every_image_on_log_axes():
    counts = {"train": [5, 8, 13, 400], "val": [9, 3701]}
    axes = figures.count_histogram(counts).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    assert 0 < axes.get_xlim()[0] < 5
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train (4 images)", "val (2 images)"]


def test_epoch_curves_are_the_logs():
    epochs = [{"epoch": epoch, "val": {"mae": mae, "kl": kl}} for epoch, mae, kl in ((0, 6.0, 0.4), (1, 5.0, 0.3))]
    mae, kl = sweeps.epoch_curves({"both": epochs}, baseline=12.0).axes
    assert mae.get_ylim()[0] == 0 and mae.get_ylim()[1] > 12.0  # the yardstick is named, so it must be seen
    np.testing.assert_array_equal(mae.lines[0].get_xydata(), [[0, 6], [1, 5]])
    np.testing.assert_array_equal(kl.lines[0].get_xydata(), [[0, 0.4], [1, 0.3]])
    assert list(mae.lines[1].get_ydata()) == [12, 12] and len(kl.lines) == 1


def test_predictions_and_lost_answers():
    def image(count, predicted):
        return ImageResult("x", "y", count, predicted, "", 0)

    axes = figures.predictions_against_truth([image(10, 12), image(30, 25), image(7, None), image(9, 8)]).axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[10, 12], [30, 25], [9, 8]])
    assert axes.get_legend().get_texts()[0].get_text() == "1 unparsed"
    axes = figures.predictions_against_truth([image(0, 0), image(9, 0), image(0, None)]).axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[0, 0], [9, 0]])
    assert axes.lines[1].get_ydata()[0] < 0  # silence is not a true 0


def test_all_answers_lost_is_a_picture_too():
    lost = [ImageResult("x", "y", 10, None, "", 0)]
    assert figures.predictions_against_truth(lost).axes[0].get_legend() is not None


@pytest.mark.medium
def test_empty_scenes_are_drawn(samples):
    empty = replace(samples[0], points=np.zeros((0, 2), np.float32), boxes=np.zeros((0, 4), np.float32))
    assert figures.sample_views(empty).axes[2].get_title() == figures.NO_TARGET
    comparison = figures.map_comparison([samples[1], empty], {"after": np.full((2, 14, 14), 1 / 196)})
    assert [comparison.axes[i].get_title() for i in (1, 4)] == ["target", figures.NO_TARGET]
    axes = figures.count_histogram({"train": [0, 0, 3, 40]}).axes[0]
    assert axes.get_xlim()[0] < 0 and axes.patches[0].get_xy()[:, 1].max() == 2
    comparison.savefig(io.BytesIO())


def test_comparison_puts_each_map_in_its_column(samples):
    maps = np.random.default_rng(0).random((2, 2, 14, 14))
    figure = figures.map_comparison(samples[:2], {"before": maps[0], "after": maps[1]}, ["one", "two"])
    grid = np.array(figure.axes[:8]).reshape(2, 4)
    for i in range(2):
        np.testing.assert_array_equal(grid[i, 1].images[1].get_array(), samples[i].target)
        for j in range(2):
            np.testing.assert_array_equal(grid[i, 2 + j].images[1].get_array(), maps[j, i])
    assert grid[1, 0].get_title() == "two"


def test_maps_in_one_figure_share_scale_and_opacity_and_have_a_bar(samples):
    flat, peak = np.full((14, 14), 1 / 196), np.zeros((14, 14))
    peak[3, 4] = 1
    figure = figures.map_comparison(samples[:1], {"flat": flat[None], "peak": peak[None]})
    drawn = [axes.images[1] for axes in figure.axes[1:4]]
    assert len({(image.norm.vmin, image.norm.vmax, image.get_alpha()) for image in drawn}) == 1
    assert drawn[1].norm.vmax > 2 / 196  # a flat map does not glow like a peak
    assert figure.axes[4].get_ylabel() == "part of the map in a cell"


def test_maps_are_lighter_where_there_is_more_also_in_grey():
    for name in (figures.MAP_COLOURS, figures.DIFFERENCE_COLOURS):
        grey = plt.get_cmap(name)(np.linspace(0, 1, 64))[:, :3] @ (0.2126, 0.7152, 0.0722)
        assert (np.diff(grey) > 0).all()


def test_layer_head_grid_tells_the_mass(samples):
    maps = np.full((2, 3, 14, 14), 0.25 / 196)
    figure = figures.layer_head_grid(maps, samples[0].image, (2, 3))
    assert figure.axes[5].get_title() == "layer 3, head 2: 25 %"


def timings():
    base = {"name": "count only", "method": "none", "trained": False, "every": 1, "out_of_memory": False,
            "peak_memory": None,
            "overhead_low": 0.0, "overhead_median": 0.0, "overhead_high": 0.0}  # fmt: skip
    trained = {**base, "name": "a, trained", "method": "a", "trained": True, "every": 16, "peak_memory": 300.0,
               "overhead_low": 0.7, "overhead_median": 0.8, "overhead_high": 1.0}  # fmt: skip
    return [base, trained, {**trained, "name": "b, trained", "method": "b", "out_of_memory": True}]


def test_bars_are_medians_and_leave_out_what_did_not_fit():
    axes = figures.overhead_bars(timings()).axes
    assert [patch.get_height() for patch in axes[0].patches[:1]] == [80]
    assert [patch.get_height() for patch in axes[1].patches] == [0, 300 / 1024]
    assert len(axes[0].get_legend().get_texts()) == 3
    assert "b, trained: out of memory" in axes[1].get_title()


def test_overhead_falls_with_k():
    axes = figures.overhead_against_every(timings()).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata()[:3], [80, 40, 20])
    assert axes.lines[1].get_xydata().tolist() == [[16, 5]]


def test_an_overhead_below_zero_is_named_and_not_drawn():
    base, trained, _ = timings()
    axes = figures.overhead_against_every([base, {**trained, "overhead_median": -0.01}]).axes[0]
    assert not any(len(line.get_ydata()) for line in axes.lines)
    assert axes.get_legend().get_texts()[0].get_text() == "a, trained: -1.0 %, lost in the noise"


def test_loss_curves_are_running_means():
    axes = figures.loss_curves([{"name": "fp32", "losses": [4.0, 2.0, 1.0, 1.0]}], width=2).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[2, 3], [3, 1.5], [4, 1]])


def test_lazy_curves_count_time_in_plain_steps():
    lines = [{"step": 0, "kl": 1.0, "mae": 9}, {"step": 100, "kl": 0.5, "mae": 3}]
    axes = figures.lazy_curves({"1": lines, "4": lines}, overhead=0.8).axes
    assert [line.get_xdata()[-1] for line in axes[0].lines] == [100, 100]
    np.testing.assert_allclose([line.get_xdata()[-1] for line in axes[1].lines], [180, 120])
    assert axes[2].lines[0].get_ydata()[-1] == 3


def test_throughput_bars_name_the_batch():
    rows = [{"name": name, "batch_size": 8, "images_per_second": speed, "rates": [speed - 1, speed + 1],
             "speedup": speed / 10} for name, speed in (("plain", 10), ("fast", 50))]  # fmt: skip
    axes = figures.throughput_bars(rows).axes[0]
    assert [patch.get_width() for patch in axes.patches] == [10, 50]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain (batch 8)", "fast (batch 8)"]


@pytest.mark.medium
@pytest.mark.parametrize("words", [r"$\frac{$ bolts", "$5 and $10 bills", r"\alpha", "100 % {_}^"])
def test_categories_and_answers_are_no_formulas(samples, words):
    """Drawn letter by letter: an odd formula would raise when the figure is saved."""
    named = [replace(sample, category=words) for sample in samples]
    maps, image = np.full((1, 14, 14), 1 / 196), named[0].image
    for figure in (
        figures.gallery(named), figures.category_bars(named), figures.map_comparison(named[:1], {words: maps}, [words]),
        figures.layer_head_grid(maps[None], image, [0], words),
    ):  # fmt: skip
        figure.savefig(io.BytesIO(), format="png")
        shown = {text._preprocess_math(text.get_text()) for text in figure.findobj(plt.Text) if text.get_text()}
        assert any(words in string and math is False for string, math in shown)
