"""Device, precision and worker processes of the machine at hand."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration


def make_accelerator(precision: str) -> Accelerator:
    """Device and precision: "bf16" is autocast, "auto" that on a GPU and fp32 elsewhere; weights keep their type."""
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    AcceleratorState._reset_state()  # it is shared, and would refuse a second run of another precision in one notebook
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(
            even_batches=False, non_blocking=torch.cuda.is_available()
        ),  # `SizeBatches` does
    )


def default_workers() -> int:
    """Processes that read images: one less than there are cores, up to 8, beside a GPU; else none."""
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0
