"""Targets of the heatmap: the objects, or a control that has nothing to do with the image's own objects."""

import random
from collections.abc import Iterable, Iterator
from typing import cast

import torch

from ..data import Sample
from ..data.targets import centre_blob
from ..model import Batch
from ..options import ConfigError


def need_other_images(kind: str, samples: list[Sample]) -> None:
    """Raise ConfigError for the target "shuffled" if fewer than two images have objects."""
    if kind == "shuffled" and sum(sample.count > 0 for sample in samples) < 2:
        few = "fewer than two training images have objects: give objects or centre"
        raise ConfigError(f"attention_target (--attention-target) is shuffled, but {few}")


def other_targets(samples: list[Sample], seed: str) -> dict[str, torch.Tensor]:
    """For each sample with objects, by name, the target [14, 14] of another one; each target is used once."""
    order = [sample for sample in samples if sample.count]
    random.Random(seed).shuffle(order)  # each gets that of its predecessor, the first that of the last
    return {sample.name: torch.from_numpy(order[i - 1].target) for i, sample in enumerate(order)}


def centre(batch: Batch, others: dict[str, torch.Tensor]) -> torch.Tensor:
    """A blob in the middle of each image with objects [B, 14, 14]."""
    return centre_blob(batch["target"]) * (batch["target"] > 0).any(dim=(1, 2), keepdim=True)


def shuffled(batch: Batch, others: dict[str, torch.Tensor]) -> torch.Tensor:
    """The targets in `others`, mirrored for a mirrored image [B, 14, 14]."""
    target = batch["target"].cpu().clone()
    for row, name, (_, mirrored) in zip(target, batch["names"], batch["image_keys"], strict=True):
        if name in others:
            row.copy_(others[name].flip(1) if mirrored else others[name])
    return target.to(batch["target"])


ATTENTION_TARGETS = {"objects": lambda batch, _: batch["target"], "shuffled": shuffled, "centre": centre}
"""Targets of the heatmap: functions of a batch and of `other_targets` to targets [B, 14, 14]."""


def controlled(batches: Iterable[Batch], kind: str, samples: list[Sample], seed: str) -> Iterator[Batch]:
    """An epoch's batches with the targets that `ATTENTION_TARGETS[kind]` makes; images without objects keep zeros."""
    others = other_targets(samples, seed)
    for batch in batches:
        yield cast(Batch, {**batch, "target": ATTENTION_TARGETS[kind](batch, others)})
