"""Memory of a step and a validation, measured: the place of kept features, and `train --dry-run`."""

from dataclasses import replace

import pytest
import torch

from fsc147lib.__main__ import main
from fsc147lib.model import KeptFeatures, choose_compute, load_model, make_heatmap
from fsc147lib.model.network import freeze_vision
from fsc147lib.training import TrainConfig, memory, setup
from fsc147lib.training.loop import Run
from fsc147lib.training.memory import Measured, plan_training

GIB = 2**30


@pytest.fixture
def config(root, tmp_path):
    return TrainConfig(root, tmp_path / "run", "tiny", batch_size=4, limit=8, epochs=2, unfreeze_vision_at=9)


@pytest.fixture
def run(config):
    run = Run(config)
    freeze_vision(run.model.network, True)
    return run


def test_the_place_goes_by_size(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [memory.choose_place(size, 0) for size in (500, 501)] == ["host", "off"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "gpu_memory", lambda: (1000, 900))
    monkeypatch.setattr(memory, "memory_in_use", lambda _: 100)  # and a twentieth of 1000 stays empty
    assert [memory.choose_place(size, 0) for size in (250, 251)] == ["gpu", "host"]
    assert [memory.choose_place(size, 600) for size in (150, 151)] == ["gpu", "host"]
    assert memory.choose_place(1, float("inf")) == "host"


@pytest.mark.medium
def test_nothing_moves_while_it_is_measured(run):
    before = [weight.detach().clone() for weight in run.model.network.parameters()]
    found, step = memory.measure(run, 4), run.training_step
    assert found.seconds > 0 and found.first > 0
    assert all(torch.equal(p, was) for p, was in zip(run.model.network.parameters(), before, strict=True))
    assert step.features is None and not any(p.grad is not None for p in step.parameters) and not step.unchecked
    assert not step.optimizer.state


@pytest.mark.medium
def test_a_step_and_the_moments_stand_beside_the_features(run, monkeypatch):
    asked: list = []
    monkeypatch.setattr(memory, "gpu_memory", lambda: (GIB, GIB))
    monkeypatch.setattr(memory, "choose_place", lambda *sizes: asked.append(sizes) or "host")
    monkeypatch.setattr(memory, "measure", lambda *_: Measured(7, 1.0, 1.0))
    object.__setattr__(run.compute, "device", torch.device("cuda"))
    trained = sum(weight.nbytes for weight in run.model.network.parameters() if weight.requires_grad)
    memory.place_of_features(run)
    run.training_step.optimizer.state[run.training_step.parameters[0]] = {"step": torch.tensor(1.0)}
    memory.place_of_features(run)  # a resumed run has its moments
    assert [beside for _, beside in asked] == [7 + 2 * trained, 7]

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "measure", full)
    memory.place_of_features(run)
    assert asked[-1][1] == float("inf")
    features = KeptFeatures.encode(run.model, run.kept_samples(), choose_compute("fp32"), "host", 0)
    assert {size for size, _ in asked} == {features.features.nbytes}


@pytest.mark.medium
def test_the_heaviest_pass_need_not_hold_the_longest_images(config):
    """Of lengths 100, 90 ... in passes of 270 tokens: two of 100 are 200, three of 90 are 270."""
    run = Run(replace(config, batch_tokens=270))
    run.batches.lengths = [(1, 1, tokens) for tokens in (60, 100, 90, 70, 90, 80, 90, 100)]
    parts = memory.heaviest_parts(run, 4)
    assert [[run.samples["train"].index(sample) for sample in part] for part in parts] == [[2, 4, 6]] * 2
    run.config = config
    run.batches.batch_tokens = None
    assert [[run.samples["train"].index(sample) for sample in part] for part in memory.heaviest_parts(run, 3)] == [
        [6, 1, 7]
    ]


@pytest.mark.medium
def test_answers_keep_to_four_times_the_tokens_of_a_pass(root, tmp_path, monkeypatch):
    run, seen = Run(TrainConfig(root, tmp_path / "run", "tiny", batch_size=8, batch_tokens=150, limit=8)), []
    monkeypatch.setattr(setup, "evaluate_samples", lambda *args: seen.append(args[-1].batch_tokens) or 1 / 0)
    for method in ("attention", "token_gradient"):  # which needs a backward pass itself
        run.heatmap = make_heatmap(run.model.network, method)
        with pytest.raises(ZeroDivisionError):
            run.validate()
    assert seen == [600, 150]


@pytest.mark.medium
def test_a_dry_run_prints_the_states_of_the_weights_that_train(config, capsys):
    words = ["train", "--data", str(config.data), "--out", str(config.out), "--model", "tiny-random", "--dry-run"]
    assert main([*words, "--batch-size", "4", "--limit", "8"]) == 0
    printed = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    size = sum(weight.numel() for weight in load_model("tiny-random").network.parameters()) * 4 / GIB
    assert float(printed["weights"][0]) == pytest.approx(size, abs=0.01)
    assert float(printed["AdamW's two moments"][0]) == pytest.approx(2 * size, abs=0.01)
    assert "it fits" in printed and "that are free" in " ".join(printed["together"])
    assert not config.out.exists()  # nothing was begun
    fits, text, _ = plan_training(config)
    assert fits and "on the host" in text  # features of a frozen encoder


@pytest.mark.medium
def test_a_run_that_does_not_fit_is_told_what_does(config, run, monkeypatch):
    """Room for two images, not for four; for weights and moments alone; for less than these."""
    trained = run.trained_bytes()
    states = sum(weight.nbytes for weight in run.model.network.parameters()) + 3 * trained
    monkeypatch.setattr(memory, "measure", lambda *_: Measured(trained + 100, 1.0, 1.0))
    for room, told in (
        (states + 200, "it does not fit: try --batch-size 2 --accumulation 2"),
        (states + 50, "it does not fit: try --gradient-checkpointing"),
        (states - 4, f"on each of 2, {states / 4 / GIB:.2f} GiB on each of 4"),
    ):
        monkeypatch.setattr(memory, "free_memory", lambda room=room: room)
        fits, text, _ = plan_training(config)
        assert not fits and told in text
    words = ["train", "--data", str(config.data), "--out", str(config.out), "--limit", "8", "--dry-run"]
    assert main(words) == 1
    monkeypatch.setattr(memory, "free_memory", lambda: states + 200)

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "measure", full)
    assert "it does not fit: try --gradient-checkpointing" in plan_training(config)[1]
    monkeypatch.setattr(memory, "Run", full)
    fits, text, _ = plan_training(config)
    assert not fits and "try --lora 16, or a smaller model" in text
