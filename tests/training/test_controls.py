"""Controls: what a heatmap is drawn to is another image's target, whatever shares its pass, or a blob."""

import numpy as np
import pytest
import torch

from fsc147lib.data.targets import centre_blob
from fsc147lib.options import ConfigError
from fsc147lib.training.loop import Run, TrainConfig


@pytest.fixture
def config(half_empty_root, tmp_path):
    def make(**changes):
        settings = {"model": "tiny-random", "tracking": "disabled", "seed": 3, "epochs": 2, "vision_cache": "off"}
        return TrainConfig(half_empty_root, tmp_path / "run", **{**settings, **changes})

    return make


def targets_of(run, epoch):
    """(name, mirrored, target [14, 14]) of each image of an epoch."""
    for window in run.windows(epoch):
        for batch in window:
            yield from zip(
                batch["names"], [mirrored for _, mirrored in batch["image_keys"]], batch["target"], strict=True
            )


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["shuffled", "centre"])
@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"batch_size": 7, "batch_tokens": 1}, {"batch_size": 4}])
def test_a_control_is_never_the_own_target_and_never_empty(config, sizes, kind):
    run = Run(config(attention_target=kind, limit=8, **sizes))
    samples = {sample.name: sample for sample in run.samples["train"]}
    others, seen = {sample.name: sample.target for sample in samples.values() if sample.count}, []
    for name, mirrored, target in targets_of(run, 0):
        if not samples[name].count:
            assert not target.any(), "there is nothing to look at"
        elif kind == "centre":
            torch.testing.assert_close(target, centre_blob(torch.zeros(1, 14, 14))[0])
        else:
            shown = target.flip(1).numpy() if mirrored else target.numpy()
            (other,) = [one for one, map_ in others.items() if np.array_equal(map_, shown)]
            assert other != name
            seen.append(other)
    assert kind == "centre" or len(seen) == len(set(seen)) == len(others) > 2


@pytest.mark.medium
def test_the_other_image_follows_from_seed_and_epoch_alone(config):
    """A run that goes on has the same, and from epoch to epoch it is another."""

    def targets(epoch, **changes):
        run = Run(config(attention_target="shuffled", flip=False, **changes))
        return {name: target for name, _, target in targets_of(run, epoch)}

    first, second = targets(0, batch_size=4), targets(1, batch_size=4)
    again, reseeded = targets(1, batch_size=1), targets(0, batch_size=4, seed=4)
    assert len(first) == 24 and all(torch.equal(second[name], again[name]) for name in second)
    for other in (second, reseeded):
        assert sum(not torch.equal(first[name], other[name]) for name in first) >= 6


def test_one_image_with_objects_has_no_other(config):
    assert sum(sample.count > 0 for sample in config(limit=3).open_split("train")) == 1
    with pytest.raises(ConfigError, match="attention-target.*fewer than two training images have objects"):
        Run(config(limit=3, attention_target="shuffled"))
