"""The bar that is shown while rows are prepared."""

# pyarrow has no type stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from statistics import fmean

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from burnish.data.sources import FileSplit, RowSource
from burnish.data.sources.file import File
from burnish.data.sources.row import Row

_PLAIN = (".json", ".jsonl", ".csv", ".tsv")


class _Rate(ProgressColumn):
    """Rows, or what else is counted, a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The rate, or nothing at the very beginning."""
        return Text(f"{task.speed:,.0f} {self._unit}/s" if task.speed else "")


def bar(console: Console, *, shown: bool, unit: str = "rows") -> Progress:
    """Rows (or another unit) done, how many a second and the time left, on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not shown or not console.is_terminal,
    )


def expected_rows(sources: Sequence[RowSource], samples: Iterable[Sequence[Row]]) -> int | None:
    """About how many rows the sources have, for the time left: from the sizes of the files and of their first rows; None if unknown."""
    estimates = [_expected(source, sample) for source, sample in zip(sources, samples, strict=True)]
    known = [estimate for estimate in estimates if estimate is not None]
    return sum(known) if len(known) == len(estimates) else None


def _expected(source: RowSource, sample: Sequence[Row]) -> int | None:
    limit = source.config.limit
    files = _files(source)
    if not sample or not files:
        return limit
    row_size = fmean(len(json.dumps(dict(row.fields), ensure_ascii=False, default=str)) + 1 for row in sample)
    counts = [_rows_in(file.path, row_size) for file in files]
    if None in counts:
        return limit
    total = round(sum(count for count in counts if count is not None))
    return min(total, limit or total)


def _files(source: RowSource) -> list[File]:
    """The local files that are read whole; none where a split slices them."""
    if any(part.start or part.stop for part in source.slices):
        return []
    splits = [source.splits[str(part.name)] for part in source.slices]
    files = [file for split in splits if isinstance(split, FileSplit) for file in split.files]
    return files if all(os.path.isfile(file.path) for file in files) else []


def _rows_in(path: str, row_size: float) -> float | None:
    if path.endswith(".parquet"):
        return float(pq.read_metadata(path).num_rows)
    return os.path.getsize(path) / row_size if path.endswith(_PLAIN) else None
