"""Ctrl-C, SIGTERM and a notebook's "interrupt": a run ends between two steps, and not within one.

Left out: what is saved then (`run`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; the message says how to go on.

    Attributes:
        signal: which signal did it.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.signal = signal.Signals(number)


class Signals:
    """SIGINT and SIGTERM, caught: they raise `Interrupted`, at once or at the end of what they may not tear.

    A second one is a plain KeyboardInterrupt at once.  Only the main thread can catch signals: elsewhere all stays as
    it was, and so it does in a run of several processes, which would stop at different steps.
    """

    def __init__(self):
        self.received, self.held = 0, False

    @contextmanager
    def caught(self, processes: int) -> Iterator[None]:
        """Catch signals until the end of this."""
        if processes > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        if not self.held:
            raise Interrupted(number)

    def check(self) -> None:
        """Raise what was held back."""
        if self.received:
            raise Interrupted(self.received)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold signals back until `check` or the end."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
        self.check()


def stopped(run, interrupted: Interrupted) -> Interrupted:
    """Save what a `loop.Run` has not saved yet, and say how to go on."""
    if run.step > run.saved:
        run.training_step.check()
        run.folder.save(run)
    where = f"after step {run.step} of {run.total_steps}, all of it in {run.folder.out}/last"
    how = f"{where}: go on with the same command and --resume (in Python: resume=True)"
    if run.config.lora:
        how = f"{where}: its adapters are merged, so it cannot go on, but last/ is a model"
    if not run.step:
        how = "before the first step: start it again"
    return Interrupted(interrupted.signal, f"{interrupted.signal.name} {how}")
