"""The throughput benchmark compares what it says it does."""

import csv
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fsc147lib.model.attention import IMPLEMENTATIONS
from fsc147lib.model.collate import Collate
from fsc147lib.model.network import Recipe, freeze_vision
from fsc147lib.report import trials
from fsc147lib.report.throughput import ThroughputConfig, ask, compare, measure_throughput, variants_of
from fsc147lib.report.timing import table
from fsc147lib.report.trials import Trial, Variant, load_by, longest_of_each_kind, sizes_of, step_flops
from fsc147lib.training.losses import DualLoss

pytestmark = pytest.mark.medium


def test_operations_are_those_that_torch_counts(tiny, mixed_samples):
    """Of linear layers and attention; torch counts whole rows of causal attention, and the mergers, which are few."""
    freeze_vision(tiny.network, True)
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples[:2])
    batch["answer_positions"] = batch["answer_positions"][:, :1].repeat(1, 7)
    batch["answer_labels"] = batch["answer_labels"][:, :1].repeat(1, 7)
    with FlopCounterMode(display=False) as counter:
        DualLoss(tiny.network, weight=0)(batch).total.backward()
    expected = step_flops(tiny.network.config, sizes_of([batch]), encoder=True)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.25)


@pytest.fixture
def config(tiny, root, tmp_path):
    tiny.recipe = Recipe()  # a frozen encoder, as a large trained model has
    tiny.save(tmp_path / "model")  # a trained model: its encoder is frozen
    return ThroughputConfig(
        data=root, out=tmp_path, model=str(tmp_path / "model"), batch_size=4, epochs=2, rounds=1, steps=1, limit=8,
        tracking="disabled", json=tmp_path / "t.json",
    )  # fmt: skip


@pytest.mark.slow
def test_a_report_holds_every_variant(config, tmp_path, capsys):
    report = measure_throughput(config)
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "plain transformers loop", "transformers.Trainer", "layers called directly", "+ batches by size",
        "+ vision cache",
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["images_per_second"] > 0 and 0 < row["peak_share"] < 1 and len(row["rates"]) == 1
        assert row["batch_size"] == 4 and 0 <= row["padding"] < 1 and row["retries"] == 0 and row["speedup"] > 0
    assert [bool(row["validation_rates"]) for row in report["rows"]] == [False] * 3 + [True] * 2
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["rows"] == report["rows"] and "command" in written
    with (tmp_path / "t.csv").open() as file:
        assert [row["name"].lstrip("'") for row in csv.DictReader(file)] == names  # a sheet would take + for a formula
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "of Trainer" in printed


@pytest.mark.slow
def test_three_precisions_learn_the_same(config):
    """From one start and the same batches; on a CPU all three could as well be one, so it is bf16 that differs."""
    rows = measure_throughput(replace(config, curves=3, batch_size=2))["rows"]
    assert [len(row["losses"]) for row in rows] == [3, 3, 3]
    fast, plain, full = (row["losses"] for row in rows)
    assert fast != full and fast == pytest.approx(full, rel=0.05) and plain == pytest.approx(full, rel=0.05)


@pytest.fixture
def trial(config):
    return Trial(Variant("here", config))


def test_a_batch_without_room_becomes_the_half_and_begins_anew(trial, monkeypatch):
    assert trial.turn()["rates"] and trial.batch_size == 4
    real, room = Trial.train_on, 2

    def train_on(self, window):
        if len(window[0]["names"]) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, window)

    monkeypatch.setattr(Trial, "train_on", train_on)
    row = trial.turn()
    assert row["batch_size"] == 2 and len(row["rates"]) == 1
    room = 0
    row = trial.turn()
    assert row == {"name": "here", "out_of_memory": True} and "here: out of memory" in table([row])


def test_a_batch_in_parts_is_one_step_and_each_turn_begins_with_the_longest_images(config, monkeypatch):
    """So that memory is taken before time is: the longest four images, in parts of at most 300 tokens."""
    trial = Trial(Variant("here", replace(config, batch_tokens=300)))
    seen, real = [], Trial.train_on
    monkeypatch.setattr(Trial, "train_on", lambda self, window: seen.append(window) or real(self, window))
    row = trial.turn()
    lengths = sorted(tokens for *_, tokens in trial.run.batches.lengths)
    shapes = [[tuple(batch["attention_mask"].shape) for batch in window] for window in seen]
    assert sum(rows for rows, _ in shapes[1]) == 4 and max(tokens for _, tokens in shapes[1]) == lengths[-1]
    assert all(rows * tokens <= 300 for window in shapes for rows, tokens in window) and len(shapes[1]) > 1
    assert shapes.count(shapes[1]) >= 4 and shapes[-2] == shapes[1]  # before the step that is timed
    assert len(row["rates"]) == 1


def test_a_variant_begins_with_lengths_of_both_kinds():
    """Torch compiles those that are multiples of 8 apart: in a timed step that would be seconds."""
    lengths = [(1, 1, tokens) for tokens in (5, 16, 9, 8)]
    run = SimpleNamespace(batches=SimpleNamespace(lengths=lengths))
    assert longest_of_each_kind(run) == [[0, 3, 2], [0, 3, 2, 1]]
    run.batches.lengths = lengths[::2]
    assert longest_of_each_kind(run) == [[0, 1]]


def test_images_are_read_by_processes_that_start_as_here():
    """Spawned ones, as a variant's process is itself, import torch one after the other."""
    here = multiprocessing.get_start_method()
    with ProcessPoolExecutor(1, get_context("spawn"), load_by, (here,)) as process:
        assert process.submit(multiprocessing.get_start_method).result() == here


def test_a_peer_has_transformers_own_attention(config):
    theirs, ours = (Trial(Variant(name, config, peer=peer)) for name, peer in (("theirs", "loop"), ("here", None)))
    of_text = [trial.network.config.text_config._attn_implementation for trial in (theirs, ours)]
    assert of_text == ["sdpa", IMPLEMENTATIONS["text_config"]]


def test_so_does_the_batch_of_the_trainer(config, monkeypatch):
    real = trials.trainer_steps

    def trainer_steps(model, samples, batch_size, *args):
        if batch_size > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(model, samples, batch_size, *args)

    trial = Trial(Variant("theirs", config, peer="trainer"))
    assert trial.turn()["batch_size"] == 4
    monkeypatch.setattr(trials, "trainer_steps", trainer_steps)
    assert trial.turn()["batch_size"] == 2


def test_a_process_that_fails_or_dies_is_a_row(config, tmp_path):
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        row = ask(process, "turn", Variant("lost", replace(config, data=tmp_path / "nowhere")))
        assert row["name"] == "lost" and "nowhere" in row["failed"] and "lost: failed" in table([row])
        process.submit(os._exit, 3)
        assert "terminated" in ask(process, "turn", Variant("lost", config))["failed"]


def test_ratios_are_within_a_turn_and_a_spread_is_told():
    rows = compare([
        {"name": "plain transformers loop", "rates": [1.0, 2.0, 4.0]}, {"name": "other", "rates": [4.0, 8.0]},
        {"name": "steady", "rates": [6.0, 6.3, 6.2]}, {"name": "gone", "failed": "why"},
    ])  # fmt: skip
    assert rows[1]["speedup"] == 2 and rows[1]["over_trainer"] is None
    assert rows[1]["spread"] == pytest.approx(4 / 6) and rows[2]["spread"] is None


@pytest.mark.parametrize("on_gpu", [False, True])
def test_variants(config, on_gpu):
    frozen, training = (variants_of(config, on_gpu, frozen) for frozen in (True, False))
    assert [variant.peer for variant in frozen[:3]] == ["loop", "trainer", None]
    assert frozen[:-1] == training and "cache" in frozen[-1].name and frozen[-1].config.vision_cache == "auto"
    assert all(variant.config.vision_cache == "off" for variant in training)
    assert any(variant.config.compile for variant in frozen) == on_gpu
    assert [variant.answers for variant in training].count(True) == 1
