"""The commands, in a process of their own, as a user types them."""

import json
import subprocess
import sys

import pytest


def run(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fsc147lib", *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_check_of_a_clean_root(root, tmp_path):
    done = run("check", root, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert "train: images 24" in done.stdout and "0 faults" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["clean"] is True


def test_check_of_a_missing_root_says_what_to_download(tmp_path):
    done = run("check", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "LearningToCountEverything" in done.stdout and "images_384_VarV2" in done.stdout


def test_synth_train_evaluate(tmp_path):
    done = run("synth", tmp_path / "data", "--train", 6, "--val", 3, "--test", 1, "--seed", 4)
    assert done.returncode == 0, done.stderr
    done = run(
        "train", "--data", tmp_path / "data", "--model", "tiny", "--epochs", 1, "--out", tmp_path / "run",
        "--batch-size", 3, "--attention-layers", 1, 2, "--tracking", "disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["attention_layers"] == [1, 2]
    done = run(
        "evaluate", "--data", tmp_path / "data", "--split", "val", "--model", tmp_path / "run" / "best",
        "--json", tmp_path / "val.json", "--attention-layers", 1, 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    evaluated = json.loads((tmp_path / "val.json").read_text())["metrics"]
    assert evaluated["mae"] == trained["mae"]
    assert evaluated["kl"] == pytest.approx(trained["kl"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--data", "nowhere"), "there is no such folder"),
        (("train", "--data", "nowhere", "--epochs", "0"), "epochs (--epochs) is 0, but must be at least 1"),
        (("evaluate", "--data", "nowhere"), "DataError"),
        (("evaluate", "--data", "nowhere", "--json", "x.csv"), "json (--json) is x.csv"),
        (("evaluate", "--data", "nowhere", "--json", "."), "a file, not a folder"),
        (("synth", ".", "--train", "0"), "not empty"),
        (("synth", "new", "--seed", "-1"), "--seed is -1"),
    ],
)
def test_errors_are_one_line_of_cause_and_no_traceback(tmp_path, words, message):
    (tmp_path / "something").touch()
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    said = " ".join(done.stderr.replace("│", " ").split())  # without the box that wraps it
    assert message in said and "Traceback" not in said


def test_help_lists_the_fields_of_the_dataclass():
    done = run("train", "--help")
    assert done.returncode == 0
    assert "--attention-weight" in done.stdout and "--gradient-checkpointing" in done.stdout
