"""OpenAI messages (also called ChatML): `{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}`.

A message may have: `role`; `content` (text, null beside tool calls, or a list of text parts); `reasoning_content` (or `reasoning`,
`thinking`); `tool_calls` (arguments as an object or as JSON text); `tool_call_id`, `name`; `train` (true, false) or `weight` (a number).
The list itself may be JSON text. ShareGPT, Alpaca and prompt-completion rows become conversations through the functions here.

Which conversations are refused: an empty one; one without an assistant turn; a system message after the first turn; a tool result that
follows no assistant turn or names a call that was not made. Any other order of turns is left to the chat template, since models differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from burnish.core.errors import RowError, Where, did_you_mean
from burnish.data.formats.base import Fields, Shape, as_list, as_object, as_text, from_json, is_list, is_object, kind_of, listed
from burnish.data.types import Conversation, Message, Role, ToolCall

SHAPE = Shape(
    required=("messages",),
    optional=("system", "tools"),
    spellings=({}, {"messages": "conversations"}, {"messages": "conversation"}),
    inner=("role", "content", "train"),
)

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})
"""Roles of turns whose text is a call: `{"name": ..., "arguments": {...}}` as JSON, or a list of them."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_REASONING_PARTS = frozenset({"thinking", "reasoning"})


def looks_like(fields: Fields) -> bool:
    """Whether the row is a list of messages with roles."""
    return is_list_of(fields, "messages", fields.column("role"))


def convert(fields: Fields) -> Conversation | None:
    """The conversation of a row; None where all of it, or every assistant turn, is blank.

    Raises:
        RowError: the conversation is malformed.
    """
    return conversation(fields, read_messages(fields, "messages", fields.json("messages")))


def is_list_of(fields: Fields, name: str, key: str) -> bool:
    """Whether a field holds a list of objects, the first of which has this key (for detection: raises nothing)."""
    value = fields.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return is_list(value) and bool(value) and is_object(value[0]) and key in value[0]


def read_messages(fields: Fields, name: str, value: object, *, role_key: str = "role", content_key: str = "content") -> tuple[Message, ...]:
    """The messages of one field.

    Raises:
        RowError: a message is malformed; the place is like `messages[2].content`.
    """
    where = fields.where(name)
    if value is None:
        raise RowError(f"expected a list of messages, found {kind_of(fields.row.fields.get(fields.column(name)))}", where=where)
    entries = as_list(value, where, "messages")
    if not entries:
        raise RowError("the conversation is empty", where=where)
    reader = _Reader(fields, fields.column(role_key), fields.column(content_key))
    return tuple(reader.message(entry, _at(where, f"[{i}]")) for i, entry in enumerate(entries))


def conversation(fields: Fields, messages: Sequence[Message]) -> Conversation | None:
    """Messages with the row's system prompt and tools, checked; None where all of it, or every assistant turn, is blank.

    Raises:
        RowError: the order of turns makes no sense, or the tools are malformed.
    """
    if all(is_blank(message) for message in messages if message.role not in ("system", "developer")):
        return None
    _check_order(messages, fields.row.where())
    if all(is_blank(message) for message in messages if message.role == "assistant"):
        return None
    return Conversation(tuple(_with_system(fields, messages)), _tools(fields))


def whole(fields: Fields, messages: Sequence[Message]) -> Conversation:
    """Messages with the row's system prompt and tools, checked; blank ones too.

    Raises:
        RowError: the order of turns makes no sense, or the tools are malformed.
    """
    _check_order(messages, fields.row.where())
    return Conversation(tuple(_with_system(fields, messages)), _tools(fields))


def is_blank(message: Message) -> bool:
    """Whether a message says nothing: no text, no reasoning and no call."""
    return not (message.content.strip() or message.tool_calls or (message.reasoning or "").strip())


def read_calls(value: object, where: Where) -> tuple[ToolCall, ...]:
    """Tool calls: a list, one alone, or JSON text of either.

    Raises:
        RowError: a call has no name, or its arguments are no JSON object.
    """
    if isinstance(value, str):
        value = from_json(value, where)
    calls = value if is_list(value) else [value]
    return tuple(_call(call, where) for call in calls)


def _call(value: object, where: Where) -> ToolCall:
    outer = as_object(value, where, 'a call like {"name": ..., "arguments": {...}}')
    function = outer.get("function")
    inner = as_object(function, _at(where, ".function"), "an object") if function is not None else outer
    if inner.get("name") is None:
        raise RowError("the call has no 'name'", where=where)
    name = as_text(inner["name"], _at(where, ".name"))
    call_id = outer.get("id")
    return ToolCall(name, _arguments(inner.get("arguments"), where), None if call_id is None else str(call_id))


def _arguments(value: object, where: Where) -> Mapping[str, Any]:
    where = _at(where, ".arguments")
    if isinstance(value, str):
        value = from_json(value, where) if value.strip() else None
    return {} if value is None else as_object(value, where, "the arguments as an object or its JSON text")


class _Reader:
    """Reads the messages of one row."""

    def __init__(self, fields: Fields, role_key: str, content_key: str) -> None:
        self._roles = fields.binding.roles
        self._role_key = role_key
        self._content_key = content_key
        self._train_key = fields.column("train")

    def message(self, entry: object, where: Where) -> Message:
        """One message."""
        entry = as_object(entry, where, f"a message with '{self._role_key}' and '{self._content_key}'")
        named = self._named_role(entry, where)
        is_call = named.lower() in CALL_ROLES and named not in self._roles
        role = "assistant" if is_call else self._role(named, _at(where, f".{self._role_key}"))
        at_content = _at(where, f".{self._content_key}")
        content, reasoning = _content(entry.get(self._content_key), role, at_content)
        reasoning = _reasoning(entry, reasoning, role, where)
        calls = read_calls(content, at_content) if is_call and content else _calls(entry, role, where)
        if content is None and not calls and not reasoning:
            raise RowError(f"the message has no {self._content_key}", where=at_content)
        return Message(
            role=role,
            content="" if is_call else content or "",
            reasoning=reasoning,
            tool_calls=calls,
            tool_call_id=_label(entry.get("tool_call_id"), _at(where, ".tool_call_id")),
            name=_label(entry.get("name"), _at(where, ".name")),
            train=_train(entry, self._train_key, where),
        )

    def _named_role(self, entry: Mapping[str, Any], where: Where) -> str:
        named = entry.get(self._role_key)
        if named is None:
            keys = ", ".join(f"'{key}'" for key in entry)
            raise RowError(f"the message has no '{self._role_key}', only {keys or 'nothing'}", where=where)
        return as_text(named, _at(where, f".{self._role_key}"))

    def _role(self, named: str, where: Where) -> Role:
        role = self._roles.get(named) or ROLES.get(named.strip().lower())
        if role is None:
            raise RowError(
                f"unknown role '{named}': {did_you_mean(named, [*self._roles, *ROLES])}",
                where=where,
                hint=f"If it is meant, say what it stands for: 'roles: {{{named}: assistant}}' beside the data set's path.",
            )
        return role


def _content(value: object, role: Role, where: Where) -> tuple[str | None, str | None]:
    """(text, reasoning) of a content field."""
    if value is None:
        return None, None
    if is_list(value):
        if role == "tool" and not all(is_object(part) and "type" in part for part in value):
            return json.dumps(value, ensure_ascii=False), None  # a tool's result, not parts of a message
        return _parts(value, where)
    if is_object(value) and role == "tool":
        return json.dumps(value, ensure_ascii=False), None
    return as_text(value, where), None


def _parts(parts: Sequence[object], where: Where) -> tuple[str, str | None]:
    texts: list[str] = []
    reasoning: list[str] = []
    for i, part in enumerate(parts):
        at = _at(where, f"[{i}]")
        if isinstance(part, str):
            texts.append(as_text(part, at))
            continue
        part = as_object(part, at, 'a part like {"type": "text", "text": ...}')
        kind = part.get("type", "text")
        if kind in _REASONING_PARTS:
            reasoning.append(as_text(part.get(kind, part.get("text")), at))
        elif kind in _TEXT_PARTS:
            _refuse_part_flags(part, at)
            texts.append(as_text(part.get("text"), _at(at, ".text")))
        else:
            raise RowError(f"the message holds a part of type '{kind}', but only text can be trained on", where=at)
    return "".join(texts), "".join(reasoning) or None


def _refuse_part_flags(part: Mapping[str, Any], where: Where) -> None:
    for key in ("train", "weight"):
        if part.get(key) is not None:
            raise RowError(f"'{key}' on a part of a message is not supported, only on the whole message", where=where)


def _reasoning(entry: Mapping[str, Any], from_parts: str | None, role: Role, where: Where) -> str | None:
    given = {key: entry[key] for key in _REASONING if entry.get(key) is not None}
    texts = [as_text(value, _at(where, f".{key}")) for key, value in given.items()]
    texts = list(dict.fromkeys(text for text in [from_parts, *texts] if text))
    if not texts:
        return None
    if len(texts) > 1:
        raise RowError(f"the message has two different reasonings ({', '.join(given)})", where=where)
    if role != "assistant":
        raise RowError(f"a {role} message has reasoning, which only the assistant can have", where=where)
    return texts[0]


def _calls(entry: Mapping[str, Any], role: Role, where: Where) -> tuple[ToolCall, ...]:
    for key in ("tool_calls", "function_call"):  # the second is OpenAI's older name
        value = entry.get(key)
        if not value:
            continue
        if role != "assistant":
            raise RowError(f"a {role} message makes tool calls, which only the assistant can", where=_at(where, f".{key}"))
        return read_calls(value, _at(where, f".{key}"))
    return ()


def _label(value: object, where: Where) -> str | None:
    return None if value is None else as_text(value, where)


def _train(entry: Mapping[str, Any], key: str, where: Where) -> bool | float | None:
    train, weight = entry.get(key), entry.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"expected true or false, found {kind_of(train)}", where=_at(where, f".{key}"))
    if weight is None or train is False:
        return train
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise RowError(f"expected a weight of 0 or more, found {kind_of(weight)}", where=_at(where, ".weight"))
    return float(weight)


def _with_system(fields: Fields, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, with the system prompt of the row, or else of the run file, where they bring none."""
    of_row = fields.optional_text("system")
    own = next((message for message in messages if message.role in ("system", "developer")), None)
    if own is not None:
        if of_row and of_row.strip() and of_row != own.content:
            raise RowError("the row's system prompt differs from the one in its messages", where=fields.where("system"))
        return messages
    system = of_row if of_row and of_row.strip() else fields.binding.system
    return [Message("system", system), *messages] if system else messages


def _check_order(messages: Sequence[Message], where: Where) -> None:
    began = False
    previous: Role | None = None
    calls: set[str] = set()
    for i, message in enumerate(messages, start=1):
        if message.role in ("system", "developer"):
            if began:
                raise RowError(f"message {i} is a {message.role} message, which may only come first", where=where)
            continue
        if message.role == "tool":
            _check_result(message, i, previous, calls, where)
        calls |= {call.id for call in message.tool_calls if call.id}
        began, previous = True, message.role
    if not any(message.role == "assistant" for message in messages):
        raise RowError("the conversation has no assistant turn, so there is nothing to learn from it", where=where)


def _check_result(message: Message, number: int, previous: Role | None, calls: set[str], where: Where) -> None:
    if previous not in ("assistant", "tool"):
        after = f"follows a {previous} message" if previous else "comes first"
        raise RowError(f"message {number} is a tool result, but {after} instead of an assistant turn", where=where)
    if message.tool_call_id is not None and calls and message.tool_call_id not in calls:
        raise RowError(
            f"message {number} answers the call '{message.tool_call_id}', which was not made; made were {listed(sorted(calls))}",
            where=where,
        )


def _tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    value = fields.json("tools")
    if not value:
        return ()
    where = fields.where("tools")
    tools = value if is_list(value) else [value]
    read = (from_json(tool, where) if isinstance(tool, str) else tool for tool in tools)
    return tuple(as_object(tool, where, "a tool's JSON schema") for tool in read)


def _at(where: Where, below: str) -> Where:
    return replace(where, field=f"{where.field or ''}{below}")
