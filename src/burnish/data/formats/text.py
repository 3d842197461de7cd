"""Plain text for continued pre-training: `{"text": "..."}` (or `content`). Every token is trained."""

from __future__ import annotations

from burnish.data.formats.base import Fields, Shape
from burnish.data.types import Text

SHAPE = Shape(required=("text",), spellings=({}, {"text": "content"}))


def looks_like(fields: Fields) -> bool:
    """Whether the text is a text (or a missing value)."""
    return isinstance(fields.get("text"), str | None)


def convert(fields: Fields) -> Text | None:
    """The text of a row; None where it is blank.

    Raises:
        RowError: it is missing or no text.
    """
    text = fields.text("text")
    return Text(text) if text.strip() else None
