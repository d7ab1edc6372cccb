"""A run that is stopped at any moment ends, once it has gone on, as one that was not: `best/` included."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from fsc147lib.training import loop as training
from fsc147lib.training.interrupt import Interrupted
from fsc147lib.training.loop import TrainConfig, train

pytestmark = pytest.mark.medium

KILLS = int(os.environ.get("FSC147_KILLS", 3))
"""How many runs are killed; 20 are asked for before a release."""


@pytest.fixture
def config(root, tmp_path):
    def make(out="run", **changes):
        settings = {"data": root, "model": "tiny-random", "out": tmp_path / out, "batch_size": 8, "log_every": 1,
                    "tracking": "disabled", "epochs": 2, "learning_rate": 1e-3}  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return make


def ends_equal(one, other):
    """Weights, moments, history and validation of last/ and best/, summary and log: all but the speed."""
    for name in ("last", "best"):
        for file in ("model.safetensors", "training_state.safetensors"):
            a, b = (load_file(out / name / file) for out in (one, other))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), (name, file)
    logs = ([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, other))
    a, b = ([{k: v for k, v in line.items() if k != "images_per_second"} for line in log] for log in logs)
    assert a == b
    for file in ("last/validation.csv", "best/validation.csv", "summary.json"):
        assert (one / file).read_text() == (other / file).read_text()


@pytest.fixture
def stopped(config):
    """Runs with a signal sent from within, at a line of the log; returns what is raised."""

    def run(number, step, **changes):
        def send(line):
            if line["step"] == step:
                os.kill(os.getpid(), number)

        with pytest.raises(Interrupted) as caught:
            train(config(**changes), send)
        return caught.value

    return run


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 2), (signal.SIGTERM, 3), (signal.SIGINT, 5)])
def test_a_signal_ends_the_run_between_steps_and_it_goes_on_there(config, stopped, number, step):
    """In the first epoch, at its last step, and in the second epoch."""
    before = signal.getsignal(number)
    train(config("whole"))
    raised = stopped(number, step)
    assert f"{number.name} after step {step} of 6" in str(raised) and "--resume" in str(raised)
    assert json.loads((config().out / "last" / "training_state.json").read_text())["step"] == step
    assert signal.getsignal(number) is before
    steps = []
    train(config(resume=True), lambda line: steps.append(line["step"]))
    assert steps[0] == min(step + 1, 3 if step <= 3 else 6) and steps[-1] == 6
    ends_equal(config("whole").out, config().out)


def test_a_signal_during_validation_loses_no_step(config, monkeypatch):
    train(config("whole"))
    evaluate, sent = training.evaluate_samples, []

    def measured(*args):
        if len(sent) == 1:  # the validation after the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        sent.append(1)
        return evaluate(*args)

    monkeypatch.setattr(training, "evaluate_samples", measured)
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        train(config())
    monkeypatch.undo()
    train(config(resume=True))
    ends_equal(config("whole").out, config().out)


def test_before_the_first_step_nothing_is_left(config, stopped):
    assert "start it again" in str(stopped(signal.SIGINT, 0))
    assert not (config().out / "last").exists()
    train(config(epochs=1))


def test_accumulation_goes_on_within_an_epoch(config, stopped):
    options = {"batch_size": 2, "accumulation": 3}
    train(config("whole", **options))
    stopped(signal.SIGINT, 2, **options)
    train(config(**options, resume=True))
    ends_equal(config("whole").out, config().out)


def test_a_tie_leaves_best_with_the_first(config, monkeypatch):
    """Resumed where the last epoch's error is the best one's: an uninterrupted run keeps the earlier."""
    evaluate = training.evaluate_samples

    def measured(*args):
        found = evaluate(*args)
        found.metrics["mae"] = 5.0
        return found

    monkeypatch.setattr(training, "evaluate_samples", measured)
    train(config())
    train(config(resume=True))
    state = json.loads((config().out / "best" / "training_state.json").read_text())
    assert state["epoch"] == 1


def command(config, *more):
    words = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in
             ("data", "model", "out", "batch_size", "log_every", "tracking", "epochs", "learning_rate")]  # fmt: skip
    return [sys.executable, "-m", "fsc147lib", "train", *words, *more]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on(config, number, status):
    settings = config(epochs=50)
    process = subprocess.Popen(command(settings), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: '"step": 1' in text_of(settings.out / "metrics.jsonl"), process)
    process.send_signal(number)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == status
    assert "--resume" in printed and "Traceback" not in printed
    assert (settings.out / "last" / "model.safetensors").is_file()


def text_of(path):
    return path.read_text() if path.is_file() else ""


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the run ended, or hangs"
        time.sleep(0.01)


def fresh_process(config, *more):
    """A run in a process of its own, on one thread: other tests leave no state there, and sums have one order."""
    words, environment = command(config, *more), {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.slow
def test_killed_at_random_moments(config):
    """SIGKILL after a random step, of every second run while a checkpoint is being written; then it goes on.

    `FSC147_KILLS=20 python -m pytest tests/training/test_interrupt.py -k killed -s` makes 20 kills.
    """
    rng, options = random.Random(KILLS), {"epochs": 4, "model": "tiny", "learning_rate": 3e-3}
    whole = config("whole", **options)
    assert fresh_process(whole).wait() == 0
    lines = map(json.loads, (whole.out / "metrics.jsonl").read_text().splitlines())
    _, *maes = (line["val"]["mae"] for line in lines if "val" in line)
    assert min(maes) < maes[0], "best/ moves in the course of the run"
    for kill in range(KILLS):
        settings = config(f"killed-{kill}", **options)
        process = fresh_process(settings)
        step = rng.randint(1, 11)
        wait_for(lambda out=settings.out, step=step: f'"step": {step},' in text_of(out / "metrics.jsonl"), process)
        if kill % 2:
            wait_for(lambda out=settings.out: list(out.glob("*.writing")), process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        resume = (settings.out / "last").is_dir() or (settings.out / "last.old").is_dir()
        left = sorted(path.name for path in settings.out.iterdir() if path.is_dir())
        assert fresh_process(settings, *["--resume"] * resume).wait() == 0
        ends_equal(whole.out, settings.out)
        print(f"kill {kill + 1} after step {step}: {left}, {'resumed' if resume else 'started again'}, equal")
        shutil.rmtree(settings.out)
