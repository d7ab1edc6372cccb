import csv
import json

import numpy as np
import pytest
import torch

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.model.device import peak_memory
from fsc147lib.model.heatmaps import InputGradient
from fsc147lib.report import overhead
from fsc147lib.report.overhead import OverheadConfig, measure_overhead, take_turns, time_losses
from fsc147lib.report.shapes import drawn_root, load_or_shape
from fsc147lib.report.timing import table, write_report


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
def test_rows_and_files(tiny, root, tmp_path):
    rows = time_losses(tiny, list(FSC147(root, "train"))[:4], OverheadConfig(batch_size=2, rounds=2))
    assert [(row["method"], row["trained"]) for row in rows] == [
        ("none", False), ("attention", False), ("attention", True), ("token_gradient", False),
        ("token_gradient", True), ("input_gradient", False), ("input_gradient", True),
    ]  # fmt: skip
    assert all(row["seconds_low"] <= row["seconds_median"] <= row["seconds_high"] for row in rows)
    write_report(tmp_path / "rows.json", {"rows": rows, "model": "tiny"})
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == rows and written["threads"] >= 1
    with (tmp_path / "rows.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    assert "input_gradient, trained" in table(rows)


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
    assert [row["out_of_memory"] for row in rows] == [False, False, True]
    assert "overhead_median" not in rows[2]
    assert "out of memory" in table(rows)


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


@pytest.mark.slow
def test_the_command(tmp_path):
    config = OverheadConfig(methods=("attention",), batch_size=2, batches=1, rounds=1, image_size=(64, 96),
                             json=tmp_path / "rows.json")  # fmt: skip
    assert measure_overhead(config) == json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_too_few_samples_are_named(tiny, root):
    with pytest.raises(ValueError, match="2 samples make no batch of 8"):
        time_losses(tiny, list(FSC147(root, "train"))[:2], OverheadConfig())


def test_peak_memory_sees_what_a_call_allocates():
    def small():
        pass

    def large():
        np.ones(30_000_000)  # 229 MiB

    peaks = peak_memory(large, "cpu"), peak_memory(small, "cpu")
    if None in peaks:
        pytest.skip("this system does not tell a process's peak memory anew")
    assert peaks[0] - peaks[1] > 150
