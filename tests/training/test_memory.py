"""What a step needs of a GPU's memory, measured before image features take their place there; here on a CPU."""

import pytest
import torch

from fsc147lib.evaluation import answering
from fsc147lib.model import Heatmap, load_model
from fsc147lib.training import TrainConfig, loop, memory
from fsc147lib.training.loop import Run


@pytest.fixture
def run(root, tmp_path):
    return Run(TrainConfig(root, tmp_path / "run", "tiny", batch_size=4, limit=8, epochs=2, unfreeze_vision_at=9))


def as_on_a_gpu(monkeypatch, peaks: list[int], done: list):
    """A GPU of 1000 bytes with 100 in use, on which each thing that is measured has the next of some peaks, in MiB."""
    monkeypatch.setattr(memory, "memory_in_use", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (900, 1000))
    monkeypatch.setattr(memory, "peak_memory", lambda use, _: (done.append(use()), peaks.pop(0))[1])


@pytest.mark.medium
@pytest.mark.parametrize("peaks", [[7, 5], [5, 7]])
def test_the_larger_of_step_and_validation_counts_and_nothing_moves(run, monkeypatch, peaks):
    done: list = []
    as_on_a_gpu(monkeypatch, peaks, done)
    loop.freeze_vision(run.model.network, True)
    before = [weight.detach().clone() for weight in run.model.network.parameters()]
    moments = 2 * sum(weight.nbytes for weight in run.model.network.parameters() if weight.requires_grad)
    assert memory.memory_of_step(run) == 7 * 2**20 - 100 + moments
    assert done[0].attention > 0  # both losses, as in a step
    assert run.model.network.training  # as in a step, too: layers forget what they are told to
    for weight, was in zip(run.model.network.parameters(), before, strict=True):
        assert torch.equal(weight, was) and weight.grad is None
    assert not run.training_step.optimizer.state and not run.training_step.unchecked


@pytest.mark.medium
def test_without_room_the_whole_gpu_is_the_step_s(run, monkeypatch):
    as_on_a_gpu(monkeypatch, [1, 1], [])

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run.training_step, "gradient", full)
    assert memory.memory_of_step(run) == 1000


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
def test_answers_keep_to_twice_the_tokens_of_a_pass(root, tmp_path, monkeypatch):
    """With batches of 256 in parts of 20,000 tokens, 512 images at once would be 135,000."""
    heatmap = Heatmap(load_model("tiny-random").network)
    sizes = [answering.answering_batch_size(256, heatmap, tokens, 264) for tokens in (None, 20_000, 100)]
    assert sizes == [512, 150, 2]
    run = Run(TrainConfig(root, tmp_path / "run", "tiny", batch_size=8, batch_tokens=300, limit=8))
    seen: list = []
    monkeypatch.setattr(loop, "evaluate_samples", lambda model, samples, size, *_: seen.append(size) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.validate()
    longest = max(run.collate.lengths(sample)[2] for sample in run.samples["val"])
    assert seen == [2 * (300 // longest)]
    assert len(memory.longest_answers(run, 8)[0]) == min(8, 2 * seen[0])
