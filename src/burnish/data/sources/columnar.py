"""Rows of Parquet and Arrow files.

In these files a nested object has every key that any row has, and null where the row has none. So a null inside a nested value means
that the key is absent, and it is left out: otherwise the arguments of one tool call would show up, as null, in all others.
"""

# pyarrow has no type stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from burnish.core.errors import SourceError, Where
from burnish.data.sources.file import File
from burnish.data.sources.row import Row

_ROWS = 512  # decoded to Python objects at once
_MAGIC = {"parquet": b"PAR1", "arrow": b"ARROW1"}


def read_columnar(file: File) -> Iterator[Row]:
    """The rows of a .parquet, .arrow or .feather file (Arrow's file and stream formats).

    Raises:
        SourceError: when the file is damaged, empty or of another kind.
    """
    if not file.head(1):
        return
    number = 0
    with file.open() as stream:
        try:
            for batch in _batches(stream, file):
                for start in range(0, batch.num_rows, _ROWS):
                    for fields in _decoded(batch.slice(start, _ROWS), number, file.shown):
                        number += 1
                        yield Row(file.shown, number, fields)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0].rstrip(". ")
            raise SourceError(f"this is no whole {file.kind.title()} file: {reason}", where=Where(file.shown)) from None


def _batches(stream: Any, file: File) -> Iterator[Any]:
    if file.kind == "parquet":
        yield from pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_ROWS)
    elif file.head(6) == _MAGIC["arrow"]:
        reader = pyarrow.ipc.open_file(stream)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(stream)


def _decoded(batch: Any, before: int, shown: str) -> list[dict[str, Any]]:
    try:
        rows = cast("list[dict[str, Any]]", batch.to_pylist())
    except UnicodeDecodeError:
        return [_decoded_alone(batch.slice(i, 1), Where(shown, row=before + i + 1)) for i in range(batch.num_rows)]
    return [{name: pruned(value) for name, value in row.items()} for row in rows]


def _decoded_alone(batch: Any, where: Where) -> dict[str, Any]:
    try:
        return {name: pruned(value) for name, value in batch.to_pylist()[0].items()}
    except UnicodeDecodeError as error:
        raise SourceError(f"a text is not UTF-8: byte 0x{error.object[error.start]:02x}", where=where) from None


def pruned(value: Any) -> Any:
    """A cell without the nulls inside nested objects, which stand for absent keys."""
    if isinstance(value, dict):
        return {key: pruned(inner) for key, inner in cast("dict[str, Any]", value).items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [pruned(inner) for inner in cast("list[Any]", value)]
    return value
