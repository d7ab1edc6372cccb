"""The throughput benchmark compares what it says it does."""

import csv
import json
from dataclasses import replace

import pytest

from fsc147lib.model.network import Recipe
from fsc147lib.report.throughput import ThroughputConfig, compare_to_peers, in_own_process, measure, measure_throughput
from fsc147lib.report.timing import table

pytestmark = pytest.mark.medium


@pytest.fixture
def config(tiny, root, tmp_path):
    tiny.recipe = Recipe()  # a frozen encoder, as a large trained model has
    tiny.save(tmp_path / "model")
    return ThroughputConfig(
        data=root, out=tmp_path / "run", model=str(tmp_path / "model"), batch_size=4, batch_sizes=(4,), epochs=2,
        rounds=1, steps=1, limit=8, tracking="disabled", overwrite=True, json=tmp_path / "t.json",
    )  # fmt: skip


@pytest.mark.slow
def test_a_report_holds_every_variant(config, tmp_path, capsys):
    report = measure_throughput(config)
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "plain transformers loop", "transformers.Trainer", "transformers.Trainer, tuned", "this library",
        "+ batches by size", "+ kept image features",
    ]  # fmt: skip
    best = max(row["images_per_second"] for row in report["rows"][:3])
    for row in report["rows"]:
        assert len(row["rates"]) == 1 and row["batch_size"] == 4
        assert row["over_best_peer"] == pytest.approx(row["images_per_second"] / best)
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["rows"] == report["rows"] and "command" in written and written["load"] >= 0
    with (tmp_path / "t.csv").open() as file:
        assert [row["name"].lstrip("'") for row in csv.DictReader(file)] == names  # a sheet would take + for a formula
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_a_row_tells_speed_memory_and_validation(config):
    row = measure("+ kept image features", config)
    assert row["images_per_second"] > 0 and len(row["rates"]) == 1 and 0 <= row["waiting"] < 1
    assert row["validation_per_second"] > 0


def test_a_process_that_ends_in_an_error_is_a_row(config, tmp_path):
    row = in_own_process("this library", replace(config, data=tmp_path / "nowhere"))
    assert "nowhere" in row["failed"] and "this library: failed" in table([row])


def test_multiples_are_over_the_best_peer():
    rows = [
        {"name": "plain transformers loop", "images_per_second": 10.0, "rates": [10.0]},
        {"name": "transformers.Trainer", "images_per_second": 20.0, "rates": [20.0]},
        {"name": "transformers.Trainer, tuned", "batch_size": 4, "out_of_memory": True},
        {"name": "this library", "images_per_second": 50.0, "rates": [50.0]},
    ]
    compare_to_peers(rows)
    assert [row.get("over_best_peer") for row in rows] == [0.5, 1, None, 2.5]
