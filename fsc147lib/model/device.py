"""Device, precision and worker processes of the machine at hand."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration


class OwnAccelerator(Accelerator):
    """An accelerator that keeps its precision: accelerate's own looks it up in a state that the newest one has set."""

    def autocast(self, *args, **kwargs):
        AcceleratorState._shared_state = self.state.__dict__
        return super().autocast(*args, **kwargs)

    def prepare(self, *args, **kwargs):
        AcceleratorState._shared_state = self.state.__dict__
        return super().prepare(*args, **kwargs)


def make_accelerator(precision: str) -> Accelerator:
    """Device and precision: "bf16" is autocast, "auto" that on a GPU and fp32 elsewhere; weights keep their type."""
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    AcceleratorState._shared_state = {}  # not emptied: that would change the precision of who has the one before
    return OwnAccelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(
            even_batches=False, non_blocking=torch.cuda.is_available()
        ),  # `SizeBatches` does
    )


def default_workers() -> int:
    """Processes that read images: one less than there are cores, up to 8, beside a GPU; else none."""
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0
