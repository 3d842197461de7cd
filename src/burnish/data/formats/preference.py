r"""Preference pairs: two answers to one prompt, of which `chosen` is the better one.

    {"prompt": ..., "chosen": ..., "rejected": ...}            texts, messages, or lists of messages
    {"chosen": [...], "rejected": [...]}                       whole conversations: what they share in front is the prompt
    {"conversations": [...], "chosen": {...}, "rejected": {...}}
    {"instruction": ..., "input": ..., "chosen": ..., "rejected": ...}

The answers may be called `chosen_response` and `rejected_response` and the like, or stand in one list, better one first. Texts beside a
text prompt are taken as they stand, without a chat template, as in prompt_completion; beside an instruction or a system prompt, or as
messages, they are turns of a conversation. Of two conversations only what comes after their common turns is compared. Texts without a
prompt are transcripts (`\n\nHuman: ... \n\nAssistant: ...`), or share a beginning that is the prompt.

`margin` says by how much the chosen answer is better, `weight` how much the pair counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from burnish.core.errors import RowError
from burnish.data.formats.alpaca import turns_of_history
from burnish.data.formats.base import Fields, Shape, as_text, is_list, is_object, kind_of
from burnish.data.formats.messages import checked, has_system, is_blank, read_messages
from burnish.data.types import Answer, Completion, Conversation, Message, Pair

_ONE_LIST = "output"
_TEXT_PROMPTS = ("prompt", "question", "query", "input")
_PROMPTS = (*_TEXT_PROMPTS, "messages", "conversations", "instruction")
SHAPE = Shape(
    required=("chosen", "rejected"),
    optional=(*_PROMPTS, "history", "system", "tools", "margin", "weight"),
    spellings=(
        {},
        {"chosen": "chosen_response", "rejected": "rejected_response"},
        {"chosen": "response_chosen", "rejected": "response_rejected"},
        {"chosen": "chosen_answer", "rejected": "rejected_answer"},
        {"chosen": "answer_chosen", "rejected": "answer_rejected"},
        {"chosen": _ONE_LIST, "rejected": _ONE_LIST},
    ),
    inner=("role", "content", "from", "value", "train"),
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")

Side = str | tuple[Message, ...]


def looks_like(fields: Fields) -> bool:
    """Whether both answers are texts, messages or lists of messages (or missing values)."""
    if fields.column("chosen") == fields.column("rejected"):
        value = fields.get("chosen")
        return is_list(value) and len(value) == 2 and all(isinstance(one, str) for one in value)
    return all(_may_be_answer(fields.get(name)) for name in SHAPE.required)


def _may_be_answer(value: object) -> bool:
    return value is None or isinstance(value, str) or is_object(value) or (is_list(value) and all(is_object(one) for one in value))


def convert(fields: Fields) -> Pair | None:
    """The pair of a row; None where both answers are blank.

    Raises:
        RowError: a field is missing or malformed, or an answer does not end with an assistant turn.
    """
    chosen, rejected = _answers(fields)
    if _blank(chosen) and _blank(rejected):
        return None
    return Pair(*_sides(fields, chosen, rejected), margin=number(fields, "margin", 0.0), weight=number(fields, "weight", 1.0, least=0.0))


def _answers(fields: Fields) -> tuple[Side, Side]:
    if fields.column("chosen") != fields.column("rejected"):
        return _side(fields, "chosen"), _side(fields, "rejected")
    value, where = fields.get("chosen"), fields.where("chosen")
    if not is_list(value) or len(value) != 2:
        raise RowError(f"expected the better and the worse answer, found {kind_of(value)}", where=where)
    return as_text(value[0], where), as_text(value[1], where)


def _side(fields: Fields, name: str) -> Side:
    """A text, or messages in whichever of the two ways of writing them."""
    value = fields.get(name)
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = fields.json(name)
    if not (is_list(value) or is_object(value)):
        return fields.text(name)
    entries: Sequence[object] = [value] if is_object(value) else value if is_list(value) else ()
    first = entries[0] if entries else None
    sharegpt = is_object(first) and fields.column("role") not in first and fields.column("from") in first
    keys = {"role_key": "from", "content_key": "value"} if sharegpt else {}
    return read_messages(fields, name, entries, **keys)


def _sides(fields: Fields, chosen: Side, rejected: Side) -> tuple[Answer, Answer]:
    prompt = _prompt(fields)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str) and not has_system(fields):
            return Completion(prompt, chosen), Completion(prompt, rejected)
        if prompt is None:
            turns = _transcript(chosen), _transcript(rejected)
            if not all(turns):
                return _common_text(chosen, rejected)
            chosen, rejected = turns
    before = (Message("user", prompt),) if isinstance(prompt, str) else prompt or ()
    whole = [_after(before, _turns(side)) for side in (chosen, rejected)]
    shared = _shared_turns(*whole)
    return _conversation(fields, whole[0], shared, "chosen"), _conversation(fields, whole[1], shared, "rejected")


def _prompt(fields: Fields) -> Side | None:
    """What is asked: a text that is taken as it stands, or turns."""
    for name in ("messages", "conversations"):
        if fields.get(name) is not None:
            return _side(fields, name)
    if fields.get("instruction") is not None:
        asked = [fields.text("instruction"), fields.optional_text("input") or ""]
        return (*turns_of_history(fields), Message("user", "\n".join(part for part in asked if part.strip())))
    for name in _TEXT_PROMPTS:
        if fields.get(name) is not None:
            return _side(fields, name)
    return None


def _turns(side: Side) -> tuple[Message, ...]:
    return (Message("assistant", side),) if isinstance(side, str) else side


def _after(before: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """Prompt and answer as one conversation; an answer that begins with the prompt is one already."""
    spoken = [message for message in before if message.role not in ("system", "developer")]
    opening = [message for message in answer if message.role not in ("system", "developer")][: len(spoken)]
    if spoken and len(answer) > len(opening) and [_said(message) for message in opening] == [_said(message) for message in spoken]:
        return answer if answer[0].role in ("system", "developer") else (*before[: len(before) - len(spoken)], *answer)
    return (*before, *answer)


def _said(message: Message) -> Message:
    return replace(message, content=message.content.strip(), train=None)


def _shared_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many turns both begin with; the last assistant turn of each belongs to its answer."""
    most = min(_last_answer(chosen), _last_answer(rejected))
    return next((turn for turn in range(most) if replace(chosen[turn], train=None) != replace(rejected[turn], train=None)), most)


def _last_answer(messages: Sequence[Message]) -> int:
    return max((number for number, message in enumerate(messages) if message.role == "assistant"), default=len(messages))


def _conversation(fields: Fields, messages: Sequence[Message], shared: int, name: str) -> Conversation:
    if messages[-1].role != "assistant":
        raise RowError(f"the answer ends with a {messages[-1].role} message, expected an assistant turn", where=fields.where(name))
    return checked(fields, [replace(message, train=False) if turn < shared else message for turn, message in enumerate(messages)])


def _transcript(text: str) -> tuple[Message, ...]:
    r"""The turns of a text like `\n\nHuman: ...\n\nAssistant: ...`; none where it is no such text."""
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip() or not any(mark[1] == "Assistant" for mark in marks):
        return ()
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    spoken = [(mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    return tuple(Message("user" if who == "Human" else "assistant", said) for who, said in spoken)


def _common_text(chosen: str, rejected: str) -> tuple[Completion, Completion]:
    """What two texts share in front, up to a space, is the prompt; the space begins the answers."""
    most = min(len(chosen), len(rejected))
    differs = next((place for place in range(most) if chosen[place] != rejected[place]), most)
    cut = max(chosen.rfind(space, 0, differs + 1) for space in " \n")
    cut = max(cut, 0)
    return Completion(chosen[:cut], chosen[cut:]), Completion(rejected[:cut], rejected[cut:])


def _blank(side: Side) -> bool:
    return not side.strip() if isinstance(side, str) else all(is_blank(message) for message in side if message.role == "assistant")


def number(fields: Fields, name: str, default: float, *, least: float = -math.inf) -> float:
    """A finite number, or the default where the row has none.

    Raises:
        RowError: it is something else, or too small.
    """
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        expected = "a number" if least == -math.inf else f"a number of {least:g} or more"
        raise RowError(f"expected {expected}, found {kind_of(value)}", where=fields.where(name))
    return float(value)
