"""`study`: what it chooses, what it tells, and that it goes on; its runs replaced by ones of known numbers."""

import json

import numpy as np
import pytest

from fsc147lib.options import ConfigError
from fsc147lib.report import study

IMAGES = 40


def pretend(config, runs, trained):
    """Write each run's result: an error that depends on weight, target and seed alone."""
    for run in runs:
        path = run.config.out / study.RESULT
        if path.is_file():
            continue
        trained.append(run.name)
        on_objects = run.config.attention_target == "objects"
        gain = {0.0: 0.0, 0.1: 0.5, 0.5: 1.0}[run.config.attention_weight] if on_objects else -0.25
        error = 3.0 - gain + np.random.default_rng(run.config.seed).uniform(0, 1, IMAGES)
        metrics = {"mae": float(error.mean()), "exact": 0.1, "kl": 1.0 - gain / 2}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"val": metrics, "metrics": metrics, "error": error.tolist()}))


@pytest.fixture
def pretended(monkeypatch):
    trained = []
    monkeypatch.setattr(study, "finish", lambda config, runs: pretend(config, runs, trained))
    monkeypatch.setattr(study, "describe_plan", lambda config, budgets: None)
    monkeypatch.setattr(study, "answer", lambda config, model: {"metrics": {"mae": 6.0, "exact": 0.0, "kl": 1.2}})
    return trained


def test_a_study_chooses_on_val_and_tells_differences_on_test(root, tmp_path, pretended):
    config = study.StudyConfig(data=root, out=tmp_path, confirm=(10, 11))
    (found,) = study.run_study(config)["budgets"]
    assert found["weight"] == 0.5 and found["validation"][0.0] > found["validation"][0.1] > found["validation"][0.5]
    rows = {row["name"]: row for row in found["variants"]}
    assert rows["objects, weight 0.5"]["difference"] == pytest.approx((-1, -1, -1))  # each image's error is 1 smaller
    assert rows["control: another image's objects"]["difference"] == pytest.approx((0.25, 0.25, 0.25))
    assert rows["objects, encoder frozen"]["against"] == "counts alone, encoder frozen"
    assert all(row["runs"] == 2 for row in rows.values())
    text = " ".join(found["verdict"])
    assert "onto the objects in 2 of 2 seeds (KL 1.00 to 0.50)" in text and "which does not include 0" in text
    assert json.loads((tmp_path / "study.json").read_text())["budgets"][0]["weight"] == 0.5
    assert (tmp_path / "forest.png").stat().st_size > 5000


def test_a_study_trains_each_run_once_and_goes_on(root, tmp_path, pretended):
    config = study.StudyConfig(data=root, out=tmp_path, budgets=(2,))
    study.run_study(config)
    assert len(pretended) == len(set(pretended)) == 3 * (3 + 2 + 4)  # weights; controls; two more ways to freeze
    study.run_study(config)
    assert len(pretended) == 27


def test_no_run_at_a_time_is_refused(root):
    with pytest.raises(ConfigError, match="parallel .*must be at least 1"):
        study.StudyConfig(data=root, parallel=0)


def test_the_plan_counts_the_runs(root, tmp_path, capsys):
    study.describe_plan(study.StudyConfig(data=root, out=tmp_path), [2])
    assert "27 runs of 3 epochs, on 2 training pictures" in capsys.readouterr().out


def test_a_run_that_fails_ends_the_study_with_its_last_line(root, tmp_path):
    config = study.StudyConfig(
        data=root, train=("--clip", "1e-30"), model="tiny-random", out=tmp_path, seeds=(0,), epochs=2
    )
    bad = study.grid(config, 2, None, study.Variant("x"), (0,))
    bad[0].words[bad[0].words.index("tiny-random")] = "nowhere"
    with pytest.raises(ConfigError, match="failed: .*nowhere.* The same command tries it again"):
        study.finish(config, bad)


@pytest.mark.slow
def test_a_study_of_real_runs(root, tmp_path):
    """Whole, on the untrained tiny model: trained, answered, weights removed, told."""
    words = ("--batch-size", "2", "--precision", "fp32")
    config = study.StudyConfig(
        data=root,
        train=words,
        model="tiny-random",
        out=tmp_path / "s",
        seeds=(0,),
        weights=(0.5,),
        epochs=2,
        parallel=2,
    )
    (found,) = study.run_study(config)["budgets"]
    runs = list((tmp_path / "s" / f"pictures={found['pictures']}").glob("*/test.json"))
    assert len(runs) == 8 and not list((tmp_path / "s").rglob("*.safetensors"))
    own = json.loads(runs[0].read_text())
    assert np.mean(own["error"]) == pytest.approx(own["metrics"]["mae"])
