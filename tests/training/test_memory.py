"""What a step needs of a GPU's memory, measured before image features take their place there; here on a CPU."""

from dataclasses import replace

import pytest
import torch

from fsc147lib.evaluation import answering
from fsc147lib.model import make_heatmap
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
    assert features == memory.VisionCache(run.model, kept, run.compute, "host").features.nbytes
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
    run.compute = replace(run.compute, device=torch.device("cuda"))
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
def test_answers_have_the_room_of_a_training_pass(root, tmp_path, monkeypatch):
    """Without gradients that is four times the tokens, whatever the batch size."""
    run = Run(TrainConfig(root, tmp_path / "run", "tiny", batch_size=8, batch_tokens=150, limit=8))
    gradient = make_heatmap(run.model.network, "token_gradient")
    assert [answering.answering_tokens(150, one) for one in (run.heatmap, gradient)] == [600, 150]
    seen: list = []
    monkeypatch.setattr(loop, "evaluate_samples", lambda *_, batch_tokens: seen.append(batch_tokens) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.validate()
    assert seen == [600]
    lengths = {sample.name: run.collate.lengths(sample)[2] for sample in run.samples["val"]}
    answers, _ = memory.longest_answers(run)
    together = 600 // max(lengths.values())
    assert 1 < together < 8 and [lengths[one.name] for one in answers] == sorted(lengths.values())[-together:]
    run = Run(TrainConfig(root, tmp_path / "run", "tiny", batch_size=4, limit=8))
    assert memory.pass_tokens(run) == 4 * max(tokens for *_, tokens in run.batches.lengths)
