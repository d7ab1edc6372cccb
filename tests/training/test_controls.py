"""Controls: what a heatmap is drawn to is another image's target, whatever shares its pass, or a blob."""

import numpy as np
import pytest
import torch
from tqdm import tqdm

from fsc147lib.data.targets import centre_blob, kl_divergence
from fsc147lib.options import ConfigError
from fsc147lib.training import losses
from fsc147lib.training.loop import Run, TrainConfig, open_run, train_epoch


@pytest.fixture
def config(half_empty_root, tmp_path):
    def make(**changes):
        settings = {"model": "tiny-random", "tracking": "disabled", "seed": 3, "epochs": 2, "vision_cache": "off"}
        return TrainConfig(half_empty_root, tmp_path / "run", **{**settings, **changes})

    return make


def drawn_to(config, monkeypatch):
    """What an epoch's heatmaps are held against: (name, mirrored, target [14, 14]) of each image looked at."""
    batches, targets, run = [], [], Run(config)

    def watched(target, heatmap):
        targets.append(target.detach().clone())
        return kl_divergence(target, heatmap)

    monkeypatch.setitem(losses.ATTENTION_LOSSES, "kl", watched)
    loss = run.training_step.loss
    loss.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    open_run(run)
    with tqdm(total=run.total_steps, disable=True) as progress:
        train_epoch(run, progress)
    run.folder.close()
    keys = []
    for batch in batches:
        rows = [row for row, count in enumerate(batch["count"]) if count]
        if rows:
            alone = config.heatmap_images is not None and config.heatmap_images < len(batch["names"])
            looked_at = loss.chosen(batch["names"], rows) if alone else range(len(batch["names"]))
            keys += [(batch["names"][row], batch["image_keys"][row][1]) for row in looked_at]
    return [(*key, target) for key, target in zip(keys, torch.cat(targets), strict=True)]


WINDOWS = {
    "batches of one": {"batch_size": 1, "limit": 7},
    "one of a batch": {"batch_size": 4, "heatmap_images": 1, "limit": 16},
    "parts of one": {"batch_size": 7, "batch_tokens": 1, "limit": 7},
    "neighbours without objects": {"batch_size": 2, "limit": 8},
}


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["shuffled", "centre"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_control_is_never_the_own_target_and_never_empty(config, monkeypatch, window, kind):
    settings = config(attention_target=kind, **WINDOWS[window])
    samples = {sample.name: sample for sample in settings.open_split("train")}
    others, seen = {sample.name: sample.target for sample in samples.values() if sample.count}, []
    for name, mirrored, target in drawn_to(settings, monkeypatch):
        if not samples[name].count:
            assert not target.any(), "there is nothing to look at"
        elif kind == "centre":
            torch.testing.assert_close(target, centre_blob(torch.zeros(1, 14, 14))[0])
        else:
            shown = target.flip(1).numpy() if mirrored else target.numpy()
            (other,) = [one for one, map_ in others.items() if np.array_equal(map_, shown)]
            assert other != name
            seen.append(other)
    assert kind == "centre" or len(seen) == len(set(seen)) > 2


@pytest.mark.medium
def test_the_other_image_follows_from_seed_and_epoch_alone(config):
    """A run that goes on has the same, and from epoch to epoch it is another."""

    def targets(epoch, **changes):
        run, found = Run(config(attention_target="shuffled", flip=False, **changes)), {}
        for (batch,) in run.windows(epoch):
            found |= zip(batch["names"], batch["target"], strict=True)
        return found

    first, second = targets(0, batch_size=4), targets(1, batch_size=4)
    again, reseeded = targets(1, batch_size=1), targets(0, batch_size=4, seed=4)
    assert len(first) == 24 and all(torch.equal(second[name], again[name]) for name in second)
    for other in (second, reseeded):
        assert sum(not torch.equal(first[name], other[name]) for name in first) >= 6


def test_one_image_with_objects_has_no_other(config):
    assert sum(sample.count > 0 for sample in config(limit=3).open_split("train")) == 1
    with pytest.raises(ConfigError, match="attention-target.*fewer than two training images have objects"):
        Run(config(limit=3, attention_target="shuffled"))
