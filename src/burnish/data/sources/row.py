"""One raw row with its place in the user's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from burnish.core.errors import RowError, Where


@dataclass(slots=True)
class Row:
    """A row as it stands in a file, before any format has looked at it.

    `number` counts the rows of its file from 1, and stays the same under split slices, limits and samples. `line` is where the row
    begins, in files that have lines. A row whose line alone is broken (JSON Lines, CSV) travels on with its `fault`, so that
    `data.malformed: skip` can count it; its `fields` are then empty.
    """

    file: str
    number: int
    fields: Mapping[str, Any]
    line: int | None = None
    fault: RowError | None = None

    def where(self, field: str | None = None) -> Where:
        """The place of this row, or of one of its fields, for a message."""
        return Where(self.file, line=self.line, row=self.number, field=field)
