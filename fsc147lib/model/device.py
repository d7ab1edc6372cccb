"""Device, precision and free memory of the machine at hand."""

import gc
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from ..options import ConfigError, Precision

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """The device of a model's passes, and the type of their products; weights keep their own type."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]

    def autocast(self) -> torch.autocast:
        """A context in which products are computed in `precision`."""
        return torch.autocast(self.device.type, TYPES[self.precision], enabled=self.precision != "fp32")


def choose_compute(precision: Precision = "auto") -> Compute:
    """The GPU of this process, or the CPU if there is none.

    "auto" is bf16 on a GPU, fp16 on a GPU without bf16, and fp32 on a CPU.  A ConfigError refuses fp16 on a CPU.
    """
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16" if on_gpu else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError("precision (--precision) is fp16, but must be fp32 or bf16 without an NVIDIA GPU")
    if torch.backends.mps.is_available():
        warnings.warn("Apple's MPS is not tested with this library, so the CPU is used", stacklevel=2)
    own = int(os.environ.get("LOCAL_RANK", 0))  # the GPU of this process under `torchrun`
    return Compute(torch.device("cuda", own) if on_gpu else torch.device("cpu"), precision)


def default_workers() -> int:
    """Number of processes that read images: with a GPU one less than the cores, from 1 to 8; without a GPU 0."""
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0


def free_models() -> None:
    """Give the memory of models without references back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def free_memory() -> int:
    """Free bytes of this machine's memory."""
    return psutil.virtual_memory().available


def gpu_memory() -> tuple[int, int]:
    """Bytes of the GPU that this process may use, and the part of them that no other process holds."""
    free, total = torch.cuda.mem_get_info()
    most = int(total * torch.cuda.get_per_process_memory_fraction())
    return most, min(most, free + torch.cuda.memory_reserved())
