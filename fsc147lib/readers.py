"""Processes that read images for a DataLoader, and the signals that they leave to their parent; a progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

# They stop a run between two steps.  Windows has no SIGHUP.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def read(loader) -> Iterator:
    """Iterate over a DataLoader; signals wait while its processes start."""
    with signals_later():
        return iter(loader)


@contextmanager
def signals_later() -> Iterator[None]:
    """Hold the signals of STOP_SIGNALS back until the block ends: Python loses an exception raised during a fork."""
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


def reader_options(workers: int) -> dict:
    """Arguments for a DataLoader with this number of reading processes, which leave signals to their parent."""
    options = {"num_workers": workers, "worker_init_fn": leave_signals_to_parent}
    if workers and multiprocessing.get_start_method() == "fork":
        options["multiprocessing_context"] = _ReaderContext()
    return options


class _ReaderContext(type(multiprocessing.get_context("fork"))):  # type: ignore[misc]
    """Forks with SIGTERM blocked, so that threads which wandb starts in the new process block it, too."""

    class Process(multiprocessing.get_context("fork").Process):  # type: ignore[misc, name-defined]
        def start(self):
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """The `worker_init_fn` of a DataLoader: ignore STOP_SIGNALS, but for a SIGTERM from the parent process.

    `timeout`, SLURM and a closed shell signal all processes of a run; the parent needs its readers until its step ends.
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
    """Whether an error means that a reading process was killed."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    return isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)


def progress_bar(items=None, **options) -> tqdm:
    """A tqdm bar; on stdout in a notebook, where stderr has a red background."""
    return tqdm(items, file=sys.stdout if "ipykernel" in sys.modules else None, **options)
