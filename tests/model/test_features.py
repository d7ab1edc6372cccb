"""Kept image features give the same losses, and are never those of another encoder or image."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.model import features, forward
from fsc147lib.model.collate import Collate
from fsc147lib.model.device import choose_compute
from fsc147lib.model.features import KeptFeatures
from fsc147lib.model.load import load_model
from fsc147lib.model.network import Recipe, freeze_vision
from fsc147lib.options import ConfigError
from fsc147lib.training import loop as training
from fsc147lib.training.loop import TrainConfig
from fsc147lib.training.losses import DualLoss


@pytest.fixture
def frozen(tiny):
    freeze_vision(tiny.network, True)
    return tiny


def make(model, samples, folder, place="disk"):
    return KeptFeatures.encode(model, samples, choose_compute("fp32"), place, folder, 0)


def kept_files(folder):
    """Those that are complete."""
    return [path for path in folder.rglob("*.npy") if path.parent.suffix != ".writing"]


def losses(model, batch):
    with torch.no_grad():
        parts = DualLoss(model.network)(batch, 0.1)
    return parts.count.item(), parts.attention.item()


@pytest.mark.medium
@pytest.mark.parametrize("place", ["host", "disk"])
def test_losses_are_those_without_it(frozen, mixed_samples, tmp_path, place):
    samples = [*mixed_samples, *(sample.flipped() for sample in mixed_samples)]
    cache = make(frozen, samples, tmp_path, place)
    chosen = [samples[i] for i in (5, 0, 3)]
    live = Collate(frozen.tokenizer, frozen.image_processor)(chosen)
    kept = cache.add_to(Collate(frozen.tokenizer, frozen.image_processor, pixels=False)(chosen))
    assert "pixel_values" not in kept
    assert losses(frozen, kept) == pytest.approx(losses(frozen, live), rel=1e-5)


@pytest.fixture
def no_encoder(monkeypatch):
    """Call it, and encoding fails from then on."""

    def forbid():
        def fail(*_, **__):
            raise RuntimeError("the encoder ran")

        monkeypatch.setattr(forward, "encode_images", fail)

    return forbid


def test_a_file_is_used_again(frozen, mixed_samples, tmp_path, no_encoder):
    first = make(frozen, mixed_samples, tmp_path)
    (path,) = kept_files(tmp_path)
    assert torch.equal(torch.from_numpy(np.load(path)).view(torch.float32), first.features)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert "torch" in manifest["code"]
    no_encoder()
    assert torch.equal(make(frozen, mixed_samples, tmp_path).features, first.features)


def another_encoder(model, samples, folder):
    with torch.no_grad():
        model.network.model.visual.blocks[0].mlp.linear_fc1.weight[0, 0] += 0.5
    return samples


def another_image(model, samples, folder):
    path = folder.parent / "changed.png"
    samples[1].image.rotate(180).save(path)
    return [samples[0], replace(samples[1], image_path=path), *samples[2:]]


def another_size(model, samples, folder):
    model.image_processor.size = {"shortest_edge": 1024, "longest_edge": 128 * 192}
    return samples


def other_heads(model, samples, folder):
    """Over the same weights."""
    saved = folder.parent / "model"
    model.save(saved)
    config = json.loads((saved / "config.json").read_text())
    config["vision_config"]["num_heads"] = 2
    (saved / "config.json").write_text(json.dumps(config))
    model.network = load_model(saved).network
    return samples


def other_code(model, samples, folder, monkeypatch):
    monkeypatch.setattr(features, "code_version", lambda: "of tomorrow")
    return samples


def a_torn_file(model, samples, folder):
    (path,) = kept_files(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return samples


def a_flipped_byte(model, samples, folder):
    (path,) = kept_files(folder)
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(content)
    return samples


CHANGES = [another_encoder, another_image, another_size, other_heads, other_code, a_torn_file, a_flipped_byte]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_or_torn_file_is_never_used(frozen, mixed_samples, tmp_path, change, monkeypatch):
    folder = tmp_path / "cache"
    make(frozen, mixed_samples, folder)
    patch = (monkeypatch,) if change is other_code else ()
    samples = change(frozen, mixed_samples, folder, *patch)
    calls, real = [], forward.encode_images
    monkeypatch.setattr(forward, "encode_images", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    cache = make(frozen, samples, folder)
    assert calls
    live = Collate(frozen.tokenizer, frozen.image_processor)(samples)
    kept = cache.add_to(Collate(frozen.tokenizer, frozen.image_processor, pixels=False)(samples))
    assert losses(frozen, kept) == pytest.approx(losses(frozen, live), rel=1e-5)


@pytest.mark.medium
def test_half_a_file_is_no_file(frozen, mixed_samples, tmp_path, no_encoder, monkeypatch):
    no_encoder()
    with pytest.raises(RuntimeError, match="the encoder ran"):
        make(frozen, mixed_samples, tmp_path)
    assert not kept_files(tmp_path)
    monkeypatch.undo()
    make(frozen, mixed_samples, tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == 1


def test_a_full_disk_is_a_sentence_before_the_first_image(frozen, mixed_samples, tmp_path, no_encoder, monkeypatch):
    """And not a SIGBUS on the way: the room is taken before the file is mapped."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    no_encoder()
    with pytest.raises(ConfigError, match="image features need .* MiB .*--vision-cache host or off"):
        make(frozen, mixed_samples, tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_of_two_runs_at_once_one_encodes(frozen, mixed_samples, tmp_path, monkeypatch):
    calls, real = [], forward.encode_images
    monkeypatch.setattr(forward, "encode_images", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda _: make(frozen, mixed_samples, tmp_path), range(2))
    assert len(calls) == 1
    assert torch.equal(first.features, second.features) and first.features.any()


def test_batches_have_their_features_ahead(frozen, mixed_samples, tmp_path):
    cache = make(frozen, mixed_samples, tmp_path)
    collate = Collate(frozen.tokenizer, frozen.image_processor, pixels=False)
    batches = [collate(mixed_samples[:1]), collate(mixed_samples[1:])]
    found = list(cache.ahead(batches))
    assert [batch["names"] for batch in found] == [batch["names"] for batch in batches]
    for batch, alone in zip(found, map(cache.add_to, batches), strict=True):
        assert torch.equal(batch["image_features"], alone["image_features"])


@pytest.fixture
def config(tiny, root, tmp_path):
    tiny.recipe = Recipe()  # a frozen encoder, as a large trained model has
    tiny.save(tmp_path / "model")

    def make(out, **changes):
        return TrainConfig(data=root, out=tmp_path / out, model=str(tmp_path / "model"), epochs=2, batch_size=8,
                           log_every=1, tracking="disabled", **changes)  # fmt: skip

    return make


@pytest.mark.slow
def test_a_run_is_the_same_with_it(config):
    runs = [training.train(config(place, vision_cache=place)) for place in ("off", "auto", "disk")]
    for run in runs[1:]:
        for one, other in zip(runs[0].steps, run.steps, strict=True):
            for key in ("count_loss", "attention_loss", "gradient_norm"):
                assert one[key] == pytest.approx(other[key], rel=2e-3)
        assert run.epochs[-1]["val"]["kl"] == pytest.approx(runs[0].epochs[-1]["val"]["kl"], rel=1e-3)


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


@pytest.mark.slow
def test_adapters_alone_train_and_are_merged(config, tmp_path):
    """The saved weights differ from the start by matrices of the adapters' rank; resuming is refused."""
    settings = config("lora", lora=4, learning_rate=1e-2)
    run = training.Run(settings)
    trained = {name for name, p in run.model.network.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name and "language_model.layers" in name for name in trained)
    training.train(settings)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "lora/last"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        change = after[name] - weight
        if name.endswith("_proj.weight"):
            assert 0 < torch.linalg.matrix_rank(change, atol=1e-5) <= 4, name
        else:
            assert not change.any(), name
    with pytest.raises(ConfigError, match="lora.*off when resume is on"):
        config("lora", lora=4, resume=True)
    with pytest.raises(ConfigError, match="lora.*at least 1"):
        config("lora", lora=0)


@pytest.mark.medium
def test_merged_weights_answer_as_the_adapters_did(config, tiny, batch, tmp_path):
    run = training.Run(config("lora", lora=4))
    for name, parameter in run.model.network.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    run.model.save(tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    networks = run.model.network.eval(), again.network, tiny.network
    with torch.no_grad():
        adapted, merged, before = (DualLoss(network)(batch, 0.1).count for network in networks)
    assert merged.item() == pytest.approx(adapted.item(), rel=1e-4)
    assert before.item() != pytest.approx(adapted.item(), rel=1e-2)
