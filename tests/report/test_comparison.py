"""`compare`, and the tables and curves of a sweep, on runs of known numbers."""

import csv
import json
import re

import pytest

from fsc147lib.options import ConfigError
from fsc147lib.report import comparison
from fsc147lib.report.comparison import CompareConfig, compare_runs


def write_run(folder, errors, kl, absurd=(0, None), **options):
    """A run's folder as `train` leaves it: two epochs, the second the best."""
    (folder / "best").mkdir(parents=True)
    mae = sum(errors) / len(errors)
    best = {"epoch": 2, "mae": mae, "kl": kl, "absurd": absurd[0], "mae_without_absurd": absurd[1]}
    config = {"data": "root", "out": str(folder), "seed": 0, "attention_weight": 0.1} | options
    baselines = {"mean": {"constant": 20.0, "mae": 12.5}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"best": best, "baselines": baselines}))
    lines = [{"step": 0, "epoch": 0, "val": {"mae": 20.0, "kl": 1.0}}, {"step": 5, "epoch": 1, "count_loss": 1.0},
             {"step": 9, "epoch": 2, "val": best}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "best" / "validation.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["name", "error", "kl"])
        table.writeheader()
        table.writerows({"name": f"{i}.jpg", "error": e, "kl": "" if i == 0 else kl} for i, e in enumerate(errors))
    return folder


def test_runs_side_by_side(tmp_path):
    a = write_run(tmp_path / "a", [2.0, 4.0, 6.0, 8.0], 0.9)
    b = write_run(tmp_path / "b", [1.0, 3.0, 5.0, 7.0], 0.4, attention_weight=3.0, seed=1)
    c = write_run(tmp_path / "c", [3.0, 3.0, 7.0, 7.0], 0.9)
    text = compare_runs(CompareConfig((a, b, c), tmp_path / "new" / "curves.png"))
    lines = {name: values for name, *values in (re.split("  +", line) for line in text.splitlines())}
    assert lines["options that differ"] == ["a", "b", "c"] and lines["attention_weight"] == ["0.1", "3.0", "0.1"]
    assert "out" not in lines and "data" not in lines  # folders are no difference, and the data are the same
    assert text[text.index("MAE, mean error (objects)") + 25 :].split()[:5] == ["low", "5.00", "4.00", "5.00", "12.50"]
    assert "b - a: MAE -1.000 (-1.000 to -1.000), better" in text
    assert "b - a: KL -0.500 (-0.500 to -0.500), better" in text
    assert "c - a: MAE +0.000 (-1.000 to +1.000), no clear difference" in text
    assert (tmp_path / "new" / "curves.png").stat().st_size > 5000


def test_absurd_answers_are_told_of_each_run(tmp_path):
    a, b = write_run(tmp_path / "a", [2.0, 4.0], 0.9), write_run(tmp_path / "b", [900.0, 3.0], 0.4, absurd=(1, 3.0))
    text = compare_runs(CompareConfig((a, b)))
    assert "\nb, epoch 2: 1 answer above 10 times the largest count in training; without it MAE 3.00\n" in text
    assert text.count("largest count") == 1


def test_images_of_another_epoch_are_not_compared(tmp_path):
    """A crash between best/ and summary.json leaves images that are not those of the metrics."""
    a, b = write_run(tmp_path / "a", [2.0, 4.0], 0.9), write_run(tmp_path / "b", [1.0, 3.0], 0.4)
    (b / "best" / "validation.csv").write_text((a / "best" / "validation.csv").read_text())
    assert "b - a: not the same images, or a table of images is missing" in compare_runs(CompareConfig((a, b)))


def test_what_is_no_run_is_named(tmp_path):
    a = write_run(tmp_path / "a", [2.0], 0.9)
    with pytest.raises(ConfigError, match="two folders"):
        CompareConfig((a,))
    with pytest.raises(ConfigError, match="nowhere holds no run"):
        compare_runs(CompareConfig((a, tmp_path / "nowhere")))


@pytest.mark.slow
def test_a_trained_run_compares_with_itself(tmp_path, root):
    from fsc147lib import TrainConfig, train

    out = tmp_path / "run"
    result = train(TrainConfig(root, out, "tiny-random", epochs=2, limit=4, batch_size=2, tracking="disabled"))
    assert len(comparison.images_of_best(out, result.summary()["best"]["mae"])) == 4
    assert "MAE +0.000 (+0.000 to +0.000)" in compare_runs(CompareConfig((out, out)))


def row(weight, seed, maes, kl, **changes):
    curve = [{"epoch": epoch, "mae": mae, "kl": kl} for epoch, mae in enumerate(maes)]
    best = min(curve[1:], key=lambda line: line["mae"])
    return {"name": f"{weight},{seed}", "options": {"attention_weight": weight, "seed": seed}, "finished": True,
            "error": None, "seconds": 10.0, "best": best, "last": curve[-1], "curve": curve, **changes}  # fmt: skip


def test_seeds_are_put_together():
    failed = {"name": "1,1", "options": {"attention_weight": 1, "seed": 1}, "finished": False, "seconds": 1.0}
    rows = [row(0, 0, [9, 3, 4], 0.8), row(0, 1, [9, 5, 6], 0.9), row(1, 0, [9, 2, 1], None),
            {**failed, "error": "out of memory"}]  # fmt: skip
    _, without, weighted, below = comparison.sweep_table(rows).splitlines()
    assert re.split("  +", without) == [
        "attention_weight 0", "2", "4.00 (3.00 to 5.00)", "5.00 (4.00 to 6.00)", "0.850 (0.800 to 0.900)", "10",
    ]  # fmt: skip
    assert weighted.split()[2:4] == ["1", "1.00"] and below == "1,1 failed: out of memory"
    mae, kl = comparison.sweep_figure(rows).axes
    assert [line.get_ydata().tolist() for line in mae.lines] == [[9, 4, 5], [9, 2, 1]]
    assert kl.lines[0].get_ydata() == pytest.approx([0.85] * 3)


def test_epoch_curves_are_the_logs():
    epochs = [{"epoch": epoch, "val": {"mae": mae, "kl": kl}} for epoch, mae, kl in ((0, 6.0, 0.4), (1, 5.0, 0.3))]
    mae, kl = comparison.epoch_curves({"both": [epochs]}, baseline=12.0).axes
    assert mae.get_ylim()[0] == 0 and mae.get_ylim()[1] > 12.0  # the baseline is in the picture
    assert mae.lines[0].get_xydata().tolist() == [[0, 6], [1, 5]] and mae.lines[1].get_ydata() == [12, 12]
    assert kl.lines[0].get_xydata().tolist() == [[0, 0.4], [1, 0.3]] and len(kl.lines) == 1
