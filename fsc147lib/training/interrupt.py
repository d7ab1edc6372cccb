"""Ctrl-C, SIGTERM, SIGHUP and a notebook's "interrupt": a run ends between two steps, and not within one.

Left out: what is saved then (`run`), and the processes that read images (`readers`).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..readers import STOP_SIGNALS, reader_died


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; the message says how to go on.

    Attributes:
        signal: the signal that stopped it.
    """

    def __init__(self, number: int, where: str = "before a step was saved: start it again"):
        self.signal = signal.Signals(number)
        super().__init__(f"{self.signal.name} {where}")


class Signals:
    """The signals that stop a run; they raise `Interrupted`: now, or when `hold` ends.

    Later signals change nothing, for `timeout` sends two; but a Ctrl-C a second later is a plain KeyboardInterrupt.
    An ignored SIGHUP stays ignored, as `nohup` wants it.  Nothing is caught outside the main thread, or in a run of
    several processes, which would stop at different steps.
    """

    def __init__(self):
        self.received, self.since, self.held = 0, 0.0, False

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        """Catch signals until the end of this."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        before = {}
        if not several and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
            if not self.held:
                raise Interrupted(number)
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise what was held back."""
        if self.received:
            raise Interrupted(self.received)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold signals back until `check` or the end; a reader that dies of the same signal is no error."""
        self.held = True
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            if not (self.received and reader_died(error)):
                raise
        finally:
            self.held = False
        self.check()
