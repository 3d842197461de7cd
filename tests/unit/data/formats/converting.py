"""What the tests of formats share."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.config.sections import Source
from burnish.core.errors import RowError
from burnish.data.formats import choose
from burnish.data.sources.row import Row
from burnish.data.types import Conversation, Item, Message


def row(fields: dict[str, Any], number: int = 1) -> Row:
    return Row("rows.jsonl", number, fields, number)


def convert(fields: dict[str, Any], format: str, **settings: Any) -> Item | None:
    """The row by the format that is named, through the door that users take."""
    return choose(Source(path="rows.jsonl", format=format, **settings), [row(fields)]).convert(row(fields))


def conversation(fields: dict[str, Any], format: str, **settings: Any) -> tuple[Message, ...]:
    item = convert(fields, format, **settings)
    assert isinstance(item, Conversation)
    return item.messages


def malformed(fields: dict[str, Any], format: str, **settings: Any) -> str:
    """The message about a row that is the fourth of its file."""
    chosen = choose(Source(path="rows.jsonl", format=format, **settings), [row(fields, 4)])
    with pytest.raises(RowError) as caught:
        chosen.convert(row(fields, 4))
    text = str(caught.value)
    assert text.startswith("rows.jsonl:4, row 4")
    return text.removeprefix("rows.jsonl:4, row 4").removeprefix(", ").removeprefix(": ")
