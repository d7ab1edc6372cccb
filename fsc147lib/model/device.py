"""Device, precision, memory and clock of the machine at hand."""

import gc
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from ..options import ConfigError, Precision


@dataclass(frozen=True)
class Compute:
    """Where passes run, and how wide their products are; weights keep their type."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of products."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def autocast(self) -> torch.autocast:
        """Within, products are computed in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision != "fp32")


def choose_compute(precision: Precision = "auto") -> Compute:
    """The GPU, or the CPU without one; "auto" is bf16 on a GPU, fp16 on an older one, fp32 on a CPU.

    A ConfigError refuses fp16 on a CPU.
    """
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        narrow: Literal["bf16", "fp16"] = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        precision = narrow if on_gpu else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError("precision (--precision) is fp16, but must be fp32 or bf16 without an NVIDIA GPU")
    if torch.backends.mps.is_available():
        warnings.warn("Apple's MPS was never tried with this library, so it computes on the CPU", stacklevel=2)
    own = int(os.environ.get("LOCAL_RANK", 0))  # the GPU of this process under `torchrun`
    return Compute(torch.device("cuda", own) if on_gpu else torch.device("cpu"), precision)


def default_workers() -> int:
    """Processes that read images: beside a GPU one less than there are cores, 8 at most; 0 without a GPU."""
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0


def free_models() -> None:
    """Give the memory of models without references back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def free_memory() -> int:
    """Free bytes of this machine's memory."""
    return psutil.virtual_memory().available


def gpu_memory() -> tuple[int, int]:
    """Bytes of the GPU that this process may use, and those of them that no other process holds."""
    free, total = torch.cuda.mem_get_info()
    most = int(total * torch.cuda.get_per_process_memory_fraction())
    return most, min(most, free + torch.cuda.memory_reserved())


def memory_in_use(device: str) -> int:
    """Bytes of tensors on "cuda", on another device of the whole process."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Peak of a call in MiB: of tensors on "cuda", on another device of the process, None where not on Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    except OSError:
        return None
    run()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds of a call, the GPU's work included."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: str) -> None:
    """Let the GPU finish."""
    if device == "cuda":
        torch.cuda.synchronize()
