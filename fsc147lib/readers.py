"""Processes that read images for a DataLoader leave the signals that stop a run to their parent; a progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a run between two steps; Windows has no SIGHUP."""


def read(loader) -> Iterator:
    """The batches of a DataLoader; its processes begin while signals wait."""
    with signals_later():
        return iter(loader)


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


def reader_options(workers: int) -> dict:
    """Arguments of a DataLoader whose processes leave signals to their parent."""
    options = {"num_workers": workers, "worker_init_fn": leave_signals_to_parent}
    if workers and multiprocessing.get_start_method() == "fork":
        options["multiprocessing_context"] = _ReaderContext()
    return options


class _ReaderContext(type(multiprocessing.get_context("fork"))):  # type: ignore[misc]
    """Forks with SIGTERM blocked: threads that a library starts in the new process, as wandb does, block it as well."""

    class Process(multiprocessing.get_context("fork").Process):  # type: ignore[misc, name-defined]
        def start(self):
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """The `worker_init_fn` of a DataLoader: ignore the signals that stop a run.

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


def progress_bar(items=None, **options) -> tqdm:
    """A bar of tqdm; in a notebook on stdout, because a finished bar on stderr leaves a red box."""
    return tqdm(items, file=sys.stdout if "ipykernel" in sys.modules else None, **options)
