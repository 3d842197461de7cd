"""Every error that burnish raises on purpose, in one tree.

    BurnishError                exit code 2: bad input, one clear sentence
    ├── ConfigError             the run file: unknown key, wrong type, contradiction (carries all faults at once)
    ├── DataError               rows and files
    │   ├── SourceError         a file or data set cannot be found, opened or parsed
    │   ├── FormatError         the format of the rows is unknown or ambiguous
    │   ├── RowError            one row is malformed
    │   └── TemplateError       the chat template is missing, broken, or cannot be masked exactly
    ├── ModelError              the model or tokenizer cannot be loaded, or lacks what the run needs
    │   └── AdapterError        the adapter does not fit the model
    ├── CheckpointError         a checkpoint is missing, torn, or belongs to another run
    │   └── StorageError        exit code 1: a checkpoint or model cannot be written
    ├── TrainingError           the run cannot go on: non-finite loss, a parameter without gradient
    ├── DependencyError         an optional package is needed and not installed
    ├── Elsewhere               another rank has failed and said why; exit code as there
    └── Interrupted             exit code 3: stopped by a signal, checkpoint saved

A message is one sentence that names the place (file, line, row, key), what was found, and what was expected. A `hint` says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Where:
    """A place in the user's input. Rows and lines count from 1, as an editor shows them."""

    file: str | None = None
    line: int | None = None
    row: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}" if place else f"line {self.line}"
        parts = [place] if place else []
        if self.row is not None:
            parts.append(f"row {self.row}")
        if self.field is not None:
            parts.append(f"field '{self.field}'")
        return ", ".join(parts)


class BurnishError(Exception):
    """Base of all errors that are the input's fault rather than burnish's.

    Args:
        message: One sentence: what was found and what was expected.
        where: The place in the user's input, put before the message.
        hint: What to do about it, printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: Where | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        place = str(self.where) if self.where else ""
        return f"{place}: {self.message}" if place else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (tokenising workers), where keyword-only arguments would be lost.
        return _rebuild, (type(self), self.message, self.where, self.hint)


def _rebuild(kind: type[BurnishError], message: str, where: Where | None, hint: str | None) -> BurnishError:
    return kind(message, where=where, hint=hint)


class ConfigError(BurnishError):
    """The run file is wrong. `faults` lists every fault found, each one a sentence with its place."""

    def __init__(self, message: str, *, where: Where | None = None, hint: str | None = None, faults: Iterable[str] = ()) -> None:
        super().__init__(message, where=where, hint=hint)
        self.faults = tuple(faults)

    def __str__(self) -> str:
        # A single fault is the message itself.
        return super().__str__() if len(self.faults) < 2 else "\n".join([super().__str__(), *(f"  {fault}" for fault in self.faults)])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_config_error, (self.message, self.where, self.hint, self.faults)


def _rebuild_config_error(message: str, where: Where | None, hint: str | None, faults: tuple[str, ...]) -> ConfigError:
    return ConfigError(message, where=where, hint=hint, faults=faults)


class DataError(BurnishError):
    """Rows or files are wrong."""


class SourceError(DataError):
    """A file or data set cannot be found, opened or parsed."""


class FormatError(DataError):
    """The format of the rows is unknown or ambiguous."""


class RowError(DataError):
    """One row is malformed."""


class TemplateError(DataError):
    """The chat template is missing, broken, or cannot be masked exactly."""


class ModelError(BurnishError):
    """The model or tokenizer cannot be loaded, or lacks what the run needs."""


class AdapterError(ModelError):
    """The adapter does not fit the model."""


class CheckpointError(BurnishError):
    """A checkpoint is missing, torn, or belongs to another run."""


class StorageError(CheckpointError):
    """A checkpoint or a trained model could not be written; what was written before is untouched."""

    exit_code = 1


class TrainingError(BurnishError):
    """The run cannot go on: the loss is not finite, or a parameter gets no gradient."""


class DependencyError(BurnishError):
    """An optional package is needed and not installed."""


class Elsewhere(BurnishError):
    """Another rank has failed and said why. Ends this one with the same exit code, and is not printed."""

    def __init__(self, message: str, *, exit_code: int = 2, where: Where | None = None, hint: str | None = None) -> None:
        super().__init__(message, where=where, hint=hint)
        self.exit_code = exit_code


class Interrupted(BurnishError):
    """Stopped by a signal, with a checkpoint saved."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one, or None where nothing is close."""
    by_lower = {one.lower(): one for one in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def divisors(number: int) -> list[int]:
    """The numbers beyond 1 that divide it: sizes that groups can have."""
    return [size for size in range(2, number + 1) if number % size == 0]


def one_of(choices: Sequence[object]) -> str:
    """A short phrase for a hint: the only choice, else the list of them."""
    return f"{'one of ' if choices[1:] else ''}{', '.join(map(str, choices))}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A short phrase for a message: the nearest name, else the list of known ones."""
    names = list(known)
    match = nearest(name, names)
    return f"did you mean '{match}'?" if match else f"known: {', '.join(sorted(names))}"
