"""Controls: heatmaps drawn to what is not in their image, which shows what drawing them anywhere is worth."""

import random
from typing import cast

import torch

from ..data import Sample
from ..data.targets import GRID, centre_blob
from ..model import Batch


def control_targets(kind: str, samples: list[Sample], seed: int) -> dict[str, torch.Tensor]:
    """Targets [14, 14] of a control by the names of the samples that have objects, two or more.

    "shuffled": another such sample's, each given once, which the seed chooses; "centre": a blob in the middle.
    """
    order = [sample for sample in samples if sample.count]
    if kind == "centre":
        return dict.fromkeys((sample.name for sample in order), centre_blob(torch.zeros(1, GRID, GRID))[0])
    random.Random(seed).shuffle(order)  # each one's is that of the one before, in one circle
    return {sample.name: torch.from_numpy(order[i - 1].target) for i, sample in enumerate(order)}


def with_control(batch: Batch, targets: dict[str, torch.Tensor]) -> Batch:
    """The batch with these targets, mirrored where its images are; that of an image without objects stays zeros."""
    target = torch.zeros(len(batch["names"]), GRID, GRID)
    for row, name, (_, mirrored) in zip(target, batch["names"], batch["image_keys"], strict=True):
        if name in targets:
            row.copy_(targets[name].flip(1) if mirrored else targets[name])
    return cast(Batch, {**batch, "target": target.to(batch["target"])})
