from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from burnish.config.sections import FORMATS, Source
from burnish.core import plugins
from burnish.core.errors import ConfigError, FormatError, RowError
from burnish.data.formats import Format, choose
from burnish.data.sources.row import Row
from burnish.data.types import Completion, Conversation, Message, Text, Tokens

from .converting import row

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def chosen(*rows: dict[str, Any], **settings: Any) -> Format:
    return choose(Source(path="rows.jsonl", **settings), [row(fields, number) for number, fields in enumerate(rows, start=1)])


def refusal(*rows: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """(message, hint)."""
    with pytest.raises(FormatError) as caught:
        chosen(*rows, **settings)
    return str(caught.value), caught.value.hint or ""


def test_the_names_in_the_configuration_are_the_modules_there_are() -> None:
    assert set(FORMATS) == set(plugins.names("data.formats"))


@pytest.mark.parametrize(
    ("fields", "described"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca (instruction, output)"),
        ({"instruction": "a", "input": "", "output": "b", "id": 1}, "alpaca (instruction, output, input; unused: id)"),
        ({"instruction": None, "output": "b"}, "alpaca (instruction, output)"),
        ({"conversations": TURNS, "source": "x"}, "sharegpt (conversations; unused: source)"),
        ({"messages": TURNS}, "sharegpt (messages)"),
        ({"messages": MESSAGES, "tools": None}, "messages (messages, tools)"),
        ({"conversation": MESSAGES}, "messages (conversation)"),
        ({"messages": '[{"role": "user", "content": "a"}]'}, "messages (messages)"),
        ({"prompt": "a", "prompt_id": "7", "messages": MESSAGES}, "messages (messages; unused: prompt, prompt_id)"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion (prompt, completion)"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt_completion (prompt, completion)"),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "d"},
            "prompt_completion (instruction, response; unused: context, category)",
        ),
        ({"question": "a", "answer": "b", "id": 5}, "prompt_completion (question, answer; unused: id)"),
        ({"input": "a", "output": "b"}, "prompt_completion (input, output)"),
        ({"text": "a"}, "text (text)"),
        ({"content": "a", "path": "b"}, "text (content; unused: path)"),
        ({"input_ids": [1], "labels": [1], "attention_mask": [1]}, "tokens (input_ids, labels, attention_mask)"),
    ],
)
def test_the_format_is_seen_from_the_rows(fields: dict[str, Any], described: str) -> None:
    assert chosen(fields).describe() == described


def test_a_few_other_rows_do_not_hide_the_format() -> None:
    good = {"instruction": "a", "output": "b"}
    assert chosen(good, {}, good, {"output": ["c"]}).name == "alpaca"


def test_broken_lines_do_not_hide_the_format() -> None:
    broken = Row("rows.jsonl", 1, {}, 1, RowError("invalid JSON"))
    source = Source(path="rows.jsonl")
    format = choose(source, [broken, row({"text": "a"}, 2)])
    assert format.name == "text"
    for reader in (lambda: format.convert(broken), lambda: choose(source, [broken])):
        with pytest.raises(RowError, match="invalid JSON"):
            reader()


@pytest.mark.parametrize(
    ("fields", "names", "hint"),
    [
        (
            {"instruction": "a", "output": "b", "text": "c"},
            ["alpaca (instruction, output)", "text (text)"],
            "Write 'format: alpaca' or 'format: text' beside the data set's path.",
        ),
        (
            {"instruction": "a", "output": "b", "response": "c"},
            ["alpaca (instruction, output)", "prompt_completion (instruction, response)"],
            "Write 'format: alpaca' or 'format: prompt_completion' beside the data set's path.",
        ),
        (
            {"messages": MESSAGES, "text": "a"},
            ["messages (messages)", "text (text)"],
            "Write 'format: messages' or 'format: text' beside the data set's path.",
        ),
        (
            {"prompt": "a", "completion": "b", "response": "c"},
            ["prompt_completion (prompt, completion)", "prompt_completion (prompt, response)"],
            "Write 'columns: {prompt: prompt, completion: completion}' or 'columns: {prompt: prompt, completion: response}'"
            " beside the data set's path.",
        ),
    ],
)
def test_several_formats_fit(fields: dict[str, Any], names: list[str], hint: str) -> None:
    assert refusal(fields) == (f"rows.jsonl: the rows fit more than one format: {' and '.join(names)}", hint)


def test_what_the_hints_say_helps() -> None:
    fields = {"instruction": "a", "output": "b", "text": "c"}
    assert [chosen(fields, format=name).name for name in ("alpaca", "text")] == ["alpaca", "text"]
    pair = {"prompt": "a", "completion": "b", "response": "c"}
    assert chosen(pair, columns={"prompt": "prompt", "completion": "response"}).convert(row(pair)) == Completion("a", "c")
    assert chosen({"instuction": "a", "output": "b"}, columns={"instruction": "instuction", "output": "output"}).name == "alpaca"


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"foo": 1, "bar": 2}, "no format fits rows with the columns 'foo', 'bar'", "Fields by format: alpaca: instruction + output;"),
        ({}, "no format fits rows with the columns none", "Write 'format:'"),
        (
            {"instuction": "a", "ouput": "b"},
            "no format fits rows with the columns 'instuction', 'ouput'",
            "Did you mean 'format: alpaca' with 'columns: {instruction: instuction, output: ouput}'?",
        ),
        (
            {"text": 7},
            "no format fits rows with the columns 'text'",
            "The columns are those of text; write 'format: text' to learn what is wrong with the rows.",
        ),
        ({"messages": []}, "no format fits rows with the columns 'messages'", ""),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "the rows are preference pairs (columns 'chosen' and 'rejected'), which this objective does not use",
            "",
        ),
        (
            {"messages": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES},
            "to train on the conversations alone, write 'format: messages'",
            "",
        ),
        ({f"column{n}": n for n in range(20)}, "'column11' and 8 more", ""),
    ],
)
def test_no_format_fits(fields: dict[str, Any], message: str, hint: str) -> None:
    found = refusal(fields)
    assert message in found[0]
    assert hint in found[1]


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        (
            {"instruktion": "a", "input": "", "output": "b"},
            "the rows fit prompt_completion (input, output), but the column 'instruktion' is nearly one of alpaca",
            "Write 'format: alpaca' with 'columns: {instruction: instruktion, output: output}', or 'format: prompt_completion', beside",
        ),
        (
            {"messages": MESSAGES, "label": False},
            "the rows are judged (column 'label'), which this objective does not use; write 'objective: kto' to learn from that, "
            "or, to train on good and bad alike, write 'format: messages' beside the data set's path",
            "",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": {}},
            "preference pairs (columns 'chosen' and 'rejected'), which this objective does not use; "
            "write 'objective: dpo' (or simpo, orpo, kto, reward) to learn from the preference",
            "",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "to train on the chosen answers alone, write 'format: prompt_completion' with 'columns: {completion: chosen}' beside",
            "",
        ),
        (
            {"messages": MESSAGES, "chosen": "b", "rejected": "c"},
            "to train on the conversations alone, write 'format: messages' beside the data set's path",
            "",
        ),
    ],
)
def test_rows_that_fit_but_mean_something_else(fields: dict[str, Any], message: str, hint: str) -> None:
    said, advice = refusal(fields)
    assert message in said and hint in advice


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": MESSAGES, "label": "sport"},
        {"prompt": "a", "completion": "b", "tex": "c"},
        {"question": "a", "answer": "b", "test": True, "id": 3},
    ],
)
def test_other_columns_are_only_named(fields: dict[str, Any]) -> None:
    assert "unused" in chosen(fields).describe()


def test_rows_of_two_formats_are_ambiguous() -> None:
    assert "more than one format: alpaca" in refusal({"instruction": "a", "output": "b"}, {"text": "c"})[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "alpaca"}, "rows.jsonl: the format alpaca needs the columns 'instruction', 'output', found 'question', 'answer'"),
        (
            {"format": "prompt_completion", "columns": {"prompt": "questoin"}},
            "rows.jsonl, field 'columns': the rows have no column 'questoin': did you mean 'question'?",
        ),
        (
            {"columns": {"prompt": "questoin", "completion": "answer"}},
            "rows.jsonl, field 'columns': the rows have no column 'questoin': did you mean 'question'?",
        ),
        (
            {"format": "alpaca", "columns": {"instuction": "question"}},
            "rows.jsonl, field 'columns': the format alpaca has no field 'instuction': did you mean 'instruction'?",
        ),
        ({"format": "text", "columns": {"text": "question"}, "system": "x"},
         "rows.jsonl: a system prompt needs conversations, but the format is text"),
    ],
)  # fmt: skip
def test_what_the_run_file_says_does_not_fit(settings: dict[str, Any], message: str) -> None:
    assert refusal({"question": "a", "answer": "b"}, **settings)[0] == message


def test_columns_decide_between_formats() -> None:
    fields = {"text": "c", "question": "a", "answer": "b"}
    assert chosen(fields, columns={"text": "text"}).name == "text"
    assert chosen(fields, columns={"prompt": "question"}).convert(row(fields)) == Completion("a", "b")
    assert chosen(fields, columns={"instruction": "question", "output": "answer"}).name == "alpaca"


def test_no_rows() -> None:
    with pytest.raises(FormatError, match="there is no row to tell the format from"):
        choose(Source(path="rows.jsonl"), [])


def test_formats_can_be_sent_to_workers() -> None:
    samples = [{"instruction": "a", "output": "b"}, {"messages": MESSAGES}, {"text": "a"}, {"input_ids": [1]}]
    for fields in samples:
        format = chosen(fields)
        copy = pickle.loads(pickle.dumps(format))
        assert copy == format
        assert copy.convert(row(fields)) == format.convert(row(fields))


# -- formats of one's own -----------------------------------------------------------------------------------------------------------

OWN = """
from burnish.data.types import Conversation, Message

def items(row):
    return Conversation((Message("user", row["q"]), Message("assistant", row["a"])))

def dicts(row):
    return row["made"]

NUMBER = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_format.py").write_text(OWN)
    return tmp_path


def test_a_function_that_makes_items(folder: Path) -> None:
    fields = {"q": "a", "a": "b"}
    format = chosen(fields, format="./my_format.py:items")
    assert format.convert(row(fields)) == Conversation((Message("user", "a"), Message("assistant", "b")))
    assert format.name == format.describe() == "./my_format.py:items"


@pytest.mark.parametrize(
    ("made", "item"),
    [
        ({"messages": MESSAGES}, Conversation((Message("user", "a"), Message("assistant", "b")))),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
        ({"input_ids": [1, 2]}, Tokens((1, 2))),
        ("plain", Text("plain")),
        (None, None),
        ({"text": " "}, None),
    ],
)
def test_a_function_that_makes_what_a_built_in_format_understands(folder: Path, made: object, item: object) -> None:
    format = chosen({"made": made}, format="./my_format.py:dicts")
    assert format.convert(row({"made": made})) == item
    assert pickle.loads(pickle.dumps(format)).convert(row({"made": made})) == item


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"other": 1}, "rows.jsonl:9, row 9: ./my_format.py:dicts failed: KeyError: 'made'"),
        ({"made": 7}, "rows.jsonl:9, row 9: ./my_format.py:dicts returned the number 7, expected an item, a dict, a text or None"),
        ({"made": {"messages": [{"role": "usr", "content": "a"}]}}, "rows.jsonl:9, row 9, field 'messages[0].role': unknown role 'usr'"),
    ],
)
def test_a_function_that_fails(folder: Path, fields: dict[str, Any], message: str) -> None:
    format = chosen({"made": "x"}, format="./my_format.py:dicts")
    with pytest.raises(RowError) as caught:
        format.convert(row(fields, 9))
    assert str(caught.value).startswith(message)


def test_what_is_no_function(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"'./my_format.py:NUMBER' is the number 7, expected a function"):
        chosen({"a": 1}, format="./my_format.py:NUMBER")
    with pytest.raises(ConfigError, match="defines no 'itmes'; did you mean 'items'"):
        chosen({"a": 1}, format="./my_format.py:itmes")
    with pytest.raises(ConfigError, match="no Python file at"):
        chosen({"a": 1}, format="./gone.py:convert")


def test_the_folder_of_the_run_file_is_looked_into(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    format = choose(Source(path="r", format="./my_format.py:dicts"), [row({"made": "x"})], base=folder)
    assert format.convert(row({"made": "x"})) == Text("x")
