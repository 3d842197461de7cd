"""Answers that are judged good or bad, each by itself: `{"prompt": ..., "completion": ..., "label": true}`.

The answer is a text, messages, or a whole conversation (`messages`, `conversations`), of which the turns after the last user turn are
judged. It may also be called response, answer or output; the prompt question or query, or instruction with input and history, as in alpaca.
Text beside text is trained as it stands, without a chat template, unless the row has an instruction or a `system` column.

The label (or `kto_tag`) is true or false, 1 or 0, or one of the words good and bad, desirable and undesirable, chosen and rejected.
"""

from __future__ import annotations

from burnish.core.errors import RowError
from burnish.data.formats._answers import (
    INNER,
    answered,
    is_transcript,
    joined,
    may_be_side,
    read_prompt,
    read_side,
    read_transcript,
    refuse_system,
    says_nothing,
)
from burnish.data.formats.base import Fields, Shape, kind_of
from burnish.data.types import Answer, Completion, Judged

_ANSWERS = ("completion", "response", "answer", "output", "messages", "conversations", "conversation")
SHAPE = Shape(
    required=("completion", "label"),
    optional=("prompt", "instruction", "input", "history", "system", "tools", "weight"),
    spellings=tuple({"completion": answer, "label": label} for answer in _ANSWERS for label in ("label", "kto_tag")),
    inner=INNER,
    aliases={"prompt": ("question", "query", "input")},
    rivals=("prompt", "instruction"),
    needs={"input": "instruction", "history": "instruction"},
)

_WORDS = {
    **dict.fromkeys(("true", "1", "good", "desirable", "chosen"), True),
    **dict.fromkeys(("false", "0", "bad", "undesirable", "rejected"), False),
}


def looks_like(fields: Fields) -> bool:
    """Whether there is an answer with a prompt beside the label; what the label says is for `convert` to judge, with its place."""
    answer = fields.get("completion")
    if not may_be_side(answer):
        return False
    has_prompt = any(name in fields.binding.columns for name in ("prompt", "instruction"))
    return has_prompt or not isinstance(answer, str) or is_transcript(answer) or answer.lstrip().startswith("[")


def convert(fields: Fields) -> Judged | None:
    """The judged answer of a row; None where it is blank.

    Raises:
        RowError: a field is missing, the label unclear, a message malformed, or the answer does not end with an assistant turn.
        FormatError: there is a system prompt for plain texts.
    """
    answer = _answer(fields)
    return None if answer is None else Judged(answer, _label(fields), fields.number("weight", 1.0, least=0.0))


def _answer(fields: Fields) -> Answer | None:
    value = fields.get("completion")
    side = read_side(fields, "completion", fields.text("completion") if value is None else value)
    prompt = read_prompt(fields)
    if isinstance(side, str) and prompt is None:
        if not is_transcript(side):
            raise RowError("the answer has no prompt", where=fields.where("completion"))
        side = read_transcript(side)
    if isinstance(side, str) and isinstance(prompt, str):
        if not side.strip():
            return None
        refuse_system(fields)
        return Completion(prompt, side)
    messages, length = joined(fields, "completion", prompt, side)
    if length is None:
        length = max((i for i, message in enumerate(messages, start=1) if message.role == "user"), default=0)
    return None if says_nothing(messages[length:]) else answered(fields, messages, length)


def _label(fields: Fields) -> bool:
    truth = _truth(fields.get("label"))
    if truth is None:
        found = kind_of(fields.row.fields.get(fields.column("label")))
        raise RowError(f"expected true or false, 1 or 0, or good or bad, found {found}", where=fields.where("label"))
    return truth


def _truth(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
