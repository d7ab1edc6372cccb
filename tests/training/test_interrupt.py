"""A run that is stopped at any moment ends, once it has gone on, as one that was not: `best/` included."""

import json
import multiprocessing
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

from fsc147lib.model.network import CountingModel
from fsc147lib.options import ConfigError
from fsc147lib.readers import signals_later
from fsc147lib.training import run as folders
from fsc147lib.training import setup
from fsc147lib.training.batches import SizeBatches, make_loader
from fsc147lib.training.interrupt import Interrupted, Signals
from fsc147lib.training.loop import TrainConfig, train
from fsc147lib.training.run import RunFolder
from fsc147lib.training.step import TrainingStep, learning_rate_factor

pytestmark = pytest.mark.medium

ADAPTERS = {"model": "tiny", "lora": 4, "unfreeze_vision_at": 1}
KILLS = int(os.environ.get("FSC147_KILLS", 3))
"""How many runs are killed; 20 are asked for before a release."""


@pytest.fixture(autouse=True)
def hang_up_is_not_ignored():
    """Not even where the tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
        weights = {path.name for out in (one, other) for path in (out / name).glob("*.safetensors")}
        assert len(weights) == 1
        for file in (*weights, "moments.st"):
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


@pytest.mark.parametrize(
    ("number", "step", "options"),
    [
        (signal.SIGINT, 2, {"batch_size": 3, "accumulation": 3}),
        (signal.SIGTERM, 3, {}),
        (signal.SIGINT, 5, {}),
        (signal.SIGINT, 2, ADAPTERS),
        (signal.SIGTERM, 5, ADAPTERS),
        (signal.SIGINT, 5, {**ADAPTERS, "precision": "bf16"}),
    ],
)
def test_a_signal_ends_the_run_between_steps_and_it_goes_on_there(config, stopped, number, step, options):
    """In the first epoch, at its last step, and in the second epoch; also adapters, with an encoder that unfreezes."""
    before = signal.getsignal(number)
    train(config("whole", **options))
    raised = stopped(number, step, **options)
    assert f"{number.name} after step {step} of 6" in str(raised) and "--resume" in str(raised)
    assert json.loads((config().out / "last" / "training_state.json").read_text())["step"] == step
    assert signal.getsignal(number) is before
    steps = []
    train(config(resume=True, **options), lambda line: steps.append(line["step"]))
    assert steps[0] == min(step + 1, 3 if step <= 3 else 6) and steps[-1] == 6
    ends_equal(config("whole").out, config().out)


def test_a_signal_during_validation_loses_no_step(config, monkeypatch):
    train(config("whole"))
    evaluate, sent = setup.evaluate_samples, []

    def measured(*args, **options):
        if len(sent) == 1:  # the validation after the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        sent.append(1)
        return evaluate(*args, **options)

    monkeypatch.setattr(setup, "evaluate_samples", measured)
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        train(config())
    monkeypatch.undo()
    train(config(resume=True))
    ends_equal(config("whole").out, config().out)


def test_before_the_first_step_nothing_is_left(config, stopped):
    assert "start it again" in str(stopped(signal.SIGINT, 0))
    assert not (config().out / "last").exists()
    train(config(epochs=1))


READER_DIED = "DataLoader worker (pid 12) is killed by signal: Terminated."


def send_to_all(number, times=1):
    """As `timeout` or SLURM do: to this process and to its readers, from outside; a SIGTERM of the parent ends them."""
    processes = [*multiprocessing.active_children(), multiprocessing.current_process()]
    words = ["kill", f"-{signal.Signals(number).name[3:]}", *(str(process.pid) for process in processes)]
    for _ in range(times):
        subprocess.run(words, check=True)


def test_readers_outlive_signals_to_all_and_end_with_their_parent(root):
    """A signal to all processes of a run leaves the parent its readers; a parent that exits ends them by SIGTERM."""
    before = multiprocessing.active_children()
    samples = setup.open_split(root, "train")
    batches = SizeBatches([(2, 2, 4)] * len(samples), 1, 0, flip=False)
    loader = iter(make_loader(samples, batches, lambda part: [sample.name for sample in part], workers=2))
    read = next(loader) + next(loader)  # one of each reader
    readers = [process for process in multiprocessing.active_children() if process not in before]
    for name in ("INT", "HUP", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(reader.pid) for reader in readers)], check=True)
    time.sleep(0.2)
    for _ in range(len(samples) - 2):
        read += next(loader)
    assert sorted(read) == sorted(sample.name for sample in samples)
    for reader in readers:
        reader.terminate()
        reader.join(10)
    assert [reader.exitcode for reader in readers] == [0, 0]


@pytest.mark.medium
def test_threads_of_a_tracker_leave_readers_alive(tmp_path):
    """wandb starts threads in each new process, before a reader can say which signals it leaves to its parent."""
    program = """
import os, signal, subprocess, sys, threading, time
from torch.utils.data import DataLoader
from fsc147lib.readers import reader_options
os.register_at_fork(after_in_child=lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start())
loader = iter(DataLoader(list(range(200)), 1, **reader_options(2)))
next(loader), next(loader)
for worker in loader._workers:
    subprocess.run(["kill", "-TERM", str(worker.pid)] )
time.sleep(0.3)
print(len(list(loader)), [worker.is_alive() for worker in loader._workers], flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.startswith("198 "), done.stderr


def test_two_signals_to_all_processes_save_the_step(config):
    """`timeout` sends two; the step is saved, and the run goes on from there."""
    train(config("whole"))
    with pytest.raises(Interrupted, match="SIGHUP after step 2 of 6"):
        train(config(workers=2), lambda line: line["step"] == 2 and send_to_all(signal.SIGHUP, times=2))
    train(config(resume=True))
    ends_equal(config("whole").out, config().out)


def test_nohup_is_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().caught() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.received and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_readers_begin_comes_after_it():
    """A hook of a fork would drop the exception and print it; the signal is sent again, and only once."""
    with Signals().caught() as signals:
        with pytest.raises(Interrupted, match="SIGTERM"), signals_later():
            os.kill(os.getpid(), signal.SIGTERM)
            begun = not signals.received
        assert begun and signals.received == signal.SIGTERM


def test_an_error_of_a_reader_is_none_during_a_stop_alone():
    with Signals().caught() as signals:
        with pytest.raises(RuntimeError, match="is killed by signal"), signals.hold():
            raise RuntimeError(READER_DIED)
        with pytest.raises(RuntimeError, match="out of memory"), signals.hold():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("out of memory")
    with Signals().caught() as signals, pytest.raises(Interrupted, match="SIGTERM"), signals.hold():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError(READER_DIED)


def fails_at(call, monkeypatch, owner, name):
    """The method's n-th call is stopped in its midst by a signal that kills a reader, too."""
    method, calls = getattr(owner, name), []

    def wrapped(self, *args):
        result = method(self, *args)
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError(READER_DIED)
        return result

    monkeypatch.setattr(owner, name, wrapped)


def test_a_reader_that_dies_in_a_save_costs_nothing(config, monkeypatch):
    train(config("whole"))
    fails_at(1, monkeypatch, CountingModel, "write_into")
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        train(config())
    train(config(resume=True))
    ends_equal(config("whole").out, config().out)


def test_a_reader_that_dies_in_an_update_leaves_the_checkpoint_before(config, monkeypatch):
    """What is half updated is not saved."""
    fails_at(5, monkeypatch, TrainingStep, "__call__")
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        train(config())
    assert json.loads((config().out / "last" / "training_state.json").read_text())["step"] == 3


def test_a_start_is_written_whole(config, monkeypatch):
    """A signal in the midst of it leaves no draft, and the next start takes the folder."""

    def interrupted(path, text):
        draft = path.with_name(path.name + ".writing")
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        os.kill(os.getpid(), signal.SIGTERM)
        draft.replace(path)

    monkeypatch.setattr(folders, "write_text", interrupted)
    with pytest.raises(Interrupted, match="start it again"):
        train(config())
    assert sorted(path.name for path in config().out.iterdir()) == ["config.json", "metrics.jsonl", "run_id"]
    RunFolder(config())


@pytest.mark.parametrize("left", [["run_id.writing"], ["run_id"], ["run_id", "config.json.writing"]])
def test_a_start_that_was_killed_is_taken_over(config, left):
    config().out.mkdir()
    for name in left:
        (config().out / name).touch()
    folder = RunFolder(config())
    folder.start(config())
    assert sorted(path.name for path in config().out.iterdir()) == ["config.json", "metrics.jsonl", "run_id"]


def command(config, *more):
    words = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in
             ("data", "model", "out", "batch_size", "log_every", "tracking", "epochs", "learning_rate")]  # fmt: skip
    return [sys.executable, "-m", "fsc147lib", "train", *words, *more]


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
        settings = config(f"killed-{kill}", **options, save_every=0.0 if kill % 4 < 2 else 10.0)
        process = fresh_process(settings)
        step = rng.randint(1, 11)
        wait_for(lambda out=settings.out, step=step: f'"step": {step},' in text_of(out / "metrics.jsonl"), process)
        if kill % 2:
            wait_for(lambda out=settings.out: list(out.glob("*.writing")), process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        resume = (settings.out / "last").is_dir() or (settings.out / "last.old").is_dir()
        if settings.save_every == 0.0 and not kill % 2:  # a checkpoint after each step
            assert json.loads((settings.out / "last" / "training_state.json").read_text())["step"] >= step - 1
        left = sorted(path.name for path in settings.out.iterdir() if path.is_dir())
        assert fresh_process(settings, *["--resume"] * resume).wait() == 0
        ends_equal(whole.out, settings.out)
        print(f"kill {kill + 1} after step {step}: {left}, {'resumed' if resume else 'started again'}, equal")
        shutil.rmtree(settings.out)


def test_a_finished_run_is_made_longer(config, capsys):
    """It goes on at the rate of the longer schedule, which is told."""
    train(config())
    steps = []
    longer = config(epochs=4, resume=True)
    result = train(longer, lambda line: steps.append(line["step"]))
    assert steps[0] == 7 and [line["epoch"] for line in result.epochs] == [0, 1, 2, 3, 4]
    rate = 1e-3 * learning_rate_factor(6, 12, longer.warmup)
    assert f"2 epochs become 4: the schedule is that of 12 steps, the learning rate goes on at {rate:.3g}" in (
        capsys.readouterr().out
    )
    assert result.steps[-6]["learning_rate"] == pytest.approx(rate)
    with pytest.raises(ConfigError, match="epochs is 3, but .* was started with 4"):
        train(config(epochs=3, resume=True))


def logged(step, seconds=0.0):
    """A moment: after a step's line of the log, and some seconds."""

    def reached(out):
        if f'"step": {step},' not in text_of(out / "metrics.jsonl"):
            return False
        time.sleep(seconds)
        return True

    return reached


MOMENTS = {
    "as the folder is begun": (signal.SIGTERM, lambda out: out.exists()),
    "in the first validation": (signal.SIGHUP, lambda out: (out / "metrics.jsonl").exists()),
    "after the first step": (signal.SIGTERM, logged(1)),
    "within the first epoch": (signal.SIGINT, logged(2)),
    "in the validation of the first epoch": (signal.SIGTERM, logged(3, 0.2)),
    "in the first save": (signal.SIGTERM, lambda out: (out / "last.writing").exists()),
    "within the second epoch": (signal.SIGHUP, logged(5)),
    "in the validation of the second epoch": (signal.SIGINT, logged(6, 0.1)),
    "in the second save": (signal.SIGHUP, lambda out: (out / "last.writing").exists() and (out / "last").exists()),
    "as the first save ends": (signal.SIGTERM, lambda out: (out / "best").exists()),
}


@pytest.mark.slow
def test_signals_to_the_whole_group(config):
    """Each saves what there is, ends all processes with the signal's status, and resumes to the same bytes."""
    whole = config("whole", epochs=3)
    assert fresh_process(whole, "--workers=2").wait() == 0
    for name, (number, reached) in MOMENTS.items():
        settings = config(name.replace(" ", "-"), epochs=3)
        process = subprocess.Popen(
            command(settings, "--workers=2"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        wait_for(lambda out=settings.out, reached=reached: reached(out), process)
        os.killpg(process.pid, number)
        _, printed = process.communicate(timeout=120)
        print(f"{name}: {printed.strip()}")
        assert process.returncode == 128 + number and printed.count("\n") == 1, (name, printed)
        with pytest.raises(ProcessLookupError):  # no reader is left
            os.killpg(process.pid, 0)
        assert not list(settings.out.glob("*.writing"))
        resume = (settings.out / "last").is_dir()
        assert ("--resume" in printed) == resume
        assert fresh_process(settings, "--workers=2", *["--resume"] * resume).wait() == 0, name
        ends_equal(whole.out, settings.out)
        shutil.rmtree(settings.out)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="no terminals here")
def test_a_closed_terminal(config):
    """The kernel signals the whole session, and whatever is printed then is an error."""
    settings = config(epochs=50)
    terminal, end = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    process = subprocess.Popen(
        command(settings, "--workers=2"), env=environment, pass_fds=[end], preexec_fn=lambda: os.login_tty(end)
    )
    os.close(end)
    wait_for(lambda: logged(2)(settings.out), process)
    os.close(terminal)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    state = json.loads((settings.out / "last" / "training_state.json").read_text())
    assert state["step"] >= 2
