"""Controls: heatmaps drawn to what is not in their image, which shows what drawing them anywhere is worth."""

import random
from collections.abc import Iterable, Iterator
from typing import cast

import torch

from ..data import Sample
from ..data.targets import centre_blob
from ..model import Batch
from ..options import ConfigError


def need_other_images(kind: str, samples: list[Sample]) -> None:
    """Raise ConfigError where "shuffled" is wanted, and there is no other image with objects."""
    if kind == "shuffled" and sum(sample.count > 0 for sample in samples) < 2:
        few = "fewer than two training images have objects: give objects or centre"
        raise ConfigError(f"attention_target (--attention-target) is shuffled, but {few}")


def other_targets(samples: list[Sample], seed: str) -> dict[str, torch.Tensor]:
    """Another's target [14, 14] for each sample with objects, two or more, by its name; each is given once."""
    order = [sample for sample in samples if sample.count]
    random.Random(seed).shuffle(order)  # each one's is that of the one before, in one circle
    return {sample.name: torch.from_numpy(order[i - 1].target) for i, sample in enumerate(order)}


def own_targets(batch: Batch, others: dict[str, torch.Tensor]) -> torch.Tensor:
    """The targets that the batch has [B, 14, 14]."""
    return batch["target"]


def centre(batch: Batch, others: dict[str, torch.Tensor]) -> torch.Tensor:
    """A blob in the middle of each image with objects."""
    return centre_blob(batch["target"]) * (batch["target"] > 0).any(dim=(1, 2), keepdim=True)


def shuffled(batch: Batch, others: dict[str, torch.Tensor]) -> torch.Tensor:
    """Another image's, mirrored where the image is."""
    target = batch["target"].cpu().clone()
    for row, name, (_, mirrored) in zip(target, batch["names"], batch["image_keys"], strict=True):
        if name in others:
            row.copy_(others[name].flip(1) if mirrored else others[name])
    return target.to(batch["target"])


ATTENTION_TARGETS = {"objects": own_targets, "shuffled": shuffled, "centre": centre}
"""What the heatmap is drawn to: a function of a batch, and of `other_targets` by name, to targets [B, 14, 14]."""


def controlled(batches: Iterable[Batch], kind: str, samples: list[Sample], seed: str) -> Iterator[Batch]:
    """An epoch's batches of some samples with the targets of that kind; those without objects stay zeros."""
    others = other_targets(samples, seed)
    for batch in batches:
        yield cast(Batch, {**batch, "target": ATTENTION_TARGETS[kind](batch, others)})
