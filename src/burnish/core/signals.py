"""Signals before and after the training loop: while data and models are read, and while results are written.

Inside the loop a signal waits for the end of the step (`engine.events.Requests`). Outside there is nothing to save, so it ends the command
at once, with the same exit code: whoever starts the command again on that code goes on.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from burnish.core.errors import Interrupted

__all__ = ["POLITE", "Interruptible"]

POLITE = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What asks a process to end: Ctrl-C, whoever manages processes, and batch systems before the time is up."""


class Interruptible:
    """A context in which the first polite signal raises Interrupted, wherever the program is; a second one ends the process."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():  # Python allows no handlers elsewhere
            for number in POLITE:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        raise Interrupted(f"stopped by {signal.Signals(number).name} outside of training", hint="run the same command again to go on")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
