"""Prompt and completion: `{"prompt": ..., "completion": ...}`; also instruction/response, question/answer, query/response and the like.

Two texts are trained as they stand: no chat template, the completion follows the prompt without anything between them. Two lists of
messages are a conversation whose completion is trained and whose prompt is not. A text beside a list stands for one user turn (prompt) or
one assistant turn (completion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from burnish.core.errors import FormatError, RowError
from burnish.data.formats.base import Fields, Shape, as_text, is_list, is_object
from burnish.data.formats.messages import conversation, read_messages
from burnish.data.types import Completion, Conversation, Message

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
)
SHAPE = Shape(
    required=("prompt", "completion"),
    optional=("system", "tools"),
    spellings=tuple({"prompt": prompt, "completion": completion} for prompt, completion in _PAIRS),
    inner=("role", "content", "train"),
)


def looks_like(fields: Fields) -> bool:
    """Whether both are texts or lists of messages (or missing values); an alpaca row with `input` and `output` is none of these."""
    if fields.column("prompt") == "input" and "instruction" in fields.row.fields:
        return False
    return all(_may_be_side(fields.get(name)) for name in SHAPE.required)


def _may_be_side(value: object) -> bool:
    return value is None or isinstance(value, str) or (is_list(value) and all(is_object(entry) for entry in value))


def convert(fields: Fields) -> Completion | Conversation | None:
    """The pair of a row; None where the completion is blank.

    Raises:
        RowError: a field is missing, or a message malformed.
        FormatError: the run file gives a system prompt for pairs of texts.
    """
    prompt, completion = (_side(fields, name) for name in SHAPE.required)
    if isinstance(prompt, str) and isinstance(completion, str):
        return _texts(fields, prompt, completion)
    before = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    after = [Message("assistant", completion)] if isinstance(completion, str) else completion
    if not any(message.role == "assistant" for message in after):
        raise RowError("the completion has no assistant turn", where=fields.where("completion"))
    masked = [replace(message, train=False) for message in before]
    trained = [replace(message, train=True) if message.train is None and message.role == "assistant" else message for message in after]
    if not any(message.content.strip() or message.tool_calls or message.reasoning for message in trained):
        return None
    return conversation(fields, [*masked, *trained])


def _side(fields: Fields, name: str) -> str | Sequence[Message]:
    value = fields.get(name)
    if is_list(value) or is_object(value):
        return read_messages(fields, name, [value] if is_object(value) else value)
    return fields.text(name)


def _texts(fields: Fields, prompt: str, completion: str) -> Completion | None:
    system = fields.optional_text("system")
    if fields.binding.system or (system and system.strip()):
        raise FormatError(
            "a system prompt needs a conversation, but prompt and completion are plain texts here",
            where=fields.where("system"),
            hint="Give prompt and completion as lists of messages, or map the columns to alpaca: "
            f"'format: alpaca' with 'columns: {{instruction: {fields.column('prompt')}, output: {fields.column('completion')}}}'.",
        )
    return Completion(prompt, as_text(completion, fields.where("completion"))) if completion.strip() else None
