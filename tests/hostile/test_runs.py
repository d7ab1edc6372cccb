"""Folders of runs that are torn, mixed up, full or in use: a sentence each, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, load_file
from small_root import edit, make_root

from fsc147lib.__main__ import main
from fsc147lib.data.faults import ANNOTATIONS, CLASSES, IMAGES
from fsc147lib.evaluation import answering
from fsc147lib.files import write_manifest
from fsc147lib.model.load import load_model
from fsc147lib.model.network import CountingModel, ModelError
from fsc147lib.options import ConfigError
from fsc147lib.training import loop as training
from fsc147lib.training.loop import TrainConfig, train

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("hostile") / "root")


def settings_of(small_root, out, **changes):
    options = {"model": "tiny-random", "batch_size": 2, "epochs": 2, "tracking": "disabled", "log_every": 1}
    return TrainConfig(**{"data": small_root, "out": out, "resume": True, **options, **changes})


@pytest.fixture(scope="module")
def finished(small_root, tmp_path_factory):
    """Two epochs of two steps."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    train(settings_of(small_root, out, resume=False))
    return out


@pytest.fixture(scope="module")
def another(small_root, tmp_path_factory):
    """The same with another seed: all files are as large."""
    out = tmp_path_factory.mktemp("hostile") / "another"
    train(settings_of(small_root, out, resume=False, seed=1))
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def weights_of_another(out, another):
    shutil.copy(another / "last" / "model.safetensors", out / "last")


def all_of_another(out, another):
    shutil.rmtree(out / "last")
    shutil.copytree(another / "last", out / "last")


def torn_weights(out, _):
    path = out / "last" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def a_flipped_byte(out, _):
    flip(out / "last" / "tokenizer.json")


def no_moments(out, _):
    (out / "last" / "moments.st").unlink()


def torn_manifest(out, _):
    (out / "last" / "manifest.json").write_text('{"files": ')


def no_manifest(out, _):
    (out / "last" / "manifest.json").unlink()


DAMAGES = {  # what is done to last/, and what is said of it
    weights_of_another: "model.safetensors holds other bytes than were written",
    all_of_another: "last is a checkpoint of another run",
    torn_weights: "model.safetensors has .* bytes, but .* were written",
    a_flipped_byte: "tokenizer.json holds other bytes than were written",
    no_moments: "last holds no moments.st",
    torn_manifest: "manifest.json cannot be used",
    no_manifest: "last has no manifest.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_believed(out, another, small_root, capsys, damage):
    """The one before it is used; without one there is a sentence.  The end is the same."""
    before = load((out / "last" / "model.safetensors").read_bytes())  # not a map of a file that is to be damaged
    damage(out, another)
    train(settings_of(small_root, out))
    printed = capsys.readouterr().err
    assert re.search(DAMAGES[damage], printed) and "going on from the checkpoint before it" in printed
    after = load_file(out / "last" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert list(out.glob("damaged-*")), "what was damaged is not thrown away"
    damage(out, another)
    shutil.rmtree(out / "last.old")
    with pytest.raises(ModelError, match=f"(?s){DAMAGES[damage]}.*there is none before it"):
        train(settings_of(small_root, out))


def moved_dots(root):
    edit(root, ANNOTATIONS, lambda entries: entries["2.jpg"].update(points=[[9, 9]] * len(entries["2.jpg"]["points"])))


def renamed_category(root):
    (root / CLASSES).write_text((root / CLASSES).read_text().replace("5.jpg\tsea shells", "5.jpg\tapples"))


def other_pixels(root):
    """A file as large and as old."""
    path = root / IMAGES / "1.jpg"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip(path)
    os.utime(path, ns=times)


CHANGES = {moved_dots: "dots", renamed_category: "categories", other_pixels: "images"}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_on_other_data_of_the_same_names_and_counts_is_refused(out, small_root, tmp_path, change):
    copied = shutil.copytree(small_root, tmp_path / "root", copy_function=shutil.copyfile)
    train(settings_of(copied, out))  # a root may move, and be copied with other times
    change(copied)
    with pytest.raises(ConfigError, match=f"^{CHANGES[change]} of train or val in .*root are not those that the run"):
        train(settings_of(copied, out))


def test_verify_compares_all_bytes(out, small_root, capsys):
    """Loading compares the first MiB of each file, `verify` all of it."""
    flip(out / "best" / "model.safetensors")
    load_model(out / "best")
    assert main(["verify", "--model", str(out / "best"), "--data", str(small_root)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED  files as written: " in printed and "model.safetensors holds other bytes" in printed
    flip(out / "best" / "model.safetensors", 2**19)
    with pytest.raises(ModelError, match="best/model.safetensors holds other bytes than were written"):
        load_model(out / "best")


def test_a_second_run_in_a_folder_is_refused(out, small_root):
    """While the first is at work, from this process or another; not after it was killed."""
    code = "import sys, filelock as f; (a := f.FileLock(sys.argv[1])).acquire(); print(1, flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(out.parent / ".run.lock")]
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    with pytest.raises(ConfigError, match="another run is at work in .*run: wait for its end"):
        train(settings_of(small_root, out))
    first.kill()
    first.wait()
    train(settings_of(small_root, out))

    def second(_):
        with pytest.raises(ConfigError, match="another run is at work"):
            train(settings_of(small_root, out.with_name("new"), resume=False))

    train(settings_of(small_root, out.with_name("new"), resume=False, epochs=1), second)
    assert not list(out.parent.glob(".*.lock"))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_in_the_middle_of_a_checkpoint(small_root, tmp_path, monkeypatch):
    write, calls = CountingModel.write_into, []

    def second_fails(self, folder):
        calls.append(1)
        write(self, folder)
        if len(calls) == 2:
            full()

    monkeypatch.setattr(CountingModel, "write_into", second_fails)
    with pytest.raises(OSError, match="last cannot be written .*No space left.*make room, then go on with --resume"):
        train(settings_of(small_root, tmp_path / "run", resume=False))
    assert not list((tmp_path / "run").glob("*.writing"))
    train(settings_of(small_root, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["last"]["epoch"] == 2


def killed(run):
    worker = next(iter(run.loader)) and run.loader.base_dataloader._iterator._workers[0]
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(100):
        next(iter(run.loader))


def handing_over(_):
    raise ConnectionResetError(104, "Connection reset by peer")


def handing_over_its_end(_):
    raise EOFError


@pytest.mark.parametrize(
    ("death", "twice"), [(killed, False), (handing_over, False), (handing_over, True), (handing_over_its_end, False)]
)
def test_a_killed_worker_is_one_sentence(small_root, tmp_path, monkeypatch, capsys, death, twice):
    """torch's handler of dead processes can raise once more, anywhere in the program."""

    def raise_once(error, seen=[]):  # noqa: B006
        if not seen:
            seen.append(error)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return True

    monkeypatch.setattr(training, "train_epoch", lambda run, progress: death(run))
    if twice:
        monkeypatch.setattr("fsc147lib.readers.reader_died", raise_once)
    words = ("train", "--data", small_root, "--out", tmp_path / "run", "--model", "tiny-random", "--workers", 1)
    assert main([*map(str, words), "--tracking=disabled"]) == 2
    printed = capsys.readouterr().err
    assert "a process that reads images was killed" in printed and "Traceback" not in printed


def test_tracking_online_without_a_key(small_root, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("train", "--data", small_root, "--out", tmp_path / "run", "--model", "tiny-random", "--tracking", "online")
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    assert "tracking (--tracking) is online, but" in printed and "wandb login" in printed


@pytest.mark.parametrize("command", ["evaluate", "predict", "overhead", "throughput", "verify", "check"])
def test_where_numbers_go_is_looked_at_before_the_work(small_root, tmp_path, monkeypatch, capsys, command):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "numbers.json"
    words = {
        "predict": [str(small_root / "images_384_VarV2" / "1.jpg"), "--category", "shells"],
        "evaluate": ["--data", str(small_root)],
        "check": [str(small_root)],
        "throughput": ["--data", str(small_root)],
    }
    for module in ("model.load", "report.shapes", "report.verify", "report.predictions", "evaluation.answering"):
        monkeypatch.setattr(f"fsc147lib.{module}.load_model", lambda *_, **__: pytest.fail("work"), raising=False)
    with pytest.raises(SystemExit, match="2"):
        main([command, *words.get(command, []), "--json", str(target)])
    assert "where files can be written" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_metrics_are_printed_though_they_cannot_be_written(small_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answering, "write_json", full)
    words = ("evaluate", "--data", small_root, "--model", "tiny-random", "--json", tmp_path / "x.json")
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert "MAE" in printed.out and "No space left" in printed.err


def test_metrics_that_are_not_finite_are_an_error(small_root, tmp_path, monkeypatch, capsys):
    alignment = answering.alignment
    monkeypatch.setattr(answering, "alignment", lambda a, p: {k: v * torch.nan for k, v in alignment(a, p).items()})
    words = ("evaluate", "--data", small_root, "--model", "tiny-random", "--json", tmp_path / "x.json")
    assert main([str(word) for word in words]) == 2
    assert "kl is nan" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_the_manifest_is_of_all_files(out):
    written = json.loads((out / "last" / "manifest.json").read_text())
    names = {path.name for path in (out / "last").iterdir()} - {"manifest.json"}
    assert set(written["files"]) == names and written["run"] == (out / "run_id").read_text()


def test_a_checkpoint_with_moments_under_their_old_name_is_refused(small_root, out):
    """It is sound, but a server would read `training_state.safetensors` as weights."""
    (out / "last" / "moments.st").rename(out / "last" / "training_state.safetensors")
    (out / "last" / "manifest.json").unlink()
    write_manifest(out / "last", run=(out / "run_id").read_text())
    with pytest.raises(ConfigError, match="has no moments.st: another version .*new run with --model .*last and"):
        train(settings_of(small_root, out))
