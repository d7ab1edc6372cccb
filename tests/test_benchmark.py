import json

import numpy as np
import pytest

from fsc147lib import benchmark
from fsc147lib.data import FSC147


def test_variants_take_turns():
    calls = []
    variants = {name: (lambda turn, name=name: calls.append((turn, name))) for name in "abc"}
    seconds = benchmark.time_variants(variants, rounds=2, warmup=1)
    assert calls == [(turn, name) for turn in (-1, 0, 1) for name in "abc"]
    assert all(len(values) == 2 and (values > 0).all() for values in seconds.values())


def test_overhead_is_the_median_of_ratios_within_a_turn(tiny, root, monkeypatch):
    """A machine that becomes ten times slower half-way: the ratio of medians would be off, this is not."""
    base = np.array([1, 1, 1, 10, 10.0])
    seconds = {"count only": base, "count + attention": base * [1.0, 1.1, 1.1, 1.1, 1.3]}
    monkeypatch.setattr(benchmark, "time_variants", lambda *_, **__: seconds)
    rows = benchmark.time_losses(tiny, list(FSC147(root, "train"))[:2], batch_size=2)
    assert rows[0]["overhead_median"] == 0
    assert rows[1]["overhead_median"] == pytest.approx(0.1)
    assert rows[1]["overhead_low"] == pytest.approx(0.1)


def test_rows_and_file(tiny, root, tmp_path):
    rows = benchmark.time_losses(tiny, list(FSC147(root, "train"))[:4], batch_size=2, rounds=2)
    assert [row["name"] for row in rows] == ["count only", "count + attention"]
    assert all(row["seconds_low"] <= row["seconds_median"] <= row["seconds_high"] for row in rows)
    benchmark.write_rows(tmp_path / "rows.json", rows, model="tiny")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == rows and written["threads"] >= 1
    assert "count + attention" in benchmark.table(rows)


def test_too_few_samples_are_named(tiny, root):
    with pytest.raises(ValueError, match="2 samples make no batch of 8"):
        benchmark.time_losses(tiny, list(FSC147(root, "train"))[:2], batch_size=8)


def test_peak_memory_sees_what_a_call_allocates():
    def small():
        pass

    def large():
        np.ones(30_000_000)  # 229 MiB

    peaks = benchmark.peak_memory(large), benchmark.peak_memory(small)
    if None in peaks:
        pytest.skip("this system does not tell a process's peak memory anew")
    assert peaks[0] - peaks[1] > 150
