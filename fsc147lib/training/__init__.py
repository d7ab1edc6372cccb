"""Training: the two losses, batches, the optimizer step, the loop, a run's folder with its checkpoints, and sweeps of
many runs over a grid of options."""

from .loop import TrainConfig, train
from .losses import DualLoss
from .run import TrainResult
from .step import TrainingStep
from .sweep import SweepConfig, run_sweep

__all__ = ["DualLoss", "SweepConfig", "TrainConfig", "TrainResult", "TrainingStep", "run_sweep", "train"]
