"""Alpaca: `{"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["question", "answer"], ...]}`.

Instruction and input are one user turn, with a line break between them; the output is the assistant's. `history` holds earlier turns.
"""

from __future__ import annotations

from collections.abc import Iterator

from burnish.core.errors import RowError
from burnish.data.formats.base import Fields, Shape, as_list, as_text
from burnish.data.formats.messages import conversation
from burnish.data.types import Conversation, Message

SHAPE = Shape(required=("instruction", "output"), optional=("input", "system", "history"))


def looks_like(fields: Fields) -> bool:
    """Whether instruction and output are texts (or missing values)."""
    return all(value is None or isinstance(value, str) for value in (fields.get("instruction"), fields.get("output")))


def convert(fields: Fields) -> Conversation | None:
    """The conversation of a row; None where the answer is blank.

    Raises:
        RowError: a field is missing or no text.
    """
    question = asked(fields)
    answer = fields.text("output")
    if not answer.strip():
        return None
    return conversation(fields, [*question, Message("assistant", answer)])


def asked(fields: Fields) -> tuple[Message, ...]:
    """The turns before the answer: the history, and the instruction with its input.

    Raises:
        RowError: a field is missing or no text.
    """
    parts = [fields.text("instruction"), fields.optional_text("input") or ""]
    return (*_history(fields), Message("user", "\n".join(part for part in parts if part.strip())))


def _history(fields: Fields) -> Iterator[Message]:
    value = fields.json("history")
    where = fields.where("history")
    for pair in as_list(value, where, "[question, answer] pairs") if value is not None else ():
        turns = as_list(pair, where, "a question and an answer")
        if len(turns) != 2:
            raise RowError(f"expected [question, answer] pairs, found a list of {len(turns)}", where=where)
        yield Message("user", as_text(turns[0], where))
        yield Message("assistant", as_text(turns[1], where))
