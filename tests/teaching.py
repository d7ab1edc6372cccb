"""A model that learns a few samples by heart."""

import torch

from fsc147lib.model import Collate
from fsc147lib.training.losses import DualLoss


def teach(model, samples, steps, learning_rate=3e-3):
    """Some steps on all samples at once, towards right answers and right maps."""
    batch = Collate(model.tokenizer, model.image_processor)(samples)
    loss, optimizer = DualLoss(model.network), torch.optim.AdamW(model.network.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(batch, 0.1).total.backward()
        optimizer.step()
    return model
