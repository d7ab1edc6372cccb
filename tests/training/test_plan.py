"""What `train --dry-run` says of a run, against what the run then takes."""

from dataclasses import replace

import pytest

from fsc147lib.__main__ import main
from fsc147lib.model import VisionCache, choose_compute, load_model
from fsc147lib.training import TrainConfig, plan
from fsc147lib.training.plan import describe, largest_that_fits, plan_training
from fsc147lib.training.step import TrainingStep


@pytest.fixture
def config(root, tmp_path):
    return TrainConfig(root, tmp_path / "run", "tiny-random", batch_size=4, limit=8)


@pytest.mark.medium
def test_states_are_those_of_the_weights_that_train(config, capsys):
    assert main(["train", "--data", str(config.data), "--out", str(config.out), "--model", "tiny-random",
                 "--batch-size", "4", "--limit", "8", "--dry-run"]) == 0  # fmt: skip
    printed = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    size = sum(weight.numel() for weight in load_model("tiny-random").network.parameters()) * 4 / 2**30
    assert float(printed["weights"][0]) == pytest.approx(size, abs=0.01)
    assert float(printed["AdamW's two moments"][0]) == pytest.approx(2 * size, abs=0.01)
    assert "it fits" in printed and "that are free" in " ".join(printed["together"])
    assert not config.out.exists()  # nothing was begun


@pytest.mark.medium
def test_the_cache_is_as_large_as_the_run_s(config, monkeypatch):
    config = TrainConfig(config.data, config.out, "tiny", batch_size=4, limit=8, epochs=2, unfreeze_vision_at=9)
    found = largest_that_fits(config)
    train, val = (config.open_split(split) for split in ("train", "val"))
    model, samples = load_model("tiny"), [*train, *(sample.flipped() for sample in train), *val]
    cache = VisionCache(model, samples, choose_compute("fp32"), "host")
    assert found.cache == ("host", cache.features.nbytes)
    vision = sum(weight.nbytes for weight in model.network.model.visual.parameters())
    assert found.memory["gradients"] == found.memory["weights"] - vision


@pytest.mark.medium
def test_a_batch_is_measured_in_the_parts_that_it_is_cut_into(config, monkeypatch):
    """On a CPU the memory of so many images as the largest part has is asked for, not of the whole batch."""
    seen, step = [], TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda self, window, weight: seen.append(window) or step(
        self, window, weight))  # fmt: skip
    whole, cut = (largest_that_fits(replace(config, batch_tokens=tokens)) for tokens in (None, 300))
    assert whole.config.batch_size == cut.config.batch_size == 4
    shapes = [tuple(batch["input_ids"].shape) for batch in seen[-1]]
    assert [images for images, _ in shapes] == [2, 2] and max(images * tokens for images, tokens in shapes) <= 300
    room = sum(cut.states.values()) + 250
    monkeypatch.setattr(plan, "free_memory", lambda: room)
    monkeypatch.setattr(plan, "_measured", lambda run, found, size: plan.replace(
        found, config=plan.replace(run.config, batch_size=size), activations=100 * min(size, 2), step=1.0))  # fmt: skip
    fitting = [largest_that_fits(replace(config, batch_tokens=tokens)) for tokens in (None, 300)]
    assert [found.config.batch_size for found in fitting] == [2, 4]


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_does(config, monkeypatch):
    """Room for two images, and not for four."""
    wanted = largest_that_fits(config)
    states = sum(wanted.states.values())
    monkeypatch.setattr(plan, "_measured", lambda run, found, size: plan.replace(
        found, config=plan.replace(run.config, batch_size=size, accumulation=4 // size), activations=size * 100,
        step=1.0, epoch=2.0))  # fmt: skip
    monkeypatch.setattr(plan, "free_memory", lambda: states + 200)
    plans = plan_training(config)
    assert [found.config.batch_size for found in plans] == [4, 2, 2, 4]  # adapters have small states
    assert not plans[0].fits and all(found.fits for found in plans[1:])
    text = describe(plans)
    assert "it does not fit; what does:\n  --batch-size 2 --accumulation 2: 0." in text
    assert "--lora 16 --gradient-checkpointing" in text.splitlines()[-1]
    monkeypatch.setattr(plan, "free_memory", lambda: 100)
    assert "nothing that was tried: take a smaller model" in describe(plan_training(config))
    monkeypatch.setattr(plan, "free_memory", lambda: states + 200)
    words = ["train", "--data", str(config.data), "--out", str(config.out), "--model", "tiny-random", "--dry-run"]
    assert main([*words, "--limit", "8", "--batch-size", "4"]) == 1


@pytest.mark.medium
def test_weights_without_room_are_no_traceback(config, monkeypatch):
    def full(config):
        raise plan.torch.OutOfMemoryError

    monkeypatch.setattr(plan, "Run", full)
    monkeypatch.setattr(plan, "free_memory", lambda: 2**20)
    plans = plan_training(config)
    assert len(plans) == 1 and "it does not fit" in describe(plans) and "take a smaller model" in describe(plans)
