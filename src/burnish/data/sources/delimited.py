"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from burnish.core.errors import RowError, SourceError, Where
from burnish.data.sources import streams
from burnish.data.sources.file import File
from burnish.data.sources.row import Row

_DELIMITERS = ",;\t|"
_NAN = frozenset({"NaN", "nan"})
_LARGEST_CELL = 1 << 30


def read_delimited(file: File) -> Iterator[Row]:
    """The rows of a .csv or .tsv file, whose first line names the columns.

    A .csv file without a comma in its header may be separated by semicolons, tabs or bars. A cell that reads NaN is what pandas writes
    for a missing value, and becomes one (a float NaN), so that no model is trained to say "nan".

    Raises:
        SourceError: when the quoting is broken or the header is missing. A row with too many or too few cells carries its `fault`.
    """
    streams.check_head(file.head(64), file.shown)
    csv.field_size_limit(_LARGEST_CELL)  # a setting of the whole process; its default refuses documents over 128 KiB
    with file.open() as stream:
        texts = (streams.decode(raw, offset, Where(file.shown, line=line)) for line, offset, raw in streams.lines(stream))
        header = next(texts, "")
        if not header.strip():
            if next(texts, None) is None:
                return
            raise SourceError("expected the names of the columns, found an empty line", where=Where(file.shown, line=1))
        delimiter = "\t" if file.kind == "tsv" else _delimiter(header)
        yield from _rows(_chain(header, texts), delimiter, file.shown)


def _delimiter(header: str) -> str:
    return "," if "," in header else max(_DELIMITERS, key=header.count)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _rows(texts: Iterator[str], delimiter: str, shown: str) -> Iterator[Row]:
    records = _records(texts, delimiter, shown)
    names = _names(next(records)[1], shown)
    number = 0
    for line, cells in records:
        if not cells:
            continue
        number += 1
        row = Row(shown, number, {}, line)
        if len(cells) == len(names):
            row.fields = {name: float("nan") if cell in _NAN else cell for name, cell in zip(names, cells, strict=True)}
        else:
            row.fault = RowError(
                f"found {len(cells)} {'cell' if len(cells) == 1 else 'cells'}, expected {len(names)} ({', '.join(names)})",
                where=row.where(),
                hint="A cell that holds the separator, a quote or a line break must stand in double quotes.",
            )
        yield row


def _records(texts: Iterator[str], delimiter: str, shown: str) -> Iterator[tuple[int, list[str]]]:
    """(line where the record begins, its cells)."""
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        begun = reader.line_num + 1
        try:
            yield begun, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = (
                "a quote that is opened in this row is never closed"
                if "unexpected end of data" in str(error)
                else f"the row cannot be split into cells: {error}"
            )
            raise SourceError(message, where=Where(shown, line=begun)) from None


def _names(header: list[str], shown: str) -> list[str]:
    """The column names; a nameless column (such as the index that pandas writes) is called `column 1`, `column 2` ..."""
    names = [cell.strip() or f"column {position}" for position, cell in enumerate(header, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"the column '{twice[0]}' stands in the header more than once", where=Where(shown, line=1))
    return names
