"""The commands, as a user types them."""

import ast
import dataclasses
import gc
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from fsc147lib.__main__ import COMMANDS, imported, main


@pytest.fixture
def command(capsys):
    """Runs a command in this process: its exit status, and what it printed to stdout and stderr."""

    def call(*words) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # raised by the parser of options
            status = stop.code
        return status, *capsys.readouterr()

    return call


def python_m(*words):
    """`python -m fsc147lib ...` in a process of its own, as a user types it."""
    words = [sys.executable, "-m", "fsc147lib", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_check_of_a_clean_root(command, root, tmp_path):
    status, out, err = command("check", root, "--json", tmp_path / "report.json")
    assert status == 0, err
    assert "train: images 24" in out and "0 faults" in out
    assert json.loads((tmp_path / "report.json").read_text())["clean"] is True


def test_check_of_a_missing_root_says_what_to_download(command, tmp_path):
    status, out, _ = command("check", tmp_path / "nowhere")
    assert status == 1
    assert "LearningToCountEverything" in out and "images_384_VarV2" in out


@pytest.mark.slow
def test_synth_train_evaluate(command, tmp_path):
    status, _, err = command("synth", tmp_path / "data", "--train", 6, "--val", 3, "--test", 1, "--seed", 4)
    assert status == 0, err
    done = python_m(
        "train", "--data", tmp_path / "data", "--model", "tiny-random", "--epochs", 1, "--out", tmp_path / "run",
        "--batch-size", 3, "--attention-layers", 1, 2, "--tracking", "disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["attention_layers"] == [1, 2]
    assert "\nlast - before: MAE " in done.stdout
    status, out, err = command(
        "evaluate", "--data", tmp_path / "data", "--split", "val", "--model", tmp_path / "run" / "best",
        "--json", tmp_path / "val.json", "--attention-layers", 1, 2,
    )  # fmt: skip
    assert status == 0, err
    assert "before (tiny-random)" in out and "\nmodel - before: MAE " in out
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
        (("synth", ".", "--train", "1"), "not empty"),
        (("synth", "new", "--seed", "-1"), "--seed is -1"),
    ],
)
def test_errors_are_one_line_of_cause_and_no_traceback(command, tmp_path, monkeypatch, words, message):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    status, _, err = command(*words)
    assert status == 2
    assert message in " ".join(err.replace("│", " ").split())  # without the box that wraps it


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_each_option_with_a_sentence(command, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fsc147lib"])
    status, printed, _ = command(name, "--help")
    assert status == 0 and printed.startswith(f"usage: fsc147lib {name} ")
    module, options = COMMANDS[name][0].split(":")
    config = getattr(importlib.import_module(f"fsc147lib.{module}"), options)
    fields = [field.name for field in dataclasses.fields(config)]
    for field in dataclasses.fields(config)[1:]:  # the first may be an argument without a flag
        if "Positional" not in str(field.type):
            assert "--" + field.name.replace("_", "-") in printed.replace("no-", ""), field.name
    for owner in (one for one in config.__mro__ if dataclasses.is_dataclass(one)):
        source = textwrap.dedent(inspect.getsource(owner))
        body, lines = ast.parse(source).body[0].body, source.splitlines()
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and statement.target.id in fields:
                commented = "  # " in lines[statement.end_lineno - 1]
                assert commented or isinstance(following, ast.Expr), ast.unparse(statement)


def test_help_names_every_command_and_loads_no_torch():
    code = """
import sys
from fsc147lib.__main__ import main
assert main(["--help"]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_no_command_and_a_word_that_is_none_are_answered_with_the_commands(command):
    status, out, _ = command()
    assert status == 2 and "  train " in out
    status, _, err = command("trian")
    assert status == 2 and "'trian' is no command" in err and "  train " in err


def test_python_m_and_the_console_script_are_one_program():
    done = python_m("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m fsc147lib COMMAND")
    scripts = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fsc147lib": "fsc147lib.__main__:main"}


def test_import_makes_a_root_that_check_finds_clean(command, root, tmp_path):
    (tmp_path / "dots.csv").write_text("image,x,y\n1.jpg,10,20\n1.jpg,30,40\n2.jpg,50,60\n")
    words = ("--images", root / "images_384_VarV2", "--points", tmp_path / "dots.csv", "--category", "apples")
    status, out, err = command("import", tmp_path / "own", *words)
    assert status == 0 and "1 pictures in train, 1 pictures in val" in out, err
    (tmp_path / "own" / "ImageClasses_FSC147.txt").unlink()
    assert command("check", tmp_path / "own", "--category", "apples")[0] == 0
    assert command("check", tmp_path / "own")[0] == 1


def test_a_program_that_calls_main_keeps_its_garbage_collector(monkeypatch):
    """What imports leave is set aside once; nothing that a program makes later, and only if it collects at all."""
    frozen = gc.get_freeze_count()
    assert imported("data.checking") is importlib.import_module("fsc147lib.data.checking")
    assert gc.isenabled() and gc.get_freeze_count() == frozen  # it was there
    monkeypatch.setattr(importlib, "import_module", lambda name: gc.isenabled())
    try:
        assert imported("new") is False and gc.isenabled() and gc.get_freeze_count() > frozen
        gc.unfreeze()
        gc.disable()
        assert imported("new") is False and not gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.unfreeze()
        gc.enable()
