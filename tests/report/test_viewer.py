"""The viewer without a browser: what it sends to the page, and what it does with what comes back."""

import base64
import io
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from fsc147lib.data import FSC147, DataError
from fsc147lib.evaluation import evaluate_samples
from fsc147lib.model import Prediction, count_without, load_model, look, mean_map, predict_samples
from fsc147lib.model.heatmaps import METHODS, Attention
from fsc147lib.report import canvas
from fsc147lib.report.scene import Choice
from fsc147lib.report.viewer import Viewer

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def samples(root):
    return [sample for sample in FSC147(root, "train") if sample.count][:6]


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-dual")


@pytest.fixture
def window(samples, model):
    return Viewer(samples, {"both": model, "counts": load_model("tiny")})


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def scene(window) -> dict:
    return window.canvas.scene


def panel(window, name: str) -> dict:
    return scene(window)["panels"][name]


def test_map_answer_and_measures_are_the_models(window, samples, model):
    heatmap = mean_map(look(model, samples[:1])).maps[0].numpy()
    np.testing.assert_allclose(panel(window, "map")["values"], heatmap.ravel(), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(panel(window, "target")["values"], samples[0].target.ravel(), rtol=1e-3)
    difference = heatmap - samples[0].target
    np.testing.assert_allclose(panel(window, "difference")["values"], difference.ravel(), atol=1e-5)
    assert panel(window, "map")["ticks"] == panel(window, "target")["ticks"]
    np.testing.assert_allclose(panel(window, "map")["ticks"][2], max(heatmap.max(), samples[0].target.max()), rtol=1e-5)
    colours = np.array(picture(panel(window, "map")["src"]))  # a cell is a pixel, the brightest where most is
    assert colours.shape == (14, 14, 4) and colours[..., 1].argmax() == heatmap.argmax()
    said = predict_samples(model, samples[:1])[0]
    facts = "\n".join(scene(window)["facts"])
    assert samples[0].name in facts and repr(said.answer) in facts and f"mean {said.mean:.1f}" in facts
    shown = scene(window)["bars"]
    expected = said.distribution[shown["first"] :][: len(shown["heights"]["all cells"])]
    np.testing.assert_allclose(shown["heights"]["all cells"], expected, atol=1e-5)


def test_sorted_by_count_error_and_alignment(window, samples, model):
    found = evaluate_samples(model, samples).images
    for name, key in (("largest count", lambda i: -found[i].count), ("largest error", lambda i: -found[i].error)):
        window.controls["sort"].value = name
        assert [key(i) for i in window.order()] == sorted(map(key, range(len(samples))))
        assert scene(window)["place"] == window.order()[0] == window.canvas.strip["thumbs"][0]["place"]
    window.controls["sort"].value = "worst alignment"
    kl = [row["kl"] for row in window.rows()]
    assert [kl[i] for i in window.order()] == sorted(kl, reverse=True)
    window.controls["category"].value = samples[2].category
    assert {samples[i].category for i in window.order()} == {samples[2].category}


def test_layers_heads_word_whose_and_method_change_the_map(window, samples, model):
    place = max(range(len(samples)), key=lambda i: samples[i].count)
    window.show_sample(place)
    window.receive({"kind": "head", "layer": 1, "head": 3})
    seen = look(model, [samples[place]], (1,), heads=(3,))
    expected = mean_map(seen).maps[0].flatten()
    np.testing.assert_allclose(panel(window, "map")["values"], expected, rtol=1e-3, atol=1e-9)
    atlas = scene(window)["atlas"]
    assert atlas["chosen"] == [[1, 3]] and picture(atlas["src"]).size == (4 * 15, 4 * 15)
    np.testing.assert_allclose(
        atlas["masses"], look(model, [samples[place]], (0, 1, 2, 3)).maps[0].sum((2, 3)), atol=1e-3
    )
    window.controls["answer"].value, window.controls["word"].value = "true", "first"
    seen = look(model, [samples[place]], (1,), answer="true", heads=(3,), word="first")
    expected = mean_map(seen).maps[0].flatten()
    np.testing.assert_allclose(panel(window, "map")["values"], expected, rtol=1e-3, atol=1e-9)
    assert panel(window, "map")["title"] == f"attention, true answer {samples[place].count}"
    window.controls["method"].value = "token_gradient"
    expected = look(model, [samples[place]], method="token_gradient", answer="true", word="first").maps[0].flatten()
    np.testing.assert_allclose(panel(window, "map")["values"], expected, rtol=1e-3, atol=1e-9)
    assert window.controls["layers"].layout.display == "none" and scene(window)["atlas"] is None


def test_layers_are_chosen_where_a_method_reads_attention(samples, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", type("Mine", (Attention,), {"name": "mine"}))
    chosen = [method for method in METHODS if Choice(samples[0], method=method).has_heads]
    assert chosen == ["attention", "relative_attention", "mine"]


def test_hidden_cells_are_counted_without(window, samples, model):
    cells = list(range(14 * 7))
    window.receive({"kind": "hide", "cells": cells})
    hidden = np.arange(196).reshape(14, 14) < 14 * 7
    rest = count_without(model, samples[0], hidden)
    facts = "\n".join(scene(window)["facts"])
    assert f"{rest.sample.count} of {samples[0].count} are left" in facts and f"mean {rest.mean:.1f}" in facts
    assert scene(window)["bars"]["marks"] == {"true": samples[0].count, "left": rest.sample.count}
    assert set(scene(window)["bars"]["heights"]) == {"all cells", "the rest"}
    window.receive({"kind": "hide", "cells": []})
    assert set(scene(window)["bars"]["heights"]) == {"all cells"} and "hidden" not in "".join(scene(window)["facts"])


def test_a_picture_of_ones_own_or_a_sentence(window):
    window.controls["count"].value = "stones for 2$ and 3$"
    for content, reason in ((b"", "the file is empty"), (b"no picture", "cannot be used as a picture")):
        window.receive({"kind": "picture", "name": "mine.png"}, [memoryview(content)])
        assert scene(window)["message"].startswith("mine.png ") and reason in scene(window)["message"]
        assert "/" not in scene(window)["message"] and scene(window)["place"] == 0
    file = io.BytesIO()
    Image.new("RGB", (300, 200), "teal").save(file, "png")
    window.receive({"kind": "picture", "name": "mine.png"}, [file.getvalue()])
    assert scene(window)["facts"][0] == "mine.png: stones for 2$ and 3$" and scene(window)["message"] == ""
    assert list(scene(window)["panels"]) == ["photograph", "map"]
    assert window.controls["answer"].options == ("own",)  # nobody knows the true one
    plt.close(window.figure())
    file = io.BytesIO()
    Image.new("RGB", (2000, 4), "teal").save(file, "png")
    window.receive({"kind": "picture", "name": "thin.png"}, [file.getvalue()])
    assert "thin.png" in scene(window)["message"] and scene(window)["place"] == 6  # the last good one stays


def test_no_menu_offers_what_is_not_there(window, samples):
    for name in list(window.controls)[:-1]:  # the last one is a text
        control = window.controls[name]
        for i in range(len(control.options)):
            control.index = i
            assert control.index == i and scene(window)["message"] == "", (name, control.options[i])
    alone = Viewer(samples)
    assert list(alone.controls) == ["sort", "category"] and len(alone.controls["sort"].options) == 2
    assert list(scene(alone)["panels"]) == ["photograph", "target"]


def test_the_strip_turns_pages_and_points_are_all_samples(root, model):
    samples = list(FSC147(root, "train"))
    window = Viewer(samples, {"both": model})
    assert len(window.canvas.strip["thumbs"]) == 9 and window.canvas.strip["more"] == [False, True]
    window.receive({"kind": "page", "by": 2})
    assert window.canvas.strip["text"] == "19 to 24 of 24" and window.canvas.strip["more"] == [True, False]
    assert [point[1] for point in scene(window)["points"]] == [sample.count for sample in samples]
    window.receive({"kind": "open", "place": 20})
    assert scene(window)["facts"][0].startswith(samples[20].name)


def test_the_static_twin_shows_the_same(window, samples):
    window.hide_cells(range(20))
    figure = window.figure()
    np.testing.assert_allclose(figure.axes[1].images[1].get_array(), samples[0].target)
    assert (
        figure.axes[3].get_title() == "map - target"
        and len([a for a in figure.axes if a.get_xlabel() == "number"]) == 1
    )
    assert figure.get_suptitle() == "\n".join(scene(window)["facts"])
    plt.close(figure)
    odd = Viewer([replace(samples[0], category="2$ and 3$", name="$x_1$.jpg")])
    odd.figure().savefig(io.BytesIO())


def test_empty_scenes_and_no_scenes(samples, model):
    empty = replace(samples[0], points=np.zeros((0, 2), np.float32))
    window = Viewer([empty], {"both": model})
    assert list(scene(window)["panels"]) == ["photograph", "target", "map"]
    window.controls["sort"].value = "worst alignment"
    with pytest.raises(DataError, match="no samples to view"):
        Viewer([])


def test_wide_distributions_become_few_bars():
    wide = np.zeros(10_000)
    wide[100:900] = 1 / 800
    drawn = canvas.bars({"all": Prediction(None, "", None, wide, 1, None)}, {"true": 1000})
    assert len(drawn["heights"]["all"]) <= 60 and sum(drawn["heights"]["all"]) == pytest.approx(1, abs=0.02)
    assert drawn["first"] + drawn["width"] * len(drawn["heights"]["all"]) > 1000
