"""The throughput benchmark compares what it says it does."""

import csv
import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

from fsc147lib.model.adapt import freeze_vision
from fsc147lib.model.collate import Collate
from fsc147lib.report.overhead import BenchmarkConfig
from fsc147lib.report.throughput import step_flops, throughput
from fsc147lib.training.losses import DualLoss


def test_operations_are_those_that_torch_counts(tiny, mixed_samples):
    """Of linear layers and attention; torch counts whole rows of causal attention, and the mergers, which are few."""
    freeze_vision(tiny.network, True)
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples[:2])
    batch["answer_positions"] = batch["answer_positions"][:, :1].repeat(1, 7)
    batch["answer_labels"] = batch["answer_labels"][:, :1].repeat(1, 7)
    with FlopCounterMode(display=False) as counter:
        DualLoss(tiny.network, weight=0)(batch).total.backward()
    tokens = batch["attention_mask"].sum().item()
    patches = sum(height * width for height, width in batch["image_sizes"])
    expected = step_flops(tiny.network.config, 2, tokens, patches, encoder=True)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.25)


def test_a_report_holds_every_way(tiny, root, tmp_path):
    tiny.save(tmp_path / "model")
    config = BenchmarkConfig(
        model=str(tmp_path / "model"),
        throughput=root,
        batch_size=4,
        rounds=1,
        steps=1,
        limit=8,
        json=tmp_path / "t.json",
    )
    report = throughput(config)
    names = [row["name"] for row in report["rows"]]
    assert names == ["plain transformers loop", "layers called directly", "+ batches by size", "+ vision cache"]
    for row in report["rows"]:
        assert row["images_per_second"] > 0 and row["tokens_per_second"] > 0 and 0 < row["peak_share"] < 1
        assert row["batch_size"] == 4 and 0 <= row["padding"] < 1 and 0 <= row["waiting"] < 1 and row["speedup"] > 0
    assert [row["name"] for row in report["validation"]] == [
        "validation, encoder in the loop", "validation, vision cache",
    ]  # fmt: skip
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["rows"] == report["rows"] and "command" in written and written["cache"]["images"] == 24
    with (tmp_path / "t.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == names


def test_float32_weights_are_weighed_against_bfloat16(root, tmp_path, capsys):
    """Where training is in bfloat16; and each part of the report is written as soon as it is known."""
    config = BenchmarkConfig(
        throughput=root, precision="bf16", batch_size=4, rounds=1, steps=1, limit=8, validation=False,
        json=tmp_path / "t.json",
    )  # fmt: skip
    masters = throughput(config)["masters"]
    assert masters["share"] == pytest.approx(1 - masters["bfloat16"] / masters["float32"])
    assert f"float32 weights and optimizer take {masters['share']:.1%}" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["masters"] == masters
