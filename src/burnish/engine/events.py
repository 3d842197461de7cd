"""What a training run tells the outside (callbacks), and what the outside asks of it (signals and files)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from burnish.core.log import console, warn
from burnish.core.signals import POLITE, Repeats
from burnish.engine.step import StepResult

__all__ = ["Callback", "Callbacks", "Requests", "State"]


@dataclass(slots=True)
class State:
    """Where a run stands. Callbacks may read all of it, and set `stop` to end the run after the step."""

    total: int  # optimiser steps of the whole run
    step: int = 0  # steps done
    epoch: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # spent in steps
    best_loss: float | None = None  # lowest eval loss
    best_step: int | None = None
    best_saved: int | None = None  # step of the checkpoint that holds it
    unimproved: int = 0  # evaluations in a row without improvement
    reference: float | None = None  # the eval loss that an improvement must undercut by evaluation.min_delta
    halvings: int = 0  # how often micro-batches were halved because memory ran out
    rollbacks: int = 0  # how often the run went back to an older state
    evaluated_step: int | None = None  # of the last evaluation
    evaluation_pending: bool = False  # a signal has cut an evaluation short
    stop: str | None = None  # why the run ends before its last step

    @property
    def finished(self) -> bool:
        """True when no further step is to be done."""
        return self.step >= self.total or self.stop is not None


class Callback:
    """What a run calls, in the order of the pseudo-code in `engine.loop`. Override what you need."""

    def on_train_start(self, state: State) -> None:
        """Everything is built; a resumed run stands at its checkpoint."""

    def on_step_start(self, state: State) -> None:
        """The micro-batches of the next step are there."""

    def on_step_end(self, state: State, result: StepResult) -> None:
        """The weights are updated."""

    def on_eval_start(self, state: State) -> None:
        """The held-out data is about to be looked at."""

    def on_eval_end(self, state: State, metrics: Mapping[str, float]) -> None:
        """`metrics` holds eval_loss, eval_perplexity where the objective tells `nll`, and the objective's own."""

    def on_save(self, state: State, folder: Path) -> None:
        """A checkpoint is on the disk."""

    def on_train_end(self, state: State) -> None:
        """The last step is done, and the weights are those to keep."""


class Callbacks(Callback):
    """Several callbacks as one, called in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def on_train_start(self, state: State) -> None:  # noqa: D102  # as in Callback, and so are the rest
        self._call("on_train_start", state)

    def on_step_start(self, state: State) -> None:  # noqa: D102
        self._call("on_step_start", state)

    def on_step_end(self, state: State, result: StepResult) -> None:  # noqa: D102
        self._call("on_step_end", state, result)

    def on_eval_start(self, state: State) -> None:  # noqa: D102
        self._call("on_eval_start", state)

    def on_eval_end(self, state: State, metrics: Mapping[str, float]) -> None:  # noqa: D102
        self._call("on_eval_end", state, metrics)

    def on_save(self, state: State, folder: Path) -> None:  # noqa: D102
        self._call("on_save", state, folder)

    def on_train_end(self, state: State) -> None:  # noqa: D102
        self._call("on_train_end", state)

    def _call(self, event: str, *details: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(*details)


class Requests:
    """What the outside asks of a run: Ctrl-C, SIGTERM, SIGUSR1, and files named STOP and SAVE in the run folder.

    A signal, or STOP, asks the loop to save and stop after the step; a second signal ends the process at once. SAVE asks for a checkpoint.
    The handler only sets a flag; the loop decides, with all ranks together. A checkpoint that is being written when the second signal
    comes is not visible yet, so nothing is spoiled. Handlers of before are put back on leaving. Outside the main thread Python allows no
    handlers; then the files alone are looked at.

    Args:
        folder: The run folder.
        active: Whether this rank looks at the files.
    """

    STOP, SAVE = 1, 2

    def __init__(self, folder: Path, *, active: bool = True) -> None:
        self.received: signal.Signals | None = None
        self._files = {self.STOP: folder / "STOP", self.SAVE: folder / "SAVE"} if active else {}
        self._before: dict[int, Any] = {}
        self._repeats = Repeats()

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            for number in POLITE:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forget(self) -> None:
        """Removes what was left lying there before this run began, which is not for it, and says so."""
        if left := self.seen():
            self.answered(left)
            warn(f"{' and '.join(file.name for request, file in self._files.items() if request & left)} from before this run: removed")

    def seen(self) -> int:
        """What this rank has been asked for: STOP, SAVE, both or 0."""
        asked = self.STOP if self.received is not None else 0
        for request, file in self._files.items():
            if os.path.lexists(file):
                asked |= request
        return asked

    def answered(self, requests: int) -> None:
        """Removes the files of what is done."""
        for request, file in self._files.items():
            if requests & request:
                with suppress(OSError):  # on storage that is read-only now
                    file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._repeats.is_one(number):
            return
        if self.received is not None:
            console.show_cursor(True)  # a progress bar hides it
            os._exit(128 + number)
        self.received = signal.Signals(number)
        warn("stopping after this step, with a checkpoint; once more stops at once")
