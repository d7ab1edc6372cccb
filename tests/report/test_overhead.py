"""The overhead benchmark compares steps within a turn, and reports what it measured."""

import csv
import json

import numpy as np
import pytest
import torch

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.model.heatmaps import InputGradient
from fsc147lib.report import overhead
from fsc147lib.report.overhead import OverheadConfig, measure_overhead, take_turns, time_losses
from fsc147lib.report.shapes import drawn_root, load_or_shape
from fsc147lib.report.timing import table
from fsc147lib.training.memory import peak_memory


def test_variants_take_turns():
    calls = []
    steps = {name: (lambda batches, name=name: calls.append((*batches, name))) for name in "abc"}
    seconds = take_turns(steps, [0, 1], rounds=2, device="cpu")
    assert calls == [(batch, name) for batch in (0, 1, 0, 1) for name in "abc"]
    assert all(len(seconds[name]) == 2 for name in "abc")


def test_overhead_is_the_median_of_ratios_within_a_turn(tiny, root, monkeypatch):
    """A machine that becomes ten times slower half-way: the ratio of medians would be off, this is not."""
    base = np.array([1, 1, 1, 10, 10.0])
    trained = np.array([1.0, 1.1, 1.1, 1.1, 1.3])

    def timed(steps, *_):
        return {name: base * (trained if "trained" in name else 1) for name in steps}

    monkeypatch.setattr(overhead, "take_turns", timed)
    rows = time_losses(tiny, list(FSC147(root, "train"))[:2], OverheadConfig(methods=("attention",), batch_size=2))
    assert rows[0]["overhead_median"] == rows[1]["overhead_median"] == 0
    assert rows[2]["overhead_median"] == pytest.approx(0.1)
    assert rows[2]["overhead_low"] <= 0.1 + 1e-9 <= rows[2]["overhead_high"] + 2e-9


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_variant(tmp_path, capsys):
    config = OverheadConfig(batch_size=5, batches=1, rounds=2, image_size=(64, 96), json=tmp_path / "rows.json")
    rows = measure_overhead(config)
    assert [row["name"] for row in rows] == [
        "count only", "attention, computed", "attention, trained", "token_gradient, computed",
        "token_gradient, trained", "input_gradient, computed", "input_gradient, trained",
        "input_gradient, trained on 4",
    ]  # fmt: skip
    assert all(row["seconds_low"] <= row["seconds_median"] <= row["seconds_high"] for row in rows)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == rows and written["threads"] >= 1 and written["image_size"] == [64, 96]
    with (tmp_path / "rows.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    assert "input_gradient, trained on 4" in capsys.readouterr().out


@pytest.mark.slow
def test_out_of_memory_is_a_row(tiny, root, monkeypatch):
    real = InputGradient.mass

    def full(self, batch, create_graph=False, prompts=None):
        if create_graph:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, create_graph, prompts)

    monkeypatch.setattr(InputGradient, "mass", full)
    config = OverheadConfig(methods=("input_gradient",), batch_size=2, rounds=1)
    rows = time_losses(tiny, list(FSC147(root, "train"))[:2], config)
    assert [row["out_of_memory"] for row in rows] == [False, False, True] and "overhead_median" not in rows[2]
    assert "input_gradient, trained: out of memory" in table(rows)


@pytest.mark.medium
@pytest.mark.parametrize(("name", "billions"), [("qwen3-vl-2b", 2.1), ("qwen3-vl-4b", 4.4), ("qwen3-vl-8b", 8.8)])
def test_shapes_have_the_published_sizes(name, billions):
    network = load_or_shape(name, device="meta").network
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_root_is_drawn_with_the_sizes_that_are_wanted(tmp_path):
    samples = FSC147(drawn_root(tmp_path / "root", [(64, 96), (96, 64)]), "train")
    assert [sample.size for sample in samples] == [(64, 96), (96, 64)]
    for sample in samples:
        assert (sample.points >= 0).all() and (sample.points <= sample.size[::-1]).all() and len(sample.boxes) <= 3


def test_too_few_samples_are_named(tiny, root):
    with pytest.raises(ValueError, match="2 samples make no batch of 8"):
        time_losses(tiny, list(FSC147(root, "train"))[:2], OverheadConfig())


def test_peak_memory_sees_what_a_call_allocates():
    large, small = peak_memory(lambda: np.ones(30_000_000), "cpu"), peak_memory(lambda: None, "cpu")  # 229 MiB
    if small is None:
        pytest.skip("this system does not tell a process's peak memory anew")
    assert large - small > 150
