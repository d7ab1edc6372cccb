"""Ctrl-C, SIGTERM, SIGHUP and a notebook's interrupt end a run between two steps."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..readers import STOP_SIGNALS, reader_died


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run; the message says how to continue.

    Attributes:
        signal: the `signal.Signals` that stopped it.
    """

    def __init__(self, number: int, where: str = "before a step was saved: start it again"):
        self.signal = signal.Signals(number)
        super().__init__(f"{self.signal.name} {where}")


class Signals:
    """Raises `Interrupted` for the first signal that stops a run: immediately, or when `hold` ends.

    Later signals are ignored, because `timeout` sends two.  A Ctrl-C at least a second later raises KeyboardInterrupt.
    Under `nohup`, SIGHUP stays ignored.  Signals keep their handlers outside the main thread, and in a run of several
    processes, which would stop at different steps.

    Attributes:
        received: number of the first signal, 0 without one.
    """

    def __init__(self):
        self.received, self.since, self.held = 0, 0.0, False

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        """Handle signals within the block."""
        before = {}
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
            if not self.held:
                raise Interrupted(number)
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `Interrupted` if a signal was received."""
        if self.received:
            raise Interrupted(self.received)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Delay signals to the next `check` or the end of the block; drop the error of a reader that one killed."""
        self.held = True
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            if not (self.received and reader_died(error)):
                raise
        finally:
            self.held = False
        self.check()
