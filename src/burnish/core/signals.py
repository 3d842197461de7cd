"""Signals before and after the training loop: while data and models are read, and while results are written.

Inside the loop a signal waits for the end of the step (`engine.events.Requests`). Outside there is nothing to save, so it ends the command
at once, with the same exit code: whoever starts the command again on that code goes on.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from burnish.core.errors import Interrupted

__all__ = ["POLITE", "Interruptible", "Repeats", "Stopped"]

POLITE = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What asks a process to end: Ctrl-C, whoever manages processes, and batch systems before the time is up."""


_ONE = 1.0  # second


class Repeats:
    """Tells a signal that comes from two sides at once from one that is sent again.

    Batch systems and service managers send theirs to all processes of a job, and a launcher passes on what it got, so that a rank gets it
    twice. Ctrl-C comes from somebody's hand: each one counts.
    """

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def is_one(self, number: int) -> bool:
        """Whether a signal that has just come is the one before."""
        before, self._last = self._last, self._last or (number, time.monotonic())
        return before is not None and number == before[0] != signal.SIGINT and time.monotonic() - before[1] < _ONE


class Stopped(BaseException):
    """A polite signal on its way out.

    As KeyboardInterrupt it is no Exception: whoever tries a model out and catches all that may go wrong would take the signal for a fault
    of the model, and go on.
    """


class Interruptible:
    """A context that ends with Interrupted on the first polite signal, wherever the program is; a second one ends the process."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._repeats = Repeats()
        self._came = False

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():  # Python allows no handlers elsewhere
            for number in POLITE:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if isinstance(error, Stopped):
            raise Interrupted(str(error), hint="run the same command again to go on") from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._repeats.is_one(number):
            return
        if self._came:
            self._restore()
            signal.raise_signal(number)
            return
        self._came = True
        raise Stopped(f"stopped by {signal.Signals(number).name} outside of training")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
