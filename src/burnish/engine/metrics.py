"""Metrics in files that every tool reads.

    metrics.jsonl   one line an optimiser step:
                    step, loss, learning_rate, grad_norm, tokens, trained_tokens, seconds, tokens_per_second, and the objective's own
    eval.jsonl      one line an evaluation: step, eval_loss, eval_tokens, eval_seconds, eval_perplexity (SFT), and the objective's own
    metrics.csv     both in one table, for spreadsheets

tokens, trained_tokens and seconds are those of the step alone; `skipped` is 1 where the weights stayed as they
were, and left out elsewhere. A number that is not finite is null. A resumed run cuts the lines after its checkpoint, so the files look like
those of a run that was never interrupted.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from burnish.core.errors import StorageError
from burnish.core.log import counted, warn
from burnish.engine.step import StepResult

__all__ = ["MetricsLog", "read_lines", "step_line"]

Line = dict[str, Any]


class MetricsLog:
    """Writes the metrics of a run folder, a line at a time.

    Args:
        folder: The run folder.
        after: Cut the steps after this one: all of them where it is 0.
        evaluated: Cut the evaluations after that of this step: all of them where it is None.
        active: False on ranks that do not write.

    Raises:
        StorageError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, after: int = 0, evaluated: int | None = None, active: bool = True) -> None:
        self._folder = folder
        self._steps: _Lines | None = None
        self._evals: _Lines | None = None
        if active:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._steps = _Lines(folder / "metrics.jsonl", after)
                if self._steps.kept < after:
                    warn(f"{folder / 'metrics.jsonl'} has {self._steps.kept:,} of the {counted(after, 'step')} that are done")
                self._evals = _Lines(folder / "eval.jsonl", -1 if evaluated is None else evaluated)
            except OSError as error:
                raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def step(self, line: Line) -> None:
        """Adds the line of a step; it is in the file when this returns, or the disk is full."""
        if self._steps:
            self._steps.append(line)

    def evaluation(self, line: Line) -> None:
        """Adds the line of an evaluation."""
        if self._evals:
            self._evals.append(line)

    def sync(self) -> None:
        """Lines of before reach the disk: a checkpoint that is written after this never knows of steps that the files lack."""
        if self._steps and self._evals:
            self._steps.sync()
            self._evals.sync()

    def close(self) -> None:
        """Closes the files and brings metrics.csv up to date."""
        if self._steps is None or self._evals is None:
            return
        self._steps.close()
        self._evals.close()
        self._steps = self._evals = None
        try:
            write_csv(self._folder)
        except OSError as error:
            warn(f"{self._folder / 'metrics.csv'} could not be written: {error.strerror or error}")


def step_line(result: StepResult, seconds: float) -> Line:
    """The line of one step, in the order of the contract. An objective's metric of the same name gives way."""
    line = {
        "step": result.step,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "seconds": round(seconds, 6),
        "tokens_per_second": round(result.tokens / seconds, 3) if seconds > 0 else None,
    }
    line |= {"skipped": 1} if result.fault else {}
    return {**line, **{key: value for key, value in result.metrics.items() if key not in line}}


def read_lines(path: Path) -> list[Line]:
    """The lines of a .jsonl file that can be read: all but a last one that a crash has cut off, unless something else has damaged it."""
    return _parsed(path)[0]


def _parsed(path: Path) -> tuple[list[Line], int]:
    """The lines that can be read, and how many cannot, not counting the last."""
    lines: list[Line] = []
    damaged = 0
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            line["step"] += 0
        except (ValueError, TypeError, KeyError):
            damaged += number < len(texts)  # what follows the last line break is nothing, or cut off
        else:
            lines.append(line)
    return lines, damaged


def write_csv(folder: Path) -> None:
    """metrics.csv from the two .jsonl files: a row a step, with the columns of the evaluation where there was one."""
    steps, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "eval.jsonl")
    rows: dict[int, Line] = {}
    for line in (*steps, *evaluations):
        rows.setdefault(line["step"], {}).update(line)
    columns = list(dict.fromkeys(key for line in (*steps, *evaluations) for key in line))
    temporary = folder / "metrics.csv.unfinished"
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
    temporary.replace(folder / "metrics.csv")


class _Lines:
    """A .jsonl file that grows. What a full disk does not take waits in memory for the next line, and no line is ever cut in two.

    Args:
        path: The file. Lines after step `after` are cut from it.
        after: The last step to keep.
    """

    def __init__(self, path: Path, after: int) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        lines, damaged = _parsed(path)
        kept = [line for line in lines if line["step"] <= after]
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.copyfile(path, aside)
            warn(f"{path} has {counted(damaged, 'line')} that cannot be read; the rest is kept, and the file as it was is {aside.name}")
        temporary = path.with_name(f"{path.name}.unfinished")
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.kept = len(kept)
        self._file = path.open("r+b", buffering=0)
        self._named = False
        self._size = self._file.seek(0, os.SEEK_END)  # where the last whole line ends

    def append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps({key: _number(value) for key, value in line.items()}, allow_nan=False) + "\n"
        self._waiting.append(text.encode())
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                warn(f"{self._path} could not be written: {error.strerror or error}; its lines wait in memory")

    def sync(self) -> None:
        try:
            self._write()
            os.fsync(self._file.fileno())
            if not self._named:  # the name in the folder, too
                folder = os.open(self._path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
                self._named = True
        except OSError as error:
            warn(f"{self._path} could not be flushed to the disk: {error.strerror or error}")

    def close(self) -> None:
        try:
            self._write()
        except OSError as error:
            warn(f"{self._path} lacks its last {counted(len(self._waiting), 'line')}: {error.strerror or error}")
        self._file.close()

    def _write(self) -> None:
        if os.fstat(self._file.fileno()).st_nlink == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file.close()
            self._file = self._path.open("w+b", buffering=0)
            self._size, self._named = 0, False
            warn(f"{self._path} was deleted, and begins anew")
        while self._waiting:
            self._file.seek(self._size)
            written = self._file.write(self._waiting[0])
            if written < len(self._waiting[0]):
                self._file.truncate(self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += written
            del self._waiting[0]


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
