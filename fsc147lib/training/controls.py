"""Controls: heatmaps drawn to what is not in their image, which shows what drawing them anywhere is worth."""

import random
from collections.abc import Iterable, Iterator
from typing import Literal, cast

import torch

from ..data import Sample
from ..data.targets import centre_blob
from ..model import Batch
from ..options import ConfigError

AttentionTarget = Literal["objects", "shuffled", "centre"]


def need_other_images(kind: AttentionTarget, samples: list[Sample]) -> None:
    """Raise ConfigError where "shuffled" is wanted, and there is no other image with objects."""
    if kind == "shuffled" and sum(sample.count > 0 for sample in samples) < 2:
        few = "fewer than two training images have objects: give objects or centre"
        raise ConfigError(f"attention_target (--attention-target) is shuffled, but {few}")


def other_targets(samples: list[Sample], seed: str) -> dict[str, torch.Tensor]:
    """Another's target [14, 14] for each sample with objects, two or more, by its name; each is given once."""
    order = [sample for sample in samples if sample.count]
    random.Random(seed).shuffle(order)  # each one's is that of the one before, in one circle
    return {sample.name: torch.from_numpy(order[i - 1].target) for i, sample in enumerate(order)}


def controlled(batches: Iterable[Batch], kind: AttentionTarget, samples: list[Sample], seed: str) -> Iterator[Batch]:
    """An epoch's batches of some samples with a control's targets; "objects" is none.

    "shuffled": each image's is that of another sample with objects, which the seed chooses, mirrored where the image
    is; "centre": a blob in the middle.  That of an image without objects stays zeros.
    """
    others = other_targets(samples, seed) if kind == "shuffled" else {}
    for batch in batches:
        if kind == "objects":
            yield batch
            continue
        target = batch["target"]
        if kind == "centre":
            target = centre_blob(target) * (target > 0).any(dim=(1, 2), keepdim=True)
        else:
            target = target.cpu().clone()
            for row, name, (_, mirrored) in zip(target, batch["names"], batch["image_keys"], strict=True):
                if name in others:
                    row.copy_(others[name].flip(1) if mirrored else others[name])
        yield cast(Batch, {**batch, "target": target.to(batch["target"])})
