"""Device, precision, memory and clock of the machine at hand."""

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs

from ..options import ConfigError


class OwnAccelerator(Accelerator):
    """An accelerator that keeps its precision: accelerate's own looks it up in a state that the newest one has set."""

    def autocast(self, *args, **kwargs):
        AcceleratorState._shared_state = self.state.__dict__
        return super().autocast(*args, **kwargs)

    def prepare(self, *args, **kwargs):
        AcceleratorState._shared_state = self.state.__dict__
        return super().prepare(*args, **kwargs)


def make_accelerator(precision: str) -> Accelerator:
    """Device and precision; weights keep their type.  fp16 without a GPU is a ConfigError.

    Under `torchrun` the processes are joined, also on a CPU; on GPUs they can reduce tensors of the CPU, too.
    "bf16" or "fp16" is autocast (fp16 with a loss scale), "fp32" none; "auto" is bf16 on a GPU that has it, fp16 on
    an older one, fp32 elsewhere.  Switches cuDNN's attention off, in this whole process.
    """
    on_gpu, on_mac = torch.cuda.is_available(), torch.backends.mps.is_available()
    # it plans anew for each length: 0.26 of the 0.6 s that an H100's host took for a step of 64 images (docs/speed.md)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if precision == "auto":
        narrow = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        precision = narrow if on_gpu else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError("precision (--precision) is fp16, but must be fp32 or bf16 without an NVIDIA GPU")
    if on_mac:
        warnings.warn("Apple's MPS was never tried with this library, so it computes on the CPU", stacklevel=2)
    AcceleratorState._shared_state = {}  # not emptied: that would change the precision of who has the one before
    launched = "LOCAL_RANK" in os.environ  # without processes to join, accelerate takes no backend
    return OwnAccelerator(
        cpu=not on_gpu,  # else accelerate joins no processes there
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if launched and on_gpu else None,
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=on_gpu),  # `SizeBatches` does
    )


def default_workers() -> int:
    """Processes that read images: one less than there are cores, up to 8, beside a GPU; else none."""
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a run between two steps; Windows has no SIGHUP."""


@contextmanager
def signals_later() -> Iterator[None]:
    """Send the signals that stop a run again at the end of this, in the main thread.

    Python drops an exception that a signal raises while a process forks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)


def leave_signals_to_parent(_worker: int) -> None:
    """In a process that reads images: ignore the signals that stop a run; the `worker_init_fn` of a DataLoader.

    `timeout`, SLURM and a closed shell signal all processes of a run, and the parent needs its readers to the end of
    a step.  A SIGTERM of the parent itself still ends the process: Python stops its readers so when it exits.
    """
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not tell the sender: SIGTERM ends readers there
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def reader_died(error: BaseException) -> bool:
    """Whether an error says that a process that reads images was killed."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    return isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)


def free_models() -> None:
    """Give the memory of models that nobody refers to any more back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # which does nothing where there is no GPU


def free_memory() -> int:
    """Bytes of this machine's memory that are free for use."""
    return psutil.virtual_memory().available


def gpu_memory() -> tuple[int, int]:
    """Bytes of the GPU that this process could have at the most, and those that nobody else holds."""
    free, total = torch.cuda.mem_get_info()
    most = int(total * torch.cuda.get_per_process_memory_fraction())
    return most, min(most, free + torch.cuda.memory_reserved())


def memory_in_use(device: str) -> int:
    """Bytes of the tensors on "cuda", or else of the whole process."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """MiB at the highest point of a call: of tensors on "cuda", or else of the whole process; None if not on Linux."""
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
    """Seconds of a call; on "cuda" what it asks of the GPU included."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: str) -> None:
    """Let the GPU finish."""
    if device == "cuda":
        torch.cuda.synchronize()
