"""fp16 with a loss scale.  A CPU computes it as well, slowly, so `choose_compute` alone has to be passed by."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.model import Collate, to_device
from fsc147lib.model.device import Compute, choose_compute
from fsc147lib.model.load import load_model
from fsc147lib.model.network import freeze_vision, save_memory
from fsc147lib.options import ConfigError
from fsc147lib.training import DualLoss, TrainConfig, setup, step, train
from fsc147lib.training.losses import LossParts
from fsc147lib.training.step import NonFiniteLoss, TrainingStep, make_accelerator, make_optimizer


def in_fp16(precision="fp16"):
    """What `choose_compute` gives on an old GPU, here on the device that there is."""
    return Compute(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "fp16")


class Toy(nn.Module):
    """A loss of two weights, whose gradient is 3 each."""

    def __init__(self, factor=3.0):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(2)), factor

    def forward(self, batch, tokens, images, weight):
        total = (self.weight * self.factor).sum()
        return LossParts(total, total.detach(), total.detach() * 0)


TOY_BATCH = {"names": ["1.jpg"], "count": [3], "answer_tokens": 2}


def toy_step(scale, **kwargs):
    loss, compute = Toy(**kwargs), in_fp16()
    made = TrainingStep(loss, torch.optim.AdamW(loss.parameters(), lr=0.1), make_accelerator(compute), compute)
    made.scaler = torch.amp.GradScaler(compute.device.type, init_scale=scale)
    return loss, made


def test_an_overflow_skips_the_step_and_training_goes_on():
    loss, training_step = toy_step(2.0**127)  # 3 * 2**127 is more than float32 holds
    _, norm = training_step([TOY_BATCH], 1.0)
    training_step.check()
    assert training_step.skipped == 1 and not norm.isfinite()
    assert torch.equal(loss.weight.cpu(), torch.ones(2)) and training_step.scaler.get_scale() == 2.0**126
    _, norm = training_step([TOY_BATCH], 1.0)
    training_step.check()
    assert training_step.skipped == 1 and float(norm) == pytest.approx(
        3 * math.sqrt(2)
    )  # of the loss, not of the scaled
    assert loss.weight.max().item() < 0.95


def test_an_overflow_at_every_scale_ends_the_run():
    _, training_step = toy_step(2.0**16, factor=1e38)
    loss = training_step.loss
    loss.weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(step.MOST_SKIPPED - 1):
        training_step([TOY_BATCH], 1.0)
        training_step.check()
    training_step([TOY_BATCH], 1.0)
    with pytest.raises(NonFiniteLoss, match="overflows fp16 at every loss scale.*--precision fp32"):
        training_step.check()


@pytest.mark.slow
def test_skipped_steps_are_counted_and_logged(root, tmp_path, monkeypatch):
    """With adapters over fp16 weights, and checkpointing: as on a card of 16 GB."""
    monkeypatch.setattr(setup, "choose_compute", in_fp16)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    config = TrainConfig(root, tmp_path / "run", "tiny", epochs=12, limit=4, batch_size=2, lora=4, log_every=1,
                         gradient_checkpointing=True, compile=False, tracking="disabled")  # fmt: skip
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "val" not in line]
    assert steps[0]["skipped_steps"] == 1 and steps[0]["gradient_norm"] is None
    assert 1 < steps[-1]["skipped_steps"] < 24 and steps[-1]["gradient_norm"] > 0
    state = json.loads((tmp_path / "run" / "last" / "training_state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** (40 - steps[-1]["skipped_steps"])  # a resumed run goes on with it
    weights = load_model(tmp_path / "run" / "last").network.state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights[name], load_model("tiny").network.state_dict()[name])


@pytest.mark.slow
def test_two_hundred_small_steps_move_the_weights_as_fp32_does(root):
    """At learning rate 1e-6, a 20,000th of a weight: within 5 % of the distance, skipped steps and all."""
    samples, moved = list(FSC147(root, "train"))[:2], {}
    for precision in ("fp32", "fp16"):
        compute = choose_compute("fp32") if precision == "fp32" else in_fp16()
        model = load_model("tiny-random")
        network = model.network
        model.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 96}
        freeze_vision(network, True)
        training_step = TrainingStep(
            DualLoss(network), make_optimizer(network, 1e-6), make_accelerator(compute), compute
        )
        batch = to_device(Collate(model.tokenizer, model.image_processor)(samples), compute.device)
        before = {name: weight.detach().clone() for name, weight in network.named_parameters() if weight.requires_grad}
        for _ in range(200):
            training_step([batch], 0.1)
        training_step.check()
        after = dict(network.named_parameters())
        moved[precision] = torch.cat([(after[name].detach() - weight).flatten() for name, weight in before.items()])
    wide, narrow = moved["fp32"], moved["fp16"]
    assert (narrow - wide).norm() < 0.05 * wide.norm()
    assert float(wide.abs().mean()) > 5e-5


@pytest.mark.medium
def test_frozen_matrices_are_narrow_and_the_stream_through_the_layers_is_not(tiny, batch):
    save_memory(tiny.network, 4, False, "fp16")
    kinds = {name: weight.dtype for name, weight in tiny.network.named_parameters()}
    assert kinds["model.language_model.layers.0.mlp.up_proj.base_layer.weight"] == torch.float16
    assert kinds["model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"] == torch.float32
    assert kinds["model.language_model.embed_tokens.weight"] == torch.float32
    incoming = []
    tiny.network.model.language_model.layers[2].input_layernorm.register_forward_pre_hook(
        lambda module, inputs: incoming.append(inputs[0].dtype)
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        DualLoss(tiny.network)(batch, 0.1)
    assert incoming == [torch.float32]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"precision \(--precision\) is fp16, but must be fp32 or bf16"):
        choose_compute("fp16")


def test_a_gradient_heatmap_in_fp16_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "choose_compute", in_fp16)
    with pytest.raises(ConfigError, match="token_gradient .* too small for fp16"):
        train(TrainConfig(root, tmp_path / "run", "tiny-random", heatmap="token_gradient"))


def test_a_gpu_without_bfloat16_trains_in_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_compute("auto") == Compute(torch.device("cuda", 0), "fp16")


def test_apple_s_mps_is_left_alone_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="MPS is not tested with this library, so the CPU is used"):
        assert choose_compute("fp32").device.type == "cpu"


def test_each_process_of_a_host_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_compute("bf16").device == torch.device("cuda", 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert choose_compute("bf16").device == torch.device("cuda", 0)
