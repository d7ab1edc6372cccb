"""Losses to step to run: the count loss and the attention loss, batches, the loop, a run's folder, and grids of runs.

Left out: what a person looks at (`report`).
"""

from .loop import TrainConfig, train
from .losses import DualLoss
from .run import TrainResult
from .step import TrainingStep
from .sweep import SweepConfig, run_sweep

__all__ = ["DualLoss", "SweepConfig", "TrainConfig", "TrainResult", "TrainingStep", "run_sweep", "train"]
