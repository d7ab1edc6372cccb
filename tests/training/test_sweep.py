"""A grid of runs: every combination, each at most once, and a failure is a row."""

import json
import subprocess
import sys

import pytest

from fsc147lib.options import ConfigError
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
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("started"))
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
    sweep.start(run, tmp_path / "logs" / "log.txt", 1)
    (run.config.out / "last").mkdir(parents=True)
    sweep.start(run, tmp_path / "logs" / "log.txt", 1)
    assert [command[-1] == "--resume" for command in commands] == [False, True]


def test_an_interrupted_sweep_ends_its_runs(config, monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = []

    def start(*_):
        started.append(subprocess.Popen(sleeper))
        return started[-1]

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config("seed=0,1,2", parallel=2))
    assert len(started) == 2 and all(process.poll() is not None for process in started)
