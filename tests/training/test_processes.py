"""Two processes, started by `torchrun` on a CPU, train as one process does with twice the accumulation."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fsc147lib.model.load import load_model
from fsc147lib.training.loop import TrainConfig, train


def torchrun(*words):
    """What two processes print together; none of accelerate's environment variables is set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"unfreeze_vision_at": 1},
        {"unfreeze_vision_at": 1, "epochs": 2, "learning_rate": 1e-3},
        {"unfreeze_vision_at": 1, "epochs": 2, "learning_rate": 1e-3, "lora": 4},
    ],
    ids=["frozen", "frozen-then-unfrozen", "lora-then-encoder"],
)
def test_two_processes_train_as_one(half_empty_root, tmp_path, options):
    """Every second picture is empty, so that some steps have objects in one process's share alone."""
    options |= {"data": half_empty_root, "model": "tiny", "batch_size": 2, "log_every": 1, "tracking": "disabled"}
    one = TrainConfig(out=tmp_path / "one", accumulation=2, **options)
    alone, two = train(one), tmp_path / "two"
    words = (f"--{name.replace('_', '-')}={value}" for name, value in options.items())
    torchrun("-m", "fsc147lib", "train", *words, "--out", two)

    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "val" not in line]
    assert len(steps) == 6 * one.epochs
    for line, expected in zip(steps, alone.steps, strict=True):
        assert [name for name in line if line[name] is None] == [name for name in expected if expected[name] is None]
        for name in ("count_loss", "attention_loss", "total", "gradient_norm", "learning_rate"):
            assert line[name] is None or line[name] == pytest.approx(expected[name], rel=1e-4), name
    for line, expected in zip([line for line in lines if "val" in line], alone.epochs, strict=True):
        assert line["val"] == pytest.approx(expected["val"], rel=1e-3)

    found, expected = (load_model(out / "last").network.state_dict() for out in (two, one.out))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    before = load_model("tiny").network.state_dict()
    moved = [name for name, value in expected.items() if (value - before[name]).abs().max() > 1e-5]
    assert any("visual" in name for name in moved) == (one.epochs == 2)
    assert any("language_model" in name for name in moved)


TOY_STEPS = """
import gc, math
import torch
from torch import nn
from fsc147lib.model.device import choose_compute
from fsc147lib.training.losses import LossParts
from fsc147lib.training.step import NonFiniteLoss, TrainingStep, make_accelerator, make_optimizer

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, batch, weight, tokens, images):
        hidden = self.first(batch["x"])
        assert hidden.dtype == torch.bfloat16
        count = self.second(hidden).sum() / tokens
        return LossParts(count, count.detach(), torch.zeros(()))

gc.disable()
compute, loss = choose_compute("bf16"), Toy()
accelerator = make_accelerator(compute)
rank = accelerator.process_index
step = TrainingStep(loss, make_optimizer(loss, 0.1), accelerator, compute)
batch = {"names": [f"{rank}.jpg"], "count": [rank], "answer_tokens": 2, "x": torch.ones(3, 2)}
for trains in (False, True, True):
    loss.first.requires_grad_(trains)
    losses, _ = step([batch], 1.0)
    assert losses.attention is not None  # for process 1 has objects
wrapped = [x for x in gc.get_objects() if isinstance(x, nn.parallel.DistributedDataParallel)]
assert wrapped == [step.loss]  # each holds a copy of the gradients
batch["x"][0] = math.nan if rank else 1
step([batch], 1.0)
try:
    step.check()
except NonFiniteLoss as error:
    print(error)
"""


@pytest.mark.slow
def test_a_loss_that_is_nan_in_one_process_ends_both_with_the_same_sentence(tmp_path):
    """Toys, a layer of which begins to train on the way."""
    (tmp_path / "toy.py").write_text(TOY_STEPS)
    sentence = "the count loss is nan on 0.jpg, 1.jpg: lower the learning rate"
    assert torchrun(tmp_path / "toy.py").count(sentence) == 2
