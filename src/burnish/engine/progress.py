"""What a person sees while training: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from burnish.core.log import console as the_console

__all__ = ["TrainingProgress", "describe", "short"]

_EVERY = 5.0  # seconds between two plain lines


class TrainingProgress:
    """Step, loss, learning rate, tokens per second and the time left, on stderr.

    Args:
        total: Steps of the run.
        done: Steps done already, in a resumed run.
        active: False on ranks that do not print.
        console: Where to; for tests.
    """

    def __init__(self, total: int, *, done: int = 0, active: bool = True, console: Console | None = None) -> None:
        self.total = total
        self._active = active
        self._console = console or the_console
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # tokens and seconds of the last steps
        self._last_line = -_EVERY
        self._bar: Progress | None = None
        if active and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
                transient=False,
            )
            self._task = self._bar.add_task("training", total=total, completed=done, numbers="")

    def __enter__(self) -> TrainingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, line: dict[str, Any]) -> None:
        """Shows the line of a step (see `engine.metrics.step_line`)."""
        self._recent.append((line["tokens"], line["seconds"]))
        if not self._active:
            return
        numbers = describe(line, self.tokens_per_second)
        if self._bar:
            self._bar.update(self._task, completed=line["step"], numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last_line >= _EVERY or line["step"] == self.total:
            self._last_line = now
            self._console.print(f"step {line['step']}/{self.total}  {numbers}  {self._time_left(line['step'])}", highlight=False)

    def status(self, text: str) -> None:
        """What the run is doing now, if not training."""
        if self._bar:
            self._bar.update(self._task, description=text)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._active:
            self._console.print(text, highlight=False, markup=False)

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps."""
        seconds = sum(second for _, second in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    def _time_left(self, step: int) -> str:
        per_step = sum(second for _, second in self._recent) / len(self._recent)
        left = round(per_step * (self.total - step))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def describe(line: dict[str, Any], tokens_per_second: float) -> str:
    """The numbers of a step in one short text."""
    return f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {short(tokens_per_second)} tok/s"


def short(number: float) -> str:
    """A number in three digits: 1234567 is 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
