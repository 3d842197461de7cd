from __future__ import annotations

from typing import Any

import pytest

from burnish.core.errors import FormatError
from burnish.data.types import Completion, Conversation, Judged, Message

from .converting import convert, malformed

ASK = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}
TEXTS: dict[str, Any] = {"prompt": "a", "completion": "b"}


def judged(fields: dict[str, Any], **settings: Any) -> Judged:
    item = convert(fields, "judged", **settings)
    assert isinstance(item, Judged)
    return item


def turns(fields: dict[str, Any], **settings: Any) -> list[tuple[str, str, bool | float | None]]:
    answer = judged(fields, **settings).answer
    assert isinstance(answer, Conversation)
    return [(m.role, m.content, m.train) for m in answer.messages]


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"), ("input", "output")],
)
def test_texts_stay_as_they_are(prompt: str, answer: str, label: str) -> None:
    assert judged({prompt: "Q: ", answer: " A", label: False, "id": 1}) == Judged(Completion("Q: ", " A"), False)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [ASK], "completion": [REPLY]},
        {"prompt": "a", "completion": REPLY},
        {"prompt": [ASK], "completion": "b"},
        {"prompt": "a", "completion": [ASK, REPLY]},
        {"prompt": [ASK], "completion": [ASK, REPLY]},
        {"messages": [ASK, REPLY]},
        {"completion": [ASK, REPLY]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "", "response": "b"},
        {"completion": "\n\nHuman: a\n\nAssistant: b"},
    ],
)
def test_ways_to_write_the_same_conversation(fields: dict[str, Any]) -> None:
    assert turns({**fields, "label": True}) == [("user", "a", False), ("assistant", "b", None)]


def test_what_comes_after_the_last_user_turn_is_judged() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "r", "tool_call_id": "1"}
    fields = {"system": "s", "tools": [{"name": "f"}], "messages": [ASK, REPLY, ASK, call, result, REPLY], "label": True}
    assert turns(fields) == [
        ("system", "s", False), ("user", "a", False), ("assistant", "b", False), ("user", "a", False),
        ("assistant", "", None), ("tool", "r", None), ("assistant", "b", None),
    ]  # fmt: skip
    answer = judged(fields).answer
    assert isinstance(answer, Conversation) and answer.tools == ({"name": "f"},)


def test_what_the_row_says_about_training_stays_in_the_answer() -> None:
    fields = {"messages": [ASK, {**REPLY, "train": True}, ASK, {**REPLY, "weight": 0.5}], "label": True}
    assert [train for *_, train in turns(fields)] == [False, False, False, 0.5]


def test_alpaca_with_all_its_fields() -> None:
    fields = {"instruction": "a", "input": "x", "history": [["p", "q"]], "system": "s", "output": "b", "kto_tag": False}
    assert judged(fields) == Judged(
        Conversation(
            (
                Message("system", "s", train=False),
                Message("user", "p", train=False),
                Message("assistant", "q", train=False),
                Message("user", "a\nx", train=False),
                Message("assistant", "b"),
            )
        ),
        False,
    )


def test_a_system_prompt_needs_a_conversation() -> None:
    with pytest.raises(FormatError, match="a system prompt needs a conversation") as caught:
        convert({**TEXTS, "label": True}, "judged", system="s")
    assert caught.value.hint is not None and "'columns: {instruction: prompt}'" in caught.value.hint
    assert turns({**TEXTS, "label": True}, system="s", columns={"instruction": "prompt"})[0] == ("system", "s", False)
    assert turns({**TEXTS, "label": True, "system": "s"})[:2] == [("system", "s", False), ("user", "a", False)]


@pytest.mark.parametrize(
    ("label", "good"),
    [
        *((label, True) for label in (True, 1, 1.0, "true", "True", "1", "good", " Desirable ", "chosen")),
        *((label, False) for label in (False, 0, 0.0, "false", "False", "0", "bad", "undesirable", "rejected")),
    ],
)
def test_labels(label: object, good: bool) -> None:
    assert judged({**TEXTS, "label": label}).label is good


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (None, "null"),
        (float("nan"), "NaN, a missing value"),
        (2, "the number 2"),
        (-1, "the number -1"),
        (0.5, "the number 0.5"),
        ("sport", "the text 'sport'"),
        ("", "the text ''"),
        ([True], "a list"),
    ],
)
def test_unclear_labels(label: object, found: str) -> None:
    said = malformed({**TEXTS, "label": label}, "judged")
    assert said == f"field 'label': expected true or false, 1 or 0, or good or bad, found {found}"


def test_weights() -> None:
    assert judged({**TEXTS, "label": True}).weight == 1.0
    assert judged({**TEXTS, "label": True, "weight": 0.25}).weight == 0.25
    assert malformed({**TEXTS, "label": True, "weight": "x"}, "judged") == (
        "field 'weight': expected a number of 0 or more, found the text 'x'"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "completion": " "},
        {"instruction": "a", "output": ""},
        {"messages": [ASK, REPLY, ASK, {**REPLY, "content": ""}]},
    ],
)
def test_blank_answers_are_empty(fields: dict[str, Any]) -> None:
    assert convert({**fields, "label": True}, "judged") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "completion": None}, "field 'completion': expected text, found null"),
        ({"prompt": None, "completion": "b"}, "field 'completion': the answer has no prompt"),
        ({"completion": "b"}, "field 'completion': the answer has no prompt"),
        ({"messages": [ASK, REPLY, ASK]}, "field 'messages': the answer ends with a user message, expected an assistant turn"),
        ({"messages": []}, "field 'messages': the conversation is empty"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "field 'messages[0].role': unknown role 'usr': did you mean 'user'?"),
        (
            {"prompt": "x", "completion": [ASK, REPLY]},
            "field 'completion': the answer begins with a user message, but nothing in it repeats the prompt",
        ),
    ],
)
def test_malformed_rows(fields: dict[str, Any], message: str) -> None:
    assert malformed({**fields, "label": True}, "judged") == message
