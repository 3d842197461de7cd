"""What the tests of sources share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from burnish.core.errors import SourceError
from burnish.data.sources import Row

Read = Callable[..., list[Row]]
"""`read(path, data, **settings of the source)`: writes the file into an empty working directory and reads it."""


def fields(rows: list[Row]) -> list[dict[str, Any]]:
    assert all(row.fault is None for row in rows)
    return [dict(row.fields) for row in rows]


def places(rows: list[Row]) -> list[tuple[int, int | None]]:
    return [(row.number, row.line) for row in rows]


def refusal(read: Read, *args: Any, **settings: Any) -> str:
    """The message that a source is refused with."""
    with pytest.raises(SourceError) as caught:
        read(*args, **settings)
    return str(caught.value)
