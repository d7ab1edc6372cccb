from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsc147lib.data.scenes import draw_scene
from fsc147lib.evaluation.ridge import ridge_baseline


def squares(rng, count):
    """Pictures that give their count away: equal red squares on grey."""
    image = Image.new("RGB", (160, 120), (120, 120, 120))
    for place in rng.permutation(48)[:count]:
        x, y = 20 * (place % 8), 20 * (place // 8)
        ImageDraw.Draw(image).rectangle((x + 4, y + 4, x + 14, y + 14), fill=(200, 30, 30))
    return SimpleNamespace(image=image, category="red squares", count=count)


def scene(seed, split):
    image, annotation = draw_scene(np.random.default_rng(seed), split)
    return SimpleNamespace(image=image.reduce(2), category=annotation["category"], count=len(annotation["points"]))


def test_it_counts_where_area_tells():
    rng = np.random.default_rng(0)
    drawn = [squares(rng, int(rng.integers(1, 41))) for _ in range(100)]
    errors = ridge_baseline(drawn[:80], drawn[80:])
    assert errors["ridge"] < 1 < errors["median"]


def test_constants_are_those_of_training():
    rng = np.random.default_rng(0)
    train, val = [squares(rng, n) for n in [1] * 8 + [11, 21]], [squares(rng, 5)]
    errors = ridge_baseline(train, val)
    assert errors["mean"] == pytest.approx(5 - 4) and errors["median"] == pytest.approx(4)


@pytest.mark.slow
def test_it_fails_on_drawn_scenes():
    errors = ridge_baseline([scene(i, "train") for i in range(100)], [scene(1000 + i, "val") for i in range(40)])
    assert errors["ridge"] > 0.6 * min(errors["mean"], errors["median"])
