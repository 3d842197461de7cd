from __future__ import annotations

from typing import Any

import pytest

from burnish.config.sections import Source
from burnish.core.errors import RowError
from burnish.data.formats import choose
from burnish.data.types import Message

from .converting import conversation, convert, malformed, row

NAN = float("nan")


def turns(**fields: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation({"instruction": "Add.", "output": "3", **fields}, "alpaca")]


@pytest.mark.parametrize(
    ("instruction", "given", "question"),
    [("Add.", "1 2", "Add.\n1 2"), ("Add.", "", "Add."), ("Add.", None, "Add."), ("Add.", NAN, "Add."), ("", "1 2", "1 2")],
)
def test_instruction_and_input_are_one_turn(instruction: str, given: object, question: str) -> None:
    assert turns(instruction=instruction, input=given) == [("user", question), ("assistant", "3")]


def test_the_input_may_be_absent() -> None:
    assert conversation({"instruction": "a", "output": "b"}, "alpaca") == (Message("user", "a"), Message("assistant", "b"))


@pytest.mark.parametrize("history", [[["a", "b"], ["c", "d"]], '[["a", "b"], ["c", "d"]]'])
def test_history_and_system(history: object) -> None:
    assert turns(history=history, system="Be brief.") == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "Add."),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize("blank", [None, "", NAN, []])
def test_no_history_and_no_system(blank: object) -> None:
    assert len(turns(history=blank, system=blank if not isinstance(blank, list) else None)) == 2


def test_columns_can_be_mapped() -> None:
    fields = {"instruction": "a", "context": "b", "response": "c", "category": "d"}
    assert [m.content for m in conversation(fields, "alpaca", columns={"input": "context", "output": "response"})] == ["a\nb", "c"]


@pytest.mark.parametrize("fields", [{"instruction": "", "output": ""}, {"instruction": "a", "output": " \n"}])
def test_blank_rows_are_empty(fields: dict[str, str]) -> None:
    assert convert(fields, "alpaca") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output": None}, "field 'output': expected text, found null"),
        ({"output": NAN}, "field 'output': expected text, found NaN, a missing value"),
        ({"output": 42}, "field 'output': expected text, found the number 42"),
        ({"output": True}, "field 'output': expected text, found true"),
        ({"output": ["good", "bad"]}, "field 'output': expected text, found a list"),
        ({"instruction": None}, "field 'instruction': expected text, found null"),
        ({"input": {"a": 1}}, "field 'input': expected text, found an object"),
        ({"history": "earlier"}, "field 'history': expected JSON, found 'earlier' (expecting value at character 1)"),
        ({"history": {"a": "b"}}, "field 'history': expected a list of [question, answer] pairs, found an object"),
        ({"history": [["a"]]}, "field 'history': expected [question, answer] pairs, found a list of 1"),
        ({"history": ["ab"]}, "field 'history': expected a list of a question and an answer, found the text 'ab'"),
        ({"history": [["a", None]]}, "field 'history': expected text, found null"),
    ],
)
def test_malformed_rows(fields: dict[str, Any], message: str) -> None:
    assert malformed({"instruction": "Add.", "output": "3", **fields}, "alpaca") == message


def test_a_field_that_only_the_other_rows_have() -> None:
    chosen = choose(Source(path="rows.jsonl"), [row({"instruction": "a", "output": "b"}), row({"instruction": "c"}, 2)])
    with pytest.raises(RowError, match=r"^rows.jsonl:2, row 2, field 'output': the row has no such field, only 'instruction'$"):
        chosen.convert(row({"instruction": "c"}, 2))
