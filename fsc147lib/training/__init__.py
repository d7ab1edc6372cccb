"""Losses to step to run: the count loss and the attention loss, batches, the loop, and a run's folder.

Left out: what a person looks at (`report`).
"""

from .loop import TrainConfig, TrainResult, train
from .losses import ATTENTION_LOSSES, DualLoss

__all__ = ["ATTENTION_LOSSES", "DualLoss", "TrainConfig", "TrainResult", "train"]
