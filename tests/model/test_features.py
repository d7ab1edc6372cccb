"""Kept image features give the same losses."""

import json

import pytest
import torch

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.model.collate import Collate
from fsc147lib.model.device import choose_compute
from fsc147lib.model.features import KeptFeatures
from fsc147lib.model.load import load_model
from fsc147lib.model.network import Recipe
from fsc147lib.options import ConfigError
from fsc147lib.training import loop as training
from fsc147lib.training import memory
from fsc147lib.training.loop import TrainConfig
from fsc147lib.training.losses import DualLoss


@torch.no_grad()
def losses(model, batch):
    parts = DualLoss(model.network)(batch, 0.1)
    return parts.count.item(), parts.attention.item()


@pytest.mark.medium
def test_losses_are_those_without_it(tiny, mixed_samples):
    """Of images and mirror images, and as many batches ahead."""
    samples = [*mixed_samples, *(sample.flipped() for sample in mixed_samples)]
    kept = KeptFeatures.encode(tiny, samples, choose_compute("fp32"), "host", 0)
    with_pixels, without = (Collate(tiny.tokenizer, tiny.image_processor, pixels=pixels) for pixels in (True, False))
    chosen = [[samples[i] for i in places] for places in ((5, 0, 3), (2, 7))]
    found = list(kept.ahead(map(without, chosen)))
    assert len(found) == 2
    for batch, images in zip(found, chosen, strict=True):
        assert "pixel_values" not in batch and batch["names"] == [image.name for image in images]
        assert losses(tiny, batch) == pytest.approx(losses(tiny, with_pixels(images)), rel=1e-5)


@pytest.fixture
def config(tiny, root, tmp_path):
    tiny.recipe = Recipe()  # a frozen encoder, as a large trained model has
    tiny.save(tmp_path / "model")

    def make(out, **changes):
        return TrainConfig(data=root, out=tmp_path / out, model=str(tmp_path / "model"), epochs=2, batch_size=8,
                           log_every=1, tracking="disabled", **changes)  # fmt: skip

    return make


@pytest.mark.slow
def test_a_run_is_the_same_with_it(config, monkeypatch):
    """Also where "auto" finds no room, and each batch brings its pixels."""
    places, encode = [], KeptFeatures.encode
    monkeypatch.setattr(KeptFeatures, "encode", lambda *args: places.append(args[3]) or encode(*args))
    without, kept = (training.train(config(place, vision_cache=place)) for place in ("off", "auto"))
    monkeypatch.setattr(memory, "free_memory", lambda: 0)
    no_room = training.train(config("no-room"))
    assert places == ["host"]
    for run in (kept, no_room):
        for one, other in zip(without.steps, run.steps, strict=True):
            for key in ("count_loss", "attention_loss", "gradient_norm"):
                assert one[key] == pytest.approx(other[key], rel=2e-3)
        assert run.epochs[-1]["val"]["kl"] == pytest.approx(without.epochs[-1]["val"]["kl"], rel=1e-3)


@pytest.mark.slow
def test_it_is_dropped_when_the_encoder_unfreezes(config, tmp_path, monkeypatch):
    """Epoch 1 from kept features, epoch 2 from pixels: there the encoder moves, and validation sees it."""
    seen, real = [], training.Run.validate

    def validate(self):
        weight = self.model.network.model.visual.blocks[0].attn.proj.weight
        seen.append((self.training_step.features is not None, weight.detach().clone()))
        return real(self)

    monkeypatch.setattr(training.Run, "validate", validate)
    training.train(config("run", vision_cache="host", unfreeze_vision_at=1, learning_rate=1e-3))
    assert [kept for kept, _ in seen] == [True, True, False]
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][1], seen[2][1])
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]["val"]
    model = load_model(tmp_path / "run" / "last")
    batch = Collate(model.tokenizer, model.image_processor)(list(FSC147(config("x").data, "val")))
    assert losses(model, batch)[1] == pytest.approx(last["kl"], rel=1e-4)


def test_what_cannot_be_kept_is_refused(config):
    with pytest.raises(ConfigError, match="vision_cache.*input_gradient needs pixels"):
        config("x", vision_cache="host", heatmap="input_gradient")
    with pytest.raises(ConfigError, match="vision_cache.*trains from the start"):
        config("x", vision_cache="host", unfreeze_vision_at=0)
