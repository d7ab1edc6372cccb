"""The count loss, the attention loss, and their weighted sum."""

import random
from typing import NamedTuple

import torch
from torch import nn

from ..data.targets import kl_divergence
from ..model import Batch, Heatmap, answer_logits, count_loss, make_heatmap, select_rows


def squared_error(target: torch.Tensor, heatmap: torch.Tensor) -> torch.Tensor:
    """Squared difference summed over the cells of each image, in 0..2: both maps [B, 14, 14] -> [B]."""
    return (target.float() - heatmap.float()).square().sum(dim=(1, 2))


ATTENTION_LOSSES = {"kl": kl_divergence, "mse": squared_error}
"""Attention losses: functions of target and heatmap, both [B, 14, 14], to [B]."""


class LossParts(NamedTuple):
    """Scalars of one step; `total` = `count` + weight * `attention`."""

    total: torch.Tensor
    count: torch.Tensor  # mean over answer tokens
    attention: torch.Tensor | None  # mean over images with objects; without a heatmap 0, which a step tells as None


class DualLoss(nn.Module):
    """Count loss plus weighted attention loss of a batch.

    Images without objects have no target, so they are not in the attention loss.

    Args:
        heatmap: the method whose heatmap is compared with the target; None for the attention.
        attention_loss: a name in ATTENTION_LOSSES.
        heatmap_images: number of images of a batch in the attention loss, a random choice of those with objects,
            in a forward pass of their own; the expected loss is that of all images.  None uses all.
    """

    def __init__(
        self, network, heatmap: Heatmap | None = None, attention_loss: str = "kl", heatmap_images: int | None = None
    ):
        super().__init__()
        self.network, self.heatmap = network, heatmap or make_heatmap(network)
        self.attention_loss, self.heatmap_images = attention_loss, heatmap_images

    def forward(self, batch: Batch, weight: float, tokens: int | None = None, images: int | None = None) -> LossParts:
        """The losses of a batch.  Nothing here waits for the GPU.

        Args:
            weight: of the attention loss; 0 computes no heatmap.
            tokens, images: divisors of the two losses, numbers of answer tokens and of images with objects; None for
                this batch's.  With gradient accumulation, those of all batches of the step, in all processes.
        """
        with_objects = [row for row, count in enumerate(batch["count"]) if count]
        tokens, images = tokens or batch["answer_tokens"], images or len(with_objects)
        all_images = self.heatmap_images is None or self.heatmap_images >= len(batch["names"])
        looked_at, share = batch, 1.0
        if not (weight and with_objects):
            logits, _ = answer_logits(self.network, batch)
            count = count_loss(logits, batch["answer_labels"]) / tokens
            return LossParts(count, count, torch.zeros_like(count))
        if all_images:  # a single pass
            logits, heatmap = self.heatmap.with_logits(batch, create_graph=True)
        else:
            logits, _ = answer_logits(self.network, batch)
            rows = self.chosen(batch["names"], with_objects)
            looked_at, share = select_rows(batch, rows), len(rows) / len(with_objects)
            heatmap = self.heatmap(looked_at, create_graph=True)
        divergence = ATTENTION_LOSSES[self.attention_loss](looked_at["target"], heatmap)  # [B]
        divergence = divergence * (looked_at["target"] > 0).any(dim=2).any(dim=1)
        attention = divergence.sum() / share / images
        count = count_loss(logits, batch["answer_labels"]) / tokens
        return LossParts(count + weight * attention, count, attention)

    def chosen(self, names: list[str], rows: list[int]) -> list[int]:
        """Random choice of rows, at most `heatmap_images`; it depends only on the names of the batch's images."""
        return sorted(random.Random(" ".join(names)).sample(rows, min(self.heatmap_images, len(rows))))
