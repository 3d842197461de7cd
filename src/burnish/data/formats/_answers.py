"""What the formats of compared and judged answers share: the prompt, however it is written, and the answer that comes after it.

A *side* is a text, or messages: a list of them, one alone, or either as JSON text. Their keys are `role` and `content`, or `from` and
`value`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from burnish.core.errors import FormatError, RowError
from burnish.data.formats import alpaca
from burnish.data.formats.base import Fields, as_text, is_list, is_object
from burnish.data.formats.messages import is_blank, read_messages, whole
from burnish.data.types import Conversation, Message

Side = str | tuple[Message, ...]

INNER = ("role", "content", "from", "value", "train")
"""Keys of messages that `data.columns` can map."""

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def may_be_side(value: object) -> bool:
    """Whether a value can be a side, or is missing (for detection: raises nothing)."""
    return value is None or isinstance(value, str) or is_object(value) or (is_list(value) and all(is_object(entry) for entry in value))


def read_side(fields: Fields, name: str, value: object) -> Side:
    """A text as it stands, or messages.

    Raises:
        RowError: it is neither, or a message is malformed.
    """
    if isinstance(value, str):
        value = _unfolded(fields, value)
    if is_object(value):
        value = [value]
    if not is_list(value):
        return as_text(value, fields.where(name))
    role, content = _keys(fields, value[0] if value else None)
    return read_messages(fields, name, value, role_key=role, content_key=content)


def read_prompt(fields: Fields) -> Side | None:
    """What the row has for a prompt; None where it is only in front of the answers.

    `instruction` (with `input` and `history`) is a user turn, as in alpaca. So is a text beside which the row has a `system` column.

    Raises:
        RowError: it is malformed.
    """
    columns = fields.binding.columns
    if "instruction" in columns:
        return alpaca.asked(fields)
    value = fields.get("prompt") if "prompt" in columns else None
    if value is None:
        return None
    prompt = read_side(fields, "prompt", value)
    return (Message("user", prompt),) if isinstance(prompt, str) and "system" in columns else prompt


def joined(fields: Fields, name: str, prompt: Side | None, answer: Side) -> tuple[tuple[Message, ...], int | None]:
    """(the whole conversation, the length of its prompt; None where that is to be found from what is compared).

    An answer that repeats the prompt, or the end of it, is a whole conversation: the prompt is not put in twice.

    Raises:
        RowError: the answer does not end with an assistant turn, or it begins with another question than the prompt's.
    """
    before = (Message("user", prompt),) if isinstance(prompt, str) else prompt or ()
    after = (Message("assistant", answer),) if isinstance(answer, str) else answer
    if after[-1].role != "assistant":
        raise RowError(f"the answer ends with a {after[-1].role} message, expected an assistant turn", where=fields.where(name))
    if not before:
        return after, None
    if repeated := _overlap(before, after):
        return before[: len(before) - repeated] + after, None
    if before[-1].role == "assistant":
        if 1 < len(before) <= len(after) and all(map(_same, before[:-1], after)):  # the prompt has one of the answers in it
            return after, None
        if after[0].role == "assistant":
            raise RowError("the prompt ends with an assistant turn, so nothing is left to answer", where=fields.where("prompt"))
        return before + after, len(before)
    if after[0].role == "assistant":
        return before + after, len(before)
    if before[-1].role in ("system", "developer"):
        return before + after, None
    if isinstance(prompt, str) and any(_asks(message, prompt.strip()) for message in after):
        return after, None
    raise RowError(f"the answer begins with a {after[0].role} message, but nothing in it repeats the prompt", where=fields.where(name))


def answered(fields: Fields, messages: Sequence[Message], prompt: int) -> Conversation:
    """The conversation, of which the first `prompt` messages are not trained.

    Raises:
        RowError: the order of turns makes no sense, or the tools are malformed.
    """
    item = whole(fields, messages)
    prompt += len(item.messages) - len(messages)  # a system prompt came in front
    masked = (replace(message, train=False) for message in item.messages[:prompt])
    return Conversation((*masked, *item.messages[prompt:]), item.tools)


def says_nothing(messages: Sequence[Message]) -> bool:
    """Whether every assistant turn is blank."""
    return all(is_blank(message) for message in messages if message.role == "assistant")


def is_transcript(text: str) -> bool:
    r"""Whether a text is a dialogue as in HH: it begins with `Human:`, and `\n\nAssistant:` follows."""
    first = _TURN.match(text)
    return first is not None and first[1] == "Human" and "\n\nAssistant:" in text


def read_transcript(text: str) -> tuple[Message, ...]:
    r"""The turns of a dialogue that is divided by `\n\nHuman:` and `\n\nAssistant:`, without the space around them."""
    parts = _TURN.split(text)[1:]
    return tuple(
        Message("user" if name == "Human" else "assistant", said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)
    )


def refuse_system(fields: Fields) -> None:
    """Plain texts have no place for a system prompt.

    Raises:
        FormatError: the run file gives one, or the row has a column for it.
    """
    if not (fields.binding.system or "system" in fields.binding.columns):
        return
    prompt = fields.binding.columns.get("prompt")
    mapped = (
        f", or write 'columns: {{instruction: {prompt}}}' beside the data set's path to have them put into the chat template"
        if prompt
        else ""
    )
    raise FormatError(
        "a system prompt needs a conversation, but the answers are plain texts here",
        where=fields.where("system"),
        hint=f"Give the answers as lists of messages{mapped}.",
    )


def _unfolded(fields: Fields, text: str) -> object:
    """The messages that a text holds as JSON, as CSV cells do; else the text."""
    if not re.match(r"\s*[\[{]", text):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    entries = value if is_list(value) else [value]
    if not entries or not is_object(entries[0]):
        return text
    role, _ = _keys(fields, entries[0])
    return value if fields.column(role) in entries[0] else text


def _keys(fields: Fields, entry: object) -> tuple[str, str]:
    mapped = fields.binding.columns
    if "role" in mapped or "from" in mapped:
        return ("role", "content") if "role" in mapped else ("from", "value")
    return ("from", "value") if is_object(entry) and "from" in entry and "role" not in entry else ("role", "content")


def _overlap(before: Sequence[Message], after: Sequence[Message]) -> int:
    """How many messages at the end of the first are also in front of the second."""
    most = min(len(before), len(after) - 1)
    return next((n for n in range(most, 0, -1) if all(map(_same, before[-n:], after[:n]))), 0)


def _same(one: Message, other: Message) -> bool:
    return (one.role, one.content.strip(), one.tool_calls) == (other.role, other.content.strip(), other.tool_calls)


def _asks(message: Message, prompt: str) -> bool:
    """Whether a user turn has the prompt in it, or is the end of it (a system prompt may stand before it in the same text)."""
    said = message.content.strip()
    return message.role == "user" and bool(said) and bool(prompt) and (prompt in said or prompt.endswith(said))
