"""Signals before and after the training loop: while data and models are read, and while results are written.

Inside the loop a signal waits for the end of the step (`engine.events.Requests`). Outside there is nothing to save, so it ends the command
at once, with the same exit code: whoever starts the command again on that code goes on. An import is waited for: a module that is left
half-way breaks what comes next, or the exception ends up in an `except` of its own.
"""

from __future__ import annotations

import _thread
import inspect
import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from burnish.core.errors import Interrupted
from burnish.core.log import console, print_error

__all__ = ["POLITE", "Interruptible", "Repeats", "Stopped", "waiting"]

POLITE = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What asks a process to end: Ctrl-C, whoever manages processes, and batch systems before the time is up."""


_REMINDER = signal.Signals["SIGURG" if hasattr(signal, "SIGURG") else "SIGBREAK"]  # which nobody sends
_ONE = 1.0  # second
_SOON = 0.005  # seconds
_PATIENCE = 20.0  # seconds


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


@contextmanager
def waiting() -> Generator[None]:
    """Polite signals wait meanwhile; in a process that is started inside, until it is Interruptible.

    Python's own start would answer them with a traceback, or the process with its death.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(BaseException):
    """A polite signal on its way out.

    As KeyboardInterrupt it is no Exception: whoever tries a model out and catches all that may go wrong would take the signal for a fault
    of the model, and go on.
    """


class Interruptible:
    """A context that ends with Interrupted on the first polite signal, wherever the program is; a second one ends the process.

    For a process of our own: where the program does not let go, because it is in a library's code that waits, the process is ended.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._repeats = Repeats()
        self._came = ""  # what came, in a sentence
        self._raised = False
        self._outside: FrameType | None = None  # whose `with` it is, once that has begun

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():  # Python allows no handlers elsewhere
            for number in POLITE:
                self._before[number] = signal.signal(number, self._handle)
            self._before[_REMINDER] = signal.signal(_REMINDER, self._leave)
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, POLITE)  # those that have waited come now
        here = inspect.currentframe()
        self._outside = here.f_back if here else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        twice = not self._before
        self._restore()
        self._outside = None
        if self._came and not twice and not isinstance(error, SystemExit):  # whatever became of the exception
            raise self._interrupted from None

    @property
    def _interrupted(self) -> Interrupted:
        return Interrupted(self._came, hint="run the same command again to go on")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._repeats.is_one(number):
            return
        if self._came:
            self._restore()
            signal.raise_signal(number)
            return
        self._came = f"stopped by {signal.Signals(number).name} outside of training"
        threading.Thread(target=self._see_to_it, args=(signal.Signals(number),), daemon=True).start()
        self._leave(number, frame)

    def _leave(self, _number: int, frame: FrameType | None) -> None:
        if self._came and not self._raised and self._outside is not None and not _imports(frame, self._outside):
            self._raised = True
            raise Stopped(self._came)

    def _see_to_it(self, number: signal.Signals) -> None:
        """Beside the main thread: raises when an import is done; ends the process where that leads nowhere."""
        deadline = time.monotonic() + _PATIENCE
        while self._before:
            if signal.getsignal(number) != self._handle:
                if self._before:  # the training has begun
                    _thread.interrupt_main(number)
                return
            if not self._raised:
                _thread.interrupt_main(_REMINDER)
            if time.monotonic() > deadline:
                console.show_cursor(True)
                print_error(self._interrupted)
                os._exit(Interrupted.exit_code)
            time.sleep(_SOON)

    def _restore(self) -> None:
        before, self._before = self._before, {}  # first, so that `_see_to_it` takes no handler of before for the training's
        for number, handler in before.items():
            signal.signal(number, handler)


def _imports(frame: FrameType | None, outside: FrameType) -> bool:
    """Whether something that `outside` has called, down to `frame`, is importing a module."""
    while frame is not None and frame is not outside:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
