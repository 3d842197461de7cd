from __future__ import annotations

import json
from typing import Any

import pytest

from burnish.data.types import Conversation, Message, ToolCall

from . import converting
from .converting import convert, malformed

USER = {"role": "user", "content": "Weather in Paris?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "18 degrees"}


def read(*messages: object, **others: Any) -> tuple[Message, ...]:
    return converting.conversation({"messages": list(messages), **others}, "messages")


def fault(*messages: object, **others: Any) -> str:
    return malformed({"messages": list(messages), **others}, "messages")


def answer(**fields: Any) -> Message:
    """The assistant's message with these fields."""
    return read(USER, {"role": "assistant", **fields})[1]


def test_roles_and_contents() -> None:
    assert read({"role": "system", "content": "Be brief."}, USER, ANSWER) == (
        Message("system", "Be brief."),
        Message("user", "Weather in Paris?"),
        Message("assistant", "Sunny."),
    )


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("model", "assistant"), ("bot", "assistant"), ("developer", "developer")],
)
def test_spellings_of_roles(name: str, role: str) -> None:
    assert role in [message.role for message in read({"role": name, "content": "x"}, USER, ANSWER)]


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_the_list_goes_by_several_names_and_may_be_json_text(column: str) -> None:
    for value in ([USER, ANSWER], json.dumps([USER, ANSWER])):
        assert converting.conversation({column: value}, "messages") == read(USER, ANSWER)


def test_tools_calls_and_results() -> None:
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    item = convert({"messages": [USER, CALLING, RESULT, ANSWER], "tools": [schema]}, "messages")
    assert item == Conversation(
        (
            Message("user", "Weather in Paris?"),
            Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Paris"}, "c1"),)),
            Message("tool", "18 degrees", tool_call_id="c1", name="weather"),
            Message("assistant", "Sunny."),
        ),
        (schema,),
    )


@pytest.mark.parametrize("tools", [[{"name": "f"}], {"name": "f"}, '[{"name": "f"}]', '{"name": "f"}', ['{"name": "f"}']])
def test_tools_in_every_shape(tools: object) -> None:
    item = convert({"messages": [USER, ANSWER], "tools": tools}, "messages")
    assert isinstance(item, Conversation)
    assert item.tools == ({"name": "f"},)


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools: object) -> None:
    assert convert({"messages": [USER, ANSWER], "tools": tools}, "messages") == Conversation(read(USER, ANSWER))


@pytest.mark.parametrize(
    ("arguments", "read_as"),
    [('{"a": [1, null]}', {"a": [1, None]}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("{}", {})],
)
def test_arguments_are_decoded(arguments: object, read_as: dict[str, Any]) -> None:
    for call in ({"function": {"name": "f", "arguments": arguments}}, {"name": "f", "arguments": arguments}):
        assert answer(tool_calls=[call]).tool_calls == (ToolCall("f", read_as),)
    assert answer(content="", function_call={"name": "f", "arguments": arguments}).tool_calls == (ToolCall("f", read_as),)


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Sun"}, "ny", {"type": "output_text", "text": "."}]
    assert answer(content=parts).content == "Sunny."
    thinking = [{"type": "thinking", "thinking": "Hm. "}, {"type": "reasoning", "text": "Well."}, {"type": "text", "text": "Sunny."}]
    assert answer(content=thinking) == Message("assistant", "Sunny.", reasoning="Hm. Well.")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning(key: str) -> None:
    assert answer(content="4", **{key: "2 + 2"}) == Message("assistant", "4", reasoning="2 + 2")
    assert answer(content="4", reasoning_content="same", reasoning="same").reasoning == "same"
    assert answer(content="4", **{key: None}).reasoning is None


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({}, None),
        ({"train": None, "weight": None}, None),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 0.25}, 0.25),
        ({"weight": 0}, 0.0),
        ({"train": True, "weight": 2}, 2.0),
        ({"train": False, "weight": 2}, False),
    ],
)
def test_what_is_trained(fields: dict[str, Any], train: object) -> None:
    got = answer(content="x", **fields).train
    assert got == train
    assert type(got) is type(train)


def test_results_that_are_objects_become_json() -> None:
    for content, text in (({"é": 1}, '{"é": 1}'), ([1, 2], "[1, 2]"), ([{"type": "text", "text": "a"}], "a")):
        assert read(USER, CALLING, {**RESULT, "content": content}, ANSWER)[2].content == text


def test_system_prompt_of_the_row_and_of_the_run_file() -> None:
    own = {"role": "system", "content": "own"}
    prompts = [
        converting.conversation({"messages": messages, "system": system}, "messages", system="run's")[0].content
        for messages, system in (
            ([USER, ANSWER], None),
            ([USER, ANSWER], "row's"),
            ([own, USER, ANSWER], None),
            ([own, USER, ANSWER], "own"),
        )
    ]
    assert prompts == ["run's", "row's", "own", "own"]


def test_keys_and_roles_can_be_mapped() -> None:
    rows = {"chat": [{"who": "Kunde", "says": "Hallo"}, {"who": "Wir", "says": "Guten Tag", "learn": True}]}
    messages = converting.conversation(
        rows,
        "messages",
        columns={"messages": "chat", "role": "who", "content": "says", "train": "learn"},
        roles={"Kunde": "user", "Wir": "assistant"},
    )
    assert messages == (Message("user", "Hallo"), Message("assistant", "Guten Tag", train=True))


@pytest.mark.parametrize(
    "messages",
    [
        [ANSWER],
        [ANSWER, USER],
        [USER, USER, ANSWER],
        [USER, ANSWER, ANSWER],
        [USER, ANSWER, USER],
        [USER, ANSWER, RESULT | {"tool_call_id": None}, ANSWER],
        [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER, ANSWER],
    ],
)
def test_orders_that_are_left_to_the_template(messages: list[object]) -> None:
    assert len(read(*messages)) == len(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}],
        [USER, {"role": "assistant", "content": "\n"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}],
    ],
)
def test_blank_rows_are_empty(messages: list[object]) -> None:
    assert convert({"messages": messages}, "messages") is None


FAULTS: list[tuple[list[Any], str]] = [
    ([], "field 'messages': the conversation is empty"),
    ([USER], "the conversation has no assistant turn, so there is nothing to learn from it"),
    ([USER, "hello"], "field 'messages[1]': expected a message with 'role' and 'content', found the text 'hello'"),
    ([USER, None], "field 'messages[1]': expected a message with 'role' and 'content', found null"),
    ([{"content": "x"}], "field 'messages[0]': the message has no 'role', only 'content'"),
    ([{}], "field 'messages[0]': the message has no 'role', only nothing"),
    ([USER, {"role": 7, "content": "x"}], "field 'messages[1].role': expected text, found the number 7"),
    ([USER, {"role": "asistant", "content": "x"}], "field 'messages[1].role': unknown role 'asistant': did you mean 'assistant'?"),
    ([USER, {"role": "assistant"}], "field 'messages[1].content': the message has no content"),
    ([USER, {"role": "assistant", "content": None}], "field 'messages[1].content': the message has no content"),
    ([{"role": "user", "content": 5}, ANSWER], "field 'messages[0].content': expected text, found the number 5"),
    ([{"role": "user", "content": {"text": "x"}}, ANSWER], "field 'messages[0].content': expected text, found an object"),
    ([{"role": "user", "content": float("nan")}, ANSWER], "field 'messages[0].content': expected text, found NaN, a missing value"),
    ([{"role": "user", "content": "\ud83d"}, ANSWER],
     "field 'messages[0].content': the text holds \\ud83d, half of a surrogate pair, at character 1"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER],
     "field 'messages[0].content[0]': the message holds a part of type 'image_url', but only text can be trained on"),
    ([{"role": "user", "content": [{"type": "text"}]}, ANSWER], "field 'messages[0].content[0].text': expected text, found null"),
    ([{"role": "user", "content": [7]}, ANSWER],
     "field 'messages[0].content[0]': expected a part like {\"type\": \"text\", \"text\": ...}, found the number 7"),
    ([USER, {"role": "assistant", "content": [{"type": "text", "text": "a", "train": False}]}],
     "field 'messages[1].content[0]': 'train' on a part of a message is not supported, only on the whole message"),
    ([USER, ANSWER, {"role": "system", "content": "x"}], "message 3 is a system message, which may only come first"),
    ([USER, RESULT, ANSWER], "message 2 is a tool result, but follows a user message instead of an assistant turn"),
    ([RESULT, ANSWER], "message 1 is a tool result, but comes first instead of an assistant turn"),
    ([USER, CALLING, {**RESULT, "tool_call_id": "c2"}, ANSWER],
     "message 3 answers the call 'c2', which was not made; made were 'c1'"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
     "field 'messages[1].tool_calls': the call has no 'name'"),
    ([USER, {"role": "assistant", "tool_calls": ["f"]}],
     "field 'messages[1].tool_calls': expected a call like {\"name\": ..., \"arguments\": {...}}, found the text 'f'"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{oops"}]}],
     "field 'messages[1].tool_calls.arguments': expected JSON, found '{oops' "
     "(expecting property name enclosed in double quotes at character 2)"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
     "field 'messages[1].tool_calls.arguments': expected the arguments as an object or its JSON text, found a list"),
    ([{**USER, "tool_calls": [CALL]}, ANSWER],
     "field 'messages[0].tool_calls': a user message makes tool calls, which only the assistant can"),
    ([{**USER, "reasoning": "hm"}, ANSWER], "field 'messages[0]': a user message has reasoning, which only the assistant can have"),
    ([USER, {**ANSWER, "reasoning": "a", "thinking": "b"}],
     "field 'messages[1]': the message has two different reasonings (reasoning, thinking)"),
    ([USER, {**ANSWER, "train": "no"}], "field 'messages[1].train': expected true or false, found the text 'no'"),
    ([USER, {**ANSWER, "weight": -1}], "field 'messages[1].weight': expected a weight of 0 or more, found the number -1"),
    ([USER, {**ANSWER, "weight": True}], "field 'messages[1].weight': expected a weight of 0 or more, found true"),
    ([USER, {**ANSWER, "weight": float("inf")}], "field 'messages[1].weight': expected a weight of 0 or more, found the number inf"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message"), FAULTS, ids=[message[-40:] for _, message in FAULTS])
def test_malformed_messages(messages: list[Any], message: str) -> None:
    assert fault(*messages) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": None}, "field 'messages': expected a list of messages, found null"),
        ({"messages": float("nan")}, "field 'messages': expected a list of messages, found NaN, a missing value"),
        ({"messages": {"role": "user"}}, "field 'messages': expected a list of messages, found an object"),
        (
            {"messages": "[{"},
            "field 'messages': expected JSON, found '[{' (expecting property name enclosed in double quotes at character 3)",
        ),
        ({"messages": [USER, ANSWER], "tools": "none"}, "field 'tools': expected JSON, found 'none' (expecting value at character 1)"),
        ({"messages": [USER, ANSWER], "tools": [7]}, "field 'tools': expected a tool's JSON schema, found the number 7"),
        ({"messages": [USER, ANSWER], "system": 7}, "field 'system': expected text, found the number 7"),
        (
            {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
            "field 'system': the row's system prompt differs from the one in its messages",
        ),
    ],
)
def test_malformed_fields(fields: dict[str, Any], message: str) -> None:
    assert malformed(fields, "messages") == message
