"""What a step needs of a GPU's memory, measured before image features take their place there; here on a CPU."""

from dataclasses import replace

import pytest
import torch

from fsc147lib.evaluation import answering
from fsc147lib.model import Heatmap, load_model
from fsc147lib.training import TrainConfig, loop, memory
from fsc147lib.training.loop import Run

GIB = 2**30


@pytest.fixture
def config(root, tmp_path):
    return TrainConfig(root, tmp_path / "run", "tiny", batch_size=4, limit=8, epochs=2, unfreeze_vision_at=9)


@pytest.fixture
def run(config):
    run = Run(config)
    loop.freeze_vision(run.model.network, True)
    return run


def as_on_a_gpu(monkeypatch, peaks: list[int], whole: int = GIB):
    """A GPU with 100 bytes in use, on which each thing that is measured has the next of some peaks, in MiB."""
    monkeypatch.setattr(memory, "memory_in_use", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (whole, whole))
    monkeypatch.setattr(memory, "peak_memory", lambda use, _: (use(), peaks.pop(0))[1])


def trained_bytes(run) -> int:
    return sum(weight.nbytes for weight in run.model.network.parameters() if weight.requires_grad)


def left_as_it_was(run) -> bool:
    step = run.training_step
    return step.cache is None and not any(p.grad is not None for p in step.parameters) and not step.unchecked


@pytest.mark.medium
@pytest.mark.parametrize("peaks", [[7, 5], [5, 7]])
def test_the_larger_of_step_and_validation_counts_and_nothing_moves(run, monkeypatch, peaks):
    as_on_a_gpu(monkeypatch, peaks)
    seen, gradient = [], run.training_step.gradient

    def watched(window, weight):
        losses = gradient(window, weight)
        seen.append((len(window), run.model.network.training, float(losses.attention)))
        return losses

    monkeypatch.setattr(run.training_step, "gradient", watched)
    before = [weight.detach().clone() for weight in run.model.network.parameters()]
    window = memory.features_size(run)[1]
    assert memory.memory_of_step(run) == 7 * 2**20 - 100 + 2 * trained_bytes(run) + window
    assert len(seen) == 2 and all(passes == 1 and trains and loss > 0 for passes, trains, loss in seen)
    assert all(torch.equal(p, was) for p, was in zip(run.model.network.parameters(), before, strict=True))
    assert left_as_it_was(run) and not run.training_step.optimizer.state


@pytest.mark.medium
def test_a_run_that_goes_on_has_its_moments_already(run, monkeypatch):
    as_on_a_gpu(monkeypatch, [7, 5])
    run.training_step.optimizer.state[run.training_step.parameters[0]] = {"step": torch.tensor(1.0)}
    assert memory.memory_of_step(run) == 7 * 2**20 - 100 + memory.features_size(run)[1]


@pytest.mark.medium
@pytest.mark.parametrize("where", ["gradient", "evaluate_samples"])
def test_without_room_the_whole_gpu_is_the_step_s(run, monkeypatch, where):
    as_on_a_gpu(monkeypatch, [1, 1])

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run.training_step if where == "gradient" else memory, where, full)
    assert memory.memory_of_step(run) == GIB and left_as_it_was(run)


@pytest.mark.medium
def test_features_without_room_are_not_measured_for(run, monkeypatch):
    features, _ = memory.features_size(run)
    train, val = run.samples.values()
    kept = [*train, *(sample.flipped() for sample in train), *val]
    assert features == memory.VisionCache(run.model, kept, run.accelerator, "host").features.nbytes
    as_on_a_gpu(monkeypatch, [1, 1], whole=4 * features - 4)
    monkeypatch.setattr(memory, "VisionCache", None)
    assert memory.memory_of_step(run) == 4 * features - 4


@pytest.mark.medium
def test_a_run_tells_the_cache_what_the_step_needs(run, monkeypatch):
    made: list = []
    monkeypatch.setattr(loop, "memory_of_step", lambda _: 123)
    monkeypatch.setattr(loop, "VisionCache", lambda *args, beside, **kwargs: made.append(beside))
    monkeypatch.setattr(loop, "freeze_vision", lambda *_: None)
    run.folder.start = lambda _: None
    run.open()
    monkeypatch.setattr(run.accelerator.state, "device", torch.device("cuda"))
    run.open()
    assert made == [0, 123]


@pytest.mark.medium
def test_the_heaviest_pass_need_not_hold_the_longest_images(config):
    """Of lengths 100, 90 ... in passes of 270 tokens: two of 100 are 200, three of 90 are 270."""
    run = Run(replace(config, batch_tokens=270))
    run.batches.lengths = [(1, 1, tokens) for tokens in (60, 100, 90, 70, 90, 80, 90, 100)]
    parts = memory.longest_batch(run, 4)
    assert [[run.samples["train"].index(sample) for sample in part] for part in parts] == [[2, 4, 6]] * 2
    run = Run(config)
    assert [len(part) for part in memory.longest_batch(run, 4)] == [4]


@pytest.mark.medium
def test_answers_keep_to_twice_the_tokens_of_a_pass(root, tmp_path, monkeypatch):
    """With batches of 256 in parts of 20,000 tokens, 512 images at once would be 135,000."""
    heatmap = Heatmap(load_model("tiny-random").network)
    sizes = [answering.answering_batch_size(256, heatmap, tokens, 264) for tokens in (None, 20_000, 100)]
    assert sizes == [512, 150, 2]
    run = Run(TrainConfig(root, tmp_path / "run", "tiny", batch_size=8, batch_tokens=150, limit=8))
    seen: list = []
    monkeypatch.setattr(loop, "evaluate_samples", lambda model, samples, size, *_: seen.append(size) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.validate()
    lengths = {sample.name: run.collate.lengths(sample)[2] for sample in run.samples["val"]}
    assert seen == [2] and max(lengths.values()) <= 150 < 2 * max(lengths.values())
    answers, _ = memory.longest_answers(run, 8)
    assert [lengths[sample.name] for sample in answers] == sorted(lengths.values())[-6:]  # three batches
