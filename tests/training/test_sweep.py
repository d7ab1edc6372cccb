"""A grid of runs: every combination, each at most once, and a failure is a row."""

import json

import pytest

from fsc147lib.options import ConfigError
from fsc147lib.report.sweeps import splits_table, sweep_figure, sweep_groups, sweep_table
from fsc147lib.training import sweep
from fsc147lib.training.sweep import SweepConfig, grid_runs, run_sweep


@pytest.fixture
def config(root, tmp_path):
    def make(*grid, parallel=1, words=()):
        shared = f"--data {root} --model tiny-random --limit 8 --batch-size 4 --tracking disabled".split()
        return SweepConfig((*shared, *words), grid, tmp_path / "sweep", parallel)

    return make


def test_the_grid_is_every_combination(config):
    runs = grid_runs(config("attention_weight=0,0.5", "unfreeze_vision_at=None,1", "flip=True,False"))
    assert len(runs) == 8 and len({run.config.out for run in runs}) == 8
    last = runs[-1]
    assert last.options == {"attention_weight": 0.5, "unfreeze_vision_at": 1, "flip": False}
    assert last.config.attention_weight == 0.5 and last.config.unfreeze_vision_at == 1 and not last.config.flip
    assert last.config.limit == 8 and last.config.out.name == "attention_weight=0.5,unfreeze_vision_at=1,flip=False"
    assert grid_runs(config("attention_layers=1 2,3"))[0].config.attention_layers == (1, 2)


def test_presets_are_defaults_that_options_override(config):
    (run,) = grid_runs(config("seed=0", words=("--preset", "seed", "--accumulation", "1")))
    assert (run.config.learning_rate, run.config.attention_weight, run.config.accumulation) == (2e-6, 0.1, 1)
    with pytest.raises(ConfigError, match="preset.*is 'slow', but must be one of seed, quick, full"):
        grid_runs(config("seed=0", words=("--preset", "slow")))


@pytest.mark.parametrize("axis", ["seeds=0,1", "epochs=0"])
def test_a_grid_that_cannot_be_costs_no_run(config, axis, monkeypatch, capsys):
    monkeypatch.setattr(sweep.GridRun, "start", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit):
        run_sweep(config(axis))
    assert axis.split("=")[0] in capsys.readouterr().err
    with pytest.raises(ConfigError, match="grid.*NAME=VALUE"):
        config("seed")


@pytest.mark.slow
def test_runs_are_processes_that_are_run_once_and_fail_alone(config, tmp_path, monkeypatch):
    """One of two fails; a second call leaves the finished one alone, and tries the other again."""
    settings = config("attention_layers=1,9", parallel=2)
    good, bad = run_sweep(settings)
    assert good["finished"] and [line["epoch"] for line in good["curve"]] == [0, 1] and good["seconds"] > 0
    assert good["last"]["mae"] == good["curve"][-1]["mae"]
    assert not bad["finished"] and bad["error"].startswith("ConfigError: attention_layers is (9,), but this model has")
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"] == [good, bad]
    started = []
    monkeypatch.setattr(sweep, "processes", lambda runs, *_: started.extend(runs) or [])
    again = run_sweep(settings)
    assert [run.name for run in started] == ["attention_layers=9"]
    assert again[0] == good
    run_sweep(config("attention_layers=1", words=("--epochs", "2")))  # other options: not the run that is there
    assert started[-1].name == "attention_layers=1"


def test_an_unfinished_run_goes_on(config, tmp_path, monkeypatch):
    (run,) = grid_runs(config("seed=0"))
    commands = []
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **_: commands.append(command))
    run.start(tmp_path / "logs" / "log.txt", 1)
    (run.config.out / "last").mkdir(parents=True)
    run.start(tmp_path / "logs" / "log.txt", 1)
    assert [command[-1] == "--resume" for command in commands] == [False, True]


def row(weight, seed, maes, kl, **changes):
    curve = [{"epoch": epoch, "mae": mae, "kl": kl} for epoch, mae in enumerate(maes)]
    best = min(curve[1:], key=lambda line: line["mae"])
    return {"name": f"{weight},{seed}", "options": {"attention_weight": weight, "seed": seed}, "finished": True,
            "error": None, "seconds": 10.0, "best": best, "last": curve[-1], "curve": curve, **changes}  # fmt: skip


def test_seeds_are_put_together():
    rows = [row(0, 0, [9, 3, 4], 0.8), row(0, 1, [9, 5, 6], 0.9), row(1, 0, [9, 2, 1], 0.3),
            {"name": "1,1", "options": {"attention_weight": 1, "seed": 1}, "finished": False, "error": "out of memory",
             "seconds": 1.0}]  # fmt: skip
    without, weighted = sweep_groups(rows)
    assert without["name"] == "attention_weight 0" and without["runs"] == 2
    assert (
        without["best"] == (4, 3, 5)
        and without["last"] == (5, 4, 6)
        and without["kl"] == pytest.approx((0.85, 0.8, 0.9))
    )
    assert weighted["runs"] == 1 and weighted["best"] == (1, 1, 1) and weighted["error"] == "out of memory"
    text = sweep_table(rows)
    assert "4.00 (3.00 to 5.00)" in text and "out of memory" in text
    lines = sweep_figure(rows).axes[0].get_lines()
    assert [line.get_ydata().tolist() for line in lines] == [[9, 4, 5], [9, 2, 1]]


def test_splits_are_compared_seed_by_seed_and_picture_by_picture():
    def answered(weight, seed, errors):
        metrics = {"mae": sum(errors) / len(errors), "exact": 0.25, "kl": 0.5}
        return row(weight, seed, [9, 2], 0.5, splits={"test": {"metrics": metrics, "error": errors, "kl": [0.5] * 4}})

    rows = [answered(0, 0, [2, 3, 4, 5]), answered(0, 1, [3, 4, 5, 6]), answered(1, 0, [1, 2, 3, 4]),
            answered(1, 2, [9, 9, 9, 9]), row(1, 3, [9, 2], 0.5)]  # fmt: skip
    head, without, weighted = splits_table(rows, "test").splitlines()
    assert "4.00 (3.50 to 4.50)" in without and without.split()[2] == "2"
    assert "5.75 (2.50 to 9.00)" in weighted and "1.00 (1.00 to 1.00)" in weighted  # of seed 0, which both have
