from __future__ import annotations

import json
from typing import Any

import pytest

from burnish.data.types import Conversation, Message, ToolCall

from .converting import conversation, convert, malformed

HUMAN = {"from": "human", "value": "Weather in Paris?"}
GPT = {"from": "gpt", "value": "Sunny."}
CALL = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'}
RESULT = {"from": "observation", "value": "18 degrees"}


def test_turns_with_system_and_tools() -> None:
    tools = [{"name": "weather", "parameters": {}}]
    row = {"conversations": [HUMAN, CALL, RESULT, GPT], "system": "Be brief.", "tools": json.dumps(tools)}
    assert convert(row, "sharegpt") == Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "Weather in Paris?"),
            Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Paris"}),)),
            Message("tool", "18 degrees"),
            Message("assistant", "Sunny."),
        ),
        tuple(tools),
    )


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_names_of_the_column(column: str) -> None:
    for value in ([HUMAN, GPT], json.dumps([HUMAN, GPT])):
        assert len(conversation({column: value}, "sharegpt")) == 2


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("user", "user"),
        ("prompter", "user"),
        ("assistant", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("model", "assistant"),
        ("tool", "tool"),
        ("function_response", "tool"),
        ("function", "tool"),
    ],
)
def test_names_of_roles(name: str, role: str) -> None:
    assert conversation({"conversations": [HUMAN, GPT, {"from": name, "value": "x"}]}, "sharegpt")[2].role == role


def test_calls_side_by_side() -> None:
    value = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": '{"x": 1}'}]
    for given in (value, json.dumps(value)):
        row = {"conversations": [HUMAN, {"from": "function_call", "value": given if isinstance(given, str) else json.dumps(given)}]}
        assert conversation(row, "sharegpt")[1].tool_calls == (ToolCall("f", {}), ToolCall("g", {"x": 1}))


def test_a_role_that_is_mapped_is_no_call_any_more() -> None:
    row = {"conversations": [HUMAN, {"from": "function_call", "value": "plain"}]}
    assert conversation(row, "sharegpt", roles={"function_call": "assistant"})[1] == Message("assistant", "plain")


def test_keys_can_be_mapped() -> None:
    row = {"turns": [{"speaker": "human", "text": "a"}, {"speaker": "gpt", "text": "b"}]}
    messages = conversation(row, "sharegpt", columns={"conversations": "turns", "from": "speaker", "value": "text"})
    assert messages == (Message("user", "a"), Message("assistant", "b"))


def test_per_turn_training_and_extra_keys() -> None:
    row = {"conversations": [HUMAN, {**GPT, "train": False, "id": 7}, HUMAN, {**GPT, "weight": 0.5}]}
    assert [message.train for message in conversation(row, "sharegpt")] == [None, False, None, 0.5]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([HUMAN], "the conversation has no assistant turn, so there is nothing to learn from it"),
        ([], "field 'conversations': the conversation is empty"),
        ([HUMAN, {"from": "gtp", "value": "x"}], "field 'conversations[1].from': unknown role 'gtp': did you mean 'gpt'?"),
        ([HUMAN, {"value": "x"}], "field 'conversations[1]': the message has no 'from', only 'value'"),
        ([HUMAN, {"from": "gpt"}], "field 'conversations[1].value': the message has no value"),
        ([HUMAN, {"from": "gpt", "value": 3.5}], "field 'conversations[1].value': expected text, found the number 3.5"),
        (
            [HUMAN, {"from": "function_call", "value": "weather(Paris)"}],
            "field 'conversations[1].value': expected JSON, found 'weather(Paris)' (expecting value at character 1)",
        ),
        ([HUMAN, {"from": "function_call", "value": '{"arguments": {}}'}], "field 'conversations[1].value': the call has no 'name'"),
        ([HUMAN, {"from": "function_call", "value": None}], "field 'conversations[1].value': the message has no value"),
        ([HUMAN, RESULT, GPT], "message 2 is a tool result, but follows a user message instead of an assistant turn"),
        ([HUMAN, GPT, {"from": "system", "value": "x"}], "message 3 is a system message, which may only come first"),
    ],
)
def test_malformed_turns(turns: list[Any], message: str) -> None:
    assert malformed({"conversations": turns}, "sharegpt") == message
