"""What `throughput` compares with: the batches and the loss of a plain transformers training loop.

Left out: the step, which is `TrainingStep` here too.
"""

import torch
from torch import nn

from ..data.fsc147 import Sample
from ..model.collate import Batch, Collate
from ..model.network import CountingModel
from ..training.losses import LossParts


class PlainCollate:
    """What a plain loop feeds to transformers: pixels from the library's processor, anew for each batch."""

    def __init__(self, model: CountingModel):
        self.collate = Collate(model.tokenizer, model.image_processor, pixels=False)

    def __call__(self, samples: list[Sample]) -> Batch:
        keys = (
            "names", "count", "input_ids", "attention_mask", "mm_token_type_ids", "labels", "image_sizes",
            "answer_tokens",
        )  # fmt: skip
        batch = self.collate(samples)
        pixels = self.collate.image_processor(images=[sample.image for sample in samples], return_tensors="pt")
        return {**{key: batch[key] for key in keys}, **pixels}


class PlainLoss(nn.Module):
    """The count loss as transformers computes it: a forward pass with all logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, tokens=None, images=None, weight=None) -> LossParts:
        keys = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "pixel_values", "image_grid_thw")
        loss = self.network(**{key: batch[key] for key in keys}, use_cache=False).loss
        return LossParts(loss, loss, torch.zeros_like(loss))
