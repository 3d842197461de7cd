"""What the tests of formats share."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.config.sections import Source
from burnish.core.errors import RowError
from burnish.data.formats import choose
from burnish.data.sources.row import Row
from burnish.data.types import BatchKind, Conversation, Item, Message

KINDS: dict[str, BatchKind] = {"preference": "pairs", "judged": "judged", "stepwise": "steps"}
"""What the objectives learn from that the formats of compared answers are for; the others are for `tokens`."""


def row(fields: dict[str, Any], number: int = 1) -> Row:
    return Row("rows.jsonl", number, fields, number)


def convert(fields: dict[str, Any], format: str, **settings: Any) -> Item | None:
    """The row by the format that is named, through the door that users take."""
    source = Source(path="rows.jsonl", format=format, **settings)
    return choose(source, [row(fields)], kind=KINDS.get(format, "tokens")).convert(row(fields))


def conversation(fields: dict[str, Any], format: str, **settings: Any) -> tuple[Message, ...]:
    item = convert(fields, format, **settings)
    assert isinstance(item, Conversation)
    return item.messages


def malformed(fields: dict[str, Any], format: str, **settings: Any) -> str:
    """The message about a row that is the fourth of its file."""
    chosen = choose(Source(path="rows.jsonl", format=format, **settings), [row(fields, 4)], kind=KINDS.get(format, "tokens"))
    with pytest.raises(RowError) as caught:
        chosen.convert(row(fields, 4))
    text = str(caught.value)
    assert text.startswith("rows.jsonl:4, row 4")
    return text.removeprefix("rows.jsonl:4, row 4").removeprefix(", ").removeprefix(": ")
