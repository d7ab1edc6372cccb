"""The viewer without a browser: its scenes for the page, and its answers to the page's messages."""

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
from fsc147lib.report.scene import Choice, bars
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


def need_panel(window, name: str, expected, **tolerance):
    np.testing.assert_allclose(scene(window)["panels"][name]["values"], np.ravel(expected), **tolerance)


def test_map_answer_and_measures_are_the_models(window, samples, model):
    heatmap, target = mean_map(look(model, samples[:1])).maps[0].numpy(), samples[0].target
    need_panel(window, "map", heatmap, rtol=1e-3, atol=1e-9)
    need_panel(window, "target", target, rtol=1e-3)
    need_panel(window, "difference", heatmap - target, atol=1e-5)
    panels = scene(window)["panels"]
    assert panels["map"]["ticks"] == panels["target"]["ticks"]
    assert panels["map"]["ticks"][2] == pytest.approx(max(heatmap.max(), target.max()), rel=1e-5)
    colours = np.array(picture(panels["map"]["src"]))  # a cell is a pixel, the brightest where most is
    assert colours.shape == (14, 14, 4) and colours[..., 1].argmax() == heatmap.argmax()
    said, shown = predict_samples(model, samples[:1])[0], scene(window)["bars"]
    facts = "\n".join(scene(window)["facts"])
    assert samples[0].name in facts and repr(said.answer) in facts and f"mean {said.mean:.1f}" in facts
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
    expected = mean_map(look(model, [samples[place]], (1,), heads=(3,))).maps[0]
    need_panel(window, "map", expected, rtol=1e-3, atol=1e-9)
    atlas, masses = scene(window)["atlas"], look(model, [samples[place]], (0, 1, 2, 3)).maps[0].sum((2, 3))
    assert atlas["chosen"] == [[1, 3]] and picture(atlas["src"]).size == (4 * 15, 4 * 15)
    np.testing.assert_allclose(atlas["masses"], masses, atol=1e-3)
    window.controls["answer"].value, window.controls["word"].value = "true", "first"
    expected = mean_map(look(model, [samples[place]], (1,), answer="true", heads=(3,), word="first")).maps[0]
    need_panel(window, "map", expected, rtol=1e-3, atol=1e-9)
    assert scene(window)["panels"]["map"]["title"] == f"attention, true answer {samples[place].count}"
    window.controls["method"].value = "token_gradient"
    expected = look(model, [samples[place]], method="token_gradient", answer="true", word="first").maps[0]
    need_panel(window, "map", expected, rtol=1e-3, atol=1e-9)
    assert window.controls["layers"].layout.display == "none" and scene(window)["atlas"] is None


def test_layers_are_chosen_where_a_method_reads_attention(samples, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", type("Mine", (Attention,), {"name": "mine"}))
    chosen = [method for method in METHODS if Choice(samples[0], method=method).has_heads]
    assert chosen == ["attention", "relative_attention", "mine"]


def test_hidden_cells_are_counted_without(window, samples, model):
    window.receive({"kind": "hide", "cells": list(range(14 * 7))})
    rest = count_without(model, samples[0], np.arange(196).reshape(14, 14) < 14 * 7)
    facts = "\n".join(scene(window)["facts"])
    assert f"{rest.sample.count} of {samples[0].count} are left" in facts and f"mean {rest.mean:.1f}" in facts
    assert scene(window)["bars"]["marks"] == {"true": samples[0].count, "left": rest.sample.count}
    assert set(scene(window)["bars"]["heights"]) == {"all cells", "the rest"}
    figure = window.figure()  # the same without a page
    np.testing.assert_allclose(figure.axes[1].images[1].get_array(), samples[0].target)
    assert figure.axes[3].get_title() == "map - target" and figure.get_suptitle() == facts
    assert [axes.get_xlabel() for axes in figure.axes].count("number") == 1
    plt.close(figure)
    window.receive({"kind": "hide", "cells": []})
    assert set(scene(window)["bars"]["heights"]) == {"all cells"} and "hidden" not in "".join(scene(window)["facts"])


def test_a_user_s_picture_or_a_sentence(window):
    def send(name, content):
        window.receive({"kind": "picture", "name": name}, [memoryview(content)])
        return scene(window)["message"]

    def png(*size):
        file = io.BytesIO()
        Image.new("RGB", size, "teal").save(file, "png")
        return file.getvalue()

    window.controls["count"].value = "stones for 2$ and 3$"
    for content, reason in ((b"", "the file is empty"), (b"no picture", "cannot be used as a picture")):
        message = send("mine.png", content)
        assert message.startswith("mine.png ") and reason in message and "/" not in message
        assert scene(window)["place"] == 0
    assert send("mine.png", png(300, 200)) == "" and scene(window)["facts"][0] == "mine.png: stones for 2$ and 3$"
    assert list(scene(window)["panels"]) == ["photograph", "map"] and window.controls["answer"].options == ("own",)
    plt.close(window.figure())
    assert "thin.png" in send("thin.png", png(2000, 4)) and scene(window)["place"] == 6  # the last good one stays


def test_no_menu_offers_what_is_not_there(window, samples):
    for name in list(window.controls)[:-1]:  # the last one is a text
        control = window.controls[name]
        for i in range(len(control.options)):
            control.index = i
            assert control.index == i and scene(window)["message"] == "", (name, control.options[i])
    alone = Viewer([replace(samples[0], category="2$ and 3$", name="$x_1$.jpg")])
    assert list(alone.controls) == ["sort", "category"] and len(alone.controls["sort"].options) == 2
    assert list(scene(alone)["panels"]) == ["photograph", "target"]
    alone.figure().savefig(io.BytesIO())  # no formula


def test_the_strip_turns_pages_and_points_are_all_samples(root, model):
    samples = list(FSC147(root, "train"))
    window = Viewer(samples, {"both": model})
    assert len(window.canvas.strip["thumbs"]) == 9 and window.canvas.strip["more"] == [False, True]
    window.receive({"kind": "page", "by": 2})
    assert window.canvas.strip["text"] == "19 to 24 of 24" and window.canvas.strip["more"] == [True, False]
    assert [point[1] for point in scene(window)["points"]] == [sample.count for sample in samples]
    window.receive({"kind": "open", "place": 20})
    assert scene(window)["facts"][0].startswith(samples[20].name)


def test_empty_scenes_and_no_scenes(samples, model):
    window = Viewer([replace(samples[0], points=np.zeros((0, 2), np.float32))], {"both": model})
    assert list(scene(window)["panels"]) == ["photograph", "target", "map"]
    window.controls["sort"].value = "worst alignment"
    with pytest.raises(DataError, match="no samples to view"):
        Viewer([])


def test_wide_distributions_become_few_bars():
    wide = np.zeros(10_000)
    wide[100:900] = 1 / 800
    drawn = bars({"all": Prediction(None, "", None, wide, 1, None)}, {"true": 1000})
    assert len(drawn["heights"]["all"]) <= 60 and sum(drawn["heights"]["all"]) == pytest.approx(1, abs=0.02)
    assert drawn["first"] + drawn["width"] * len(drawn["heights"]["all"]) > 1000
