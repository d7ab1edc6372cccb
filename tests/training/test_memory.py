"""What a step needs of memory, measured before image features take their place; and what `train --dry-run` tells."""

from dataclasses import replace

import pytest
import torch

from fsc147lib.__main__ import main
from fsc147lib.model import KeptFeatures, choose_compute, load_model, make_heatmap
from fsc147lib.model.network import freeze_vision
from fsc147lib.training import TrainConfig, memory, plan, setup
from fsc147lib.training.loop import Run
from fsc147lib.training.plan import describe, make_plan, plan_training

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
    assert [memory.choose_place(size, 0) for size in (500, 501)] == ["host", "disk"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "gpu_memory", lambda: (1000, 900))
    monkeypatch.setattr(memory, "memory_in_use", lambda _: 100)  # and a twentieth of 1000 stays empty
    assert [memory.choose_place(size, 0) for size in (250, 251)] == ["gpu", "host"]
    assert [memory.choose_place(size, 600) for size in (150, 151)] == ["gpu", "host"]


def test_features_of_an_80_gb_card_wait_on_the_host_where_a_step_needs_its_memory(monkeypatch):
    """2,323 images' features, 17.3 GiB, beside passes of 20,000 tokens: on an H100 these had room for 32 images."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "free_memory", lambda: 120 * 2**30)
    monkeypatch.setattr(memory, "gpu_memory", lambda: (int(79.2 * 2**30), int(78.6 * 2**30)))
    monkeypatch.setattr(memory, "memory_in_use", lambda _: 8 * 2**30)
    places = [memory.choose_place(18_609_930_240, int(beside * 2**30)) for beside in (58, 45)]
    assert places == ["host", "gpu"]


@pytest.mark.medium
def test_nothing_moves_while_it_is_measured(run):
    before = [weight.detach().clone() for weight in run.model.network.parameters()]
    found, step = memory.measure(run, 4), run.training_step
    assert found.seconds > 0 and found.first > 0  # and bytes that a process has had before are none
    assert all(torch.equal(p, was) for p, was in zip(run.model.network.parameters(), before, strict=True))
    assert step.features is None and not any(p.grad is not None for p in step.parameters) and not step.unchecked
    assert not step.optimizer.state


@pytest.mark.medium
@pytest.mark.parametrize("peaks", [[7, 5], [5, 7]])
def test_the_larger_of_step_and_validation_stands_beside_the_features(run, monkeypatch, peaks):
    asked: list = []
    monkeypatch.setattr(memory, "gpu_memory", lambda: (GIB, GIB))
    monkeypatch.setattr(memory, "choose_place", lambda size, beside: asked.append((size, beside)) or "host")
    found = memory.Measured(step=peaks[0], answers=peaks[1], window=3)
    monkeypatch.setattr(memory, "measure", lambda *_: found)
    object.__setattr__(run.compute, "device", torch.device("cuda"))
    trained = sum(weight.nbytes for weight in run.model.network.parameters() if weight.requires_grad)
    memory.place_of_features(run)
    run.training_step.optimizer.state[run.training_step.parameters[0]] = {"step": torch.tensor(1.0)}
    memory.place_of_features(run)  # a run that goes on has its moments already
    assert asked == [(memory.features_bytes(run), 7 + 2 * trained + 3), (memory.features_bytes(run), 7 + 3)]

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "measure", full)
    memory.place_of_features(run)
    assert asked[-1][1] == GIB


@pytest.mark.medium
def test_features_take_what_is_foretold(run):
    train, val = run.samples.values()
    kept = [*train, *(sample.flipped() for sample in train), *val]
    features = KeptFeatures.encode(run.model, kept, choose_compute("fp32"), "host", run.config.out, 0).features
    assert memory.features_bytes(run) == features.nbytes


@pytest.mark.medium
def test_the_heaviest_pass_need_not_hold_the_longest_images(config):
    """Of lengths 100, 90 ... in passes of 270 tokens: two of 100 are 200, three of 90 are 270."""
    run = Run(replace(config, batch_tokens=270))
    run.batches.lengths = [(1, 1, tokens) for tokens in (60, 100, 90, 70, 90, 80, 90, 100)]
    parts = memory.heaviest_parts(run, 4)
    assert [[run.samples["train"].index(sample) for sample in part] for part in parts] == [[2, 4, 6]] * 2
    run = Run(config)
    assert [len(part) for part in memory.heaviest_parts(run, 4)] == [4]


@pytest.mark.medium
def test_answers_keep_to_four_times_the_tokens_of_a_pass(root, tmp_path, monkeypatch):
    run, seen = Run(TrainConfig(root, tmp_path / "run", "tiny", batch_size=8, batch_tokens=150, limit=8)), []
    monkeypatch.setattr(setup, "evaluate_samples", lambda *args: seen.append(args[-1].batch_tokens) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.validate()
    run.heatmap = make_heatmap(run.model.network, "token_gradient")  # which needs a backward pass itself
    with pytest.raises(ZeroDivisionError):
        run.validate()
    assert seen == [600, 150]
    assert sum(run.collate.lengths(sample)[2] for sample in memory.heaviest_answers(run)) <= 150


# --- The dry run


@pytest.mark.medium
def test_states_are_those_of_the_weights_that_train(config, capsys):
    words = ["train", "--data", str(config.data), "--out", str(config.out), "--model", "tiny-random", "--dry-run"]
    assert main([*words, "--batch-size", "4", "--limit", "8"]) == 0
    printed = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    size = sum(weight.numel() for weight in load_model("tiny-random").network.parameters()) * 4 / GIB
    assert float(printed["weights"][0]) == pytest.approx(size, abs=0.01)
    assert float(printed["AdamW's two moments"][0]) == pytest.approx(2 * size, abs=0.01)
    assert "it fits" in printed and "that are free" in " ".join(printed["together"])
    assert not config.out.exists()  # nothing was begun


@pytest.mark.medium
def test_a_plan_tells_the_features_of_a_frozen_encoder(config):
    found = make_plan(config)
    model = load_model("tiny").network
    vision = sum(weight.nbytes for weight in model.model.visual.parameters())
    assert found.features == ("host", memory.features_bytes(Run(config)))
    assert found.parts["gradients"] == found.parts["weights"] - vision


@pytest.mark.medium
def test_what_does_not_fit_is_told_what_does(config, monkeypatch, capsys):
    """Room for two images, and not for four."""

    def needs(run, size):
        trained = sum(p.nbytes for p in run.training_step.parameters if p.requires_grad)
        return memory.Measured(step=trained + 100, first=1.0, seconds=1.0)

    states = sum(list(make_plan(config).parts.values())[:3])
    monkeypatch.setattr(plan, "measure", needs)
    monkeypatch.setattr(plan, "free_memory", lambda: states + 200)
    plans = plan_training(config)
    assert [found.config.batch_size for found in plans] == [4, 2, 2, 4]  # adapters have small states
    assert not plans[0].fits and all(found.fits for found in plans[1:])
    text = describe(plans)
    assert "it does not fit; what does:\n  --batch-size 2 --accumulation 2: 0." in text
    assert "--lora 16 --gradient-checkpointing" in text.splitlines()[-1]
    monkeypatch.setattr(plan, "free_memory", lambda: 100)
    assert "nothing that was tried: take a smaller model" in describe(plan_training(config))
    words = ["train", "--data", str(config.data), "--out", str(config.out), "--model", "tiny-random", "--dry-run"]
    assert main([*words, "--limit", "8", "--batch-size", "4"]) == 1


@pytest.mark.medium
def test_weights_without_room_are_no_traceback(config, monkeypatch):
    def full(config):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(plan, "Run", full)
    monkeypatch.setattr(plan, "free_memory", lambda: 2**20)
    plans = plan_training(config)
    assert len(plans) == 1 and "it does not fit" in describe(plans) and "take a smaller model" in describe(plans)
