"""Split expressions: `train`, `train[:1000]`, `train[10%:20%]`, `[-500:]`, `train[:5%]+train[95%:]`.

The meaning is that of Hugging Face `datasets`: Python slices, negative bounds count from the end, percentages are rounded to the closest
row. Here the same expressions also work on local files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from burnish.core.errors import SourceError, Where

_TERM = re.compile(
    r"^\s*(?P<name>\w[\w.-]*)?\s*(?P<slice>\[\s*(?P<start>-?[\d_]+(?:\.\d+)?%?)?\s*:\s*(?P<stop>-?[\d_]+(?:\.\d+)?%?)?\s*\])?\s*$"
)
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of a slice, in rows or in percent of all rows."""

    value: float
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Reads `100`, `-100`, `10%`.

        Raises:
            ValueError: for a fraction of a row, or more than 100 %.
        """
        value = float(text.rstrip("%"))
        percent = text.endswith("%")
        if percent and abs(value) > 100:
            raise ValueError(f"{text} is more than 100%")
        if not percent and value != int(value):
            raise ValueError(f"{text} is no whole number of rows")
        return cls(value, percent)

    def rows(self, total: int) -> int:
        """The bound as a number of rows, between 0 and `total`."""
        rows = round(self.value * total / 100) if self.percent else int(self.value)
        return min(max(rows + total, 0) if rows < 0 else rows, total)


@dataclass(frozen=True, slots=True)
class Slice:
    """Some rows of one split; `name` is None where the expression leaves it out."""

    name: str | None = None
    start: Bound | None = None
    stop: Bound | None = None

    @property
    def needs_total(self) -> bool:
        """Whether the number of rows must be known to tell where the slice begins and ends."""
        return any(bound is not None and (bound.percent or bound.value < 0) for bound in (self.start, self.stop))

    def range(self, total: int | None) -> tuple[int, int | None]:
        """First row and the row after the last, counted from 0; `total` may be None where it is not needed."""
        if total is None:
            return (int(self.start.value) if self.start else 0), (int(self.stop.value) if self.stop else None)
        start = self.start.rows(total) if self.start else 0
        return start, max(start, self.stop.rows(total) if self.stop else total)


def parse_split(text: str | None, place: str) -> list[Slice]:
    """Reads a split expression; None means the default split, whole.

    Raises:
        SourceError: when the text is no split expression.
    """
    if text is None:
        return [Slice()]
    return [_term(term, text, place) for term in text.split("+")]


def _term(term: str, text: str, place: str) -> Slice:
    where = Where(place, field="split")
    hint = "Write a split like 'train', 'train[:1000]', 'train[10%:20%]' or 'train[:5%]+train[95%:]'."
    match = _TERM.match(term)
    if match is None or not term.strip():
        raise SourceError(f"'{text}' is no split expression", where=where, hint=hint)
    try:
        start, stop = (Bound.parse(match[end].replace("_", "")) if match[end] else None for end in ("start", "stop"))
    except ValueError as error:
        raise SourceError(f"'{text}' is no split expression: {error}", where=where, hint=hint) from None
    return Slice(match["name"], start, stop)


def canonical(name: str) -> str:
    """The usual name of a split: `val`, `valid`, `dev` and `eval` are all `validation`."""
    return _CANONICAL.get(name.lower(), name)


def split_of(name: str) -> str | None:
    """The split that a file or folder name announces, as in `train-00000-of-00002.parquet` or `alpaca.val.jsonl`; None for none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_CANONICAL[word] for word in words if word in _CANONICAL), None)
