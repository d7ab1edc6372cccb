"""The throughput benchmark compares what it says it does."""

import csv
import json
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fsc147lib.model.adapt import freeze_vision
from fsc147lib.model.collate import Collate
from fsc147lib.model.network import Recipe
from fsc147lib.report import throughput
from fsc147lib.report.throughput import (
    ThroughputConfig,
    fp32_share,
    make_setup,
    measure_throughput,
    open_runner,
    variants_of,
)
from fsc147lib.report.timing import step_flops
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


@pytest.fixture
def config(tiny, root, tmp_path):
    tiny.recipe = Recipe()  # a frozen encoder, as a large trained model has
    tiny.save(tmp_path / "model")  # a trained model: its encoder is frozen
    return ThroughputConfig(
        data=root, model=str(tmp_path / "model"), batch_size=4, rounds=1, steps=1, limit=8, json=tmp_path / "t.json"
    )


@pytest.mark.slow
def test_a_report_holds_every_variant(config, tmp_path, capsys):
    report = measure_throughput(config)
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
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "validation, vision cache" in printed


@pytest.mark.slow
def test_what_was_measured_survives_a_failure(config, tmp_path, monkeypatch):
    """Each part of the report is written as soon as it is known."""

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(throughput, "measure_validation", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_throughput(config)
    assert len(json.loads((tmp_path / "t.json").read_text())["rows"]) == 4


@pytest.mark.slow
def test_fp32_parameters_are_weighed_against_narrower_ones(config, tmp_path):
    """Against float64 here, for bfloat16 has no speed on most CPUs: weights, gradients and moments all change type."""
    setup = make_setup(config, tmp_path)
    runner = open_runner(variants_of(on_gpu=False, frozen=False)[-1], setup, 2)
    found = fp32_share(runner, steps=1, narrow=torch.float64)
    assert found["share"] == pytest.approx(1 - found["narrow"] / found["float32"]) and found["float32"] > 0
    assert {parameter.dtype for parameter in setup.model.network.parameters()} == {torch.float64}
    moments = [value for state in setup.optimizer.state.values() for value in state.values() if value.ndim]
    assert moments and {value.dtype for value in moments} == {torch.float64}


@pytest.mark.parametrize(
    ("precision", "lora", "weighed"), [("bf16", None, True), ("bf16", 4, False), ("fp32", None, False)]
)
def test_fp32_parameters_are_weighed_where_training_is_in_bfloat16(root, monkeypatch, capsys, precision, lora, weighed):
    for name, result in (("measure_training", []), ("open_runner", Mock()), ("fp32_share", {"share": 0.057})):
        monkeypatch.setattr(throughput, name, lambda *_, result=result: result)
    report = measure_throughput(ThroughputConfig(data=root, precision=precision, lora=lora, limit=2, validation=False))
    assert (report["fp32_parameters"] == {"share": 0.057}) == weighed
    assert ("fp32 parameters and optimizer take 5.7%" in capsys.readouterr().out) == weighed
