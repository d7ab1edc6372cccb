"""The command `predict`: text, JSON and drawings of predictions."""

import json

import numpy as np
import pytest
from PIL import Image

from fsc147lib.__main__ import main
from fsc147lib.data import Picture
from fsc147lib.model import Prediction
from fsc147lib.report.predictions import numbers, sentences


def test_text_and_numbers_tell_what_is_no_number_and_what_was_not_followed():
    distribution = np.eye(10_000)[49]
    picture = Picture(Image.new("RGB", (64, 64)), "logs")
    found = Prediction(picture, "COUNT: 25081", 25081, distribution, 0.15, np.full((14, 14), 1 / 196), 0.8)
    assert "with probability 0.150\n" in sentences(found)
    assert sentences(found).endswith("no number 0.050, not followed (numbers from 10,000 up) 0.800")
    written = json.loads(json.dumps(numbers(found), allow_nan=False))
    assert written["not_followed"] == 0.8 and written["no_number"] == pytest.approx(0.05)
    assert written["distribution"] == {"49": 1.0} and written["interval_90"] == [49, 49]
    assert written["heatmap_of"] == "own answer" and len(written["heatmap"]) == 14


@pytest.mark.medium
@pytest.mark.parametrize("pictures", [1, 2])
def test_pictures_are_counted_written_and_drawn(tmp_path, capsys, pictures):
    """An untaught model babbles: no number, but a distribution and a map."""
    files = [str(tmp_path / f"noise-{i}.png") for i in range(pictures)]
    for file in files:
        Image.effect_noise((100, 80), 60).save(file)
    words = ["--category", "grains", "--model", "tiny-random", "--json", str(tmp_path / "found.json")]
    assert main(["predict", *files, *words, "--map", str(tmp_path / "maps" / "found.png")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "found.json").read_text())["predictions"]
    assert [each["name"] for each in written] == files and written[0]["count"] is None
    drawn = {path.name for path in (tmp_path / "maps").iterdir()}
    assert drawn == ({"found.png"} if pictures == 1 else {"found-1.png", "found-2.png"})
    assert all(f"map in {tmp_path / 'maps' / name}" in printed for name in drawn)
