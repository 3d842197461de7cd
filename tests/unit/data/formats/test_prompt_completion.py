from __future__ import annotations

from typing import Any

import pytest

from burnish.core.errors import FormatError
from burnish.data.types import Completion, Conversation, Message

from .converting import conversation, convert, malformed

ASK = [{"role": "user", "content": "a"}]
REPLY = [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("instruction", "response"),
        ("question", "answer"),
        ("question", "response"),
        ("query", "response"),
        ("query", "answer"),
        ("input", "output"),
    ],
)
def test_names_of_the_columns(prompt: str, completion: str) -> None:
    for format in ("prompt_completion", "auto"):
        assert convert({prompt: "Q: ", completion: " A", "id": 1}, format) == Completion("Q: ", " A")


def test_texts_stay_as_they_are() -> None:
    assert convert({"prompt": " a\n", "completion": " b "}, "prompt_completion") == Completion(" a\n", " b ")
    assert convert({"prompt": "", "completion": "b"}, "prompt_completion") == Completion("", "b")


def test_lists_of_messages_train_the_completion_only() -> None:
    prompt = [{"role": "system", "content": "s"}, *ASK, {"role": "assistant", "content": "earlier", "train": True}, *ASK]
    completion = [*REPLY, {"role": "user", "content": "more"}, {"role": "assistant", "content": "c", "weight": 0.5}]
    item = convert({"prompt": prompt, "completion": completion, "tools": [{"name": "f"}]}, "prompt_completion")
    assert isinstance(item, Conversation)
    assert [(m.content, m.train) for m in item.messages] == [
        ("s", False), ("a", False), ("earlier", False), ("a", False), ("b", True), ("more", None), ("c", 0.5),
    ]  # fmt: skip
    assert item.tools == ({"name": "f"},)


@pytest.mark.parametrize(("prompt", "completion"), [(ASK, "b"), ("a", REPLY), (ASK[0], REPLY[0]), (ASK, REPLY[0])])
def test_a_text_or_a_message_beside_a_list(prompt: object, completion: object) -> None:
    assert conversation({"prompt": prompt, "completion": completion}, "prompt_completion") == (
        Message("user", "a", train=False),
        Message("assistant", "b", train=True),
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "completion": ""},
        {"prompt": "a", "completion": " "},
        {"prompt": ASK, "completion": ""},
        {"prompt": ASK, "completion": [{"role": "assistant", "content": ""}]},
    ],
)
def test_blank_completions_are_empty(row: dict[str, Any]) -> None:
    assert convert(row, "prompt_completion") is None


def test_a_system_prompt_needs_a_conversation() -> None:
    with pytest.raises(FormatError, match="a system prompt needs a conversation, but prompt and completion are plain texts") as caught:
        convert({"question": "a", "answer": "b"}, "prompt_completion", system="Be brief.")
    assert "'columns: {instruction: question, output: answer}'" in str(caught.value.hint)
    assert conversation({"prompt": ASK, "completion": REPLY}, "prompt_completion", system="Be brief.")[0].content == "Be brief."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": None}, "field 'completion': expected text, found null"),
        ({"prompt": "a", "completion": float("nan")}, "field 'completion': expected text, found NaN, a missing value"),
        ({"question": "a", "answer": 5}, "field 'answer': expected text, found the number 5"),
        ({"prompt": [], "completion": "b"}, "field 'prompt': the conversation is empty"),
        ({"prompt": ASK, "completion": ASK}, "field 'completion': the completion has no assistant turn"),
        ({"prompt": ASK, "completion": ["b"]}, "field 'completion[0]': expected a message with 'role' and 'content', found the text 'b'"),
        (
            {"prompt": ASK, "completion": [*REPLY, {"role": "system", "content": "x"}]},
            "message 3 is a system message, which may only come first",
        ),
    ],
)
def test_malformed_rows(row: dict[str, Any], message: str) -> None:
    assert malformed(row, "prompt_completion") == message
