"""Metrics in files that every tool reads.

    metrics.jsonl   one line an optimiser step:
                    step, loss, learning_rate, grad_norm, tokens, trained_tokens, seconds, tokens_per_second, and the objective's own
    eval.jsonl      one line an evaluation: step, eval_loss, eval_tokens, eval_seconds, eval_perplexity (SFT), and the objective's own
    metrics.csv     both in one table, for spreadsheets

tokens, trained_tokens and seconds are those of the step alone. A number that is not finite is null. A resumed run cuts the lines after its
checkpoint, so the files look like those of a run that was never interrupted.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from burnish.engine.step import StepResult

__all__ = ["MetricsLog", "read_lines", "step_line"]

Line = dict[str, Any]


class MetricsLog:
    """Writes the metrics of a run folder, a line at a time.

    Args:
        folder: The run folder.
        after: Cut what is there after this step: 0 for a fresh run.
        active: False on ranks that do not write.
    """

    def __init__(self, folder: Path, *, after: int = 0, active: bool = True) -> None:
        self._folder = folder
        self._steps: TextIO | None = None
        self._evals: TextIO | None = None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            self._steps = _continue(folder / "metrics.jsonl", after)
            # An evaluation at step 0 belongs to a fresh run alone.
            self._evals = _continue(folder / "eval.jsonl", after if after else -1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def step(self, line: Line) -> None:
        """Adds the line of a step; it is in the file when this returns."""
        _append(self._steps, line)

    def evaluation(self, line: Line) -> None:
        """Adds the line of an evaluation."""
        _append(self._evals, line)

    def close(self) -> None:
        """Closes the files and brings metrics.csv up to date."""
        if self._steps is None or self._evals is None:
            return
        self._steps.close()
        self._evals.close()
        self._steps = self._evals = None
        write_csv(self._folder)


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
    return {**line, **{key: value for key, value in result.metrics.items() if key not in line}}


def read_lines(path: Path) -> list[Line]:
    """The lines of a .jsonl file, without a last one that a crash has cut off."""
    if not path.is_file():
        return []
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


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


def _continue(path: Path, after: int) -> TextIO:
    """The file with the lines up to step `after`, open at its end."""
    kept = [line for line in read_lines(path) if line["step"] <= after]
    temporary = path.with_name(f"{path.name}.unfinished")
    temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
    return path.open("a", encoding="utf-8")


def _append(file: TextIO | None, line: Mapping[str, Any]) -> None:
    if file is not None:
        file.write(json.dumps({key: _number(value) for key, value in line.items()}, allow_nan=False) + "\n")
        file.flush()


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
