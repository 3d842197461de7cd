from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from burnish.config.sections import FORMATS, Source
from burnish.core import plugins
from burnish.core.errors import ConfigError, FormatError, RowError
from burnish.data.formats import OF_KIND, Format, choose
from burnish.data.sources.row import Row
from burnish.data.types import BatchKind, Completion, Conversation, Judged, Message, Pair, Stepwise, Text, Tokens

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
            "the rows are judged (column 'label'), which this objective does not use; to learn from the judgement, write 'objective: kto'; "
            "to train on good and bad alike, write 'format: messages' beside the data set's path",
            "",
        ),
        ({"prompt": "a", "completion": "b", "kto_tag": True}, "the rows are judged (column 'kto_tag'), which this objective", ""),
        (
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": {}},
            "preference pairs (columns 'chosen' and 'rejected'), which this objective does not use; "
            "to learn from the preference, write 'objective: dpo' (or simpo, orpo, reward ...)",
            "",
        ),
        (
            {"prompt": "a", "chosen": MESSAGES, "rejected": MESSAGES},
            "to train on the chosen answers alone, write 'format: messages' with 'columns: {messages: chosen}' beside",
            "",
        ),
        (
            {"chosen": TURNS, "rejected": TURNS},
            "to train on the chosen answers alone, write 'format: sharegpt' with 'columns: {conversations: chosen}' beside",
            "",
        ),
        (
            {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
            "the objective learns from examples to imitate, but the rows have two answers, one of them preferred: they fit preference "
            "(chosen_response, rejected_response)",
            "Write 'objective: dpo' (or simpo, orpo, reward ...) to learn from these rows.",
        ),
        (
            {"prompt": "a", "completions": ["b"], "labels": [True]},
            "but the rows have a solution in steps: they fit stepwise (prompt, completions, labels)",
            "Write 'objective: process_reward' to learn from these rows.",
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


# -- what objectives compare --------------------------------------------------------------------------------------------------------

PAIR: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
JUDGED: dict[str, Any] = {"prompt": "a", "completion": "b", "label": True}
STEPS: dict[str, Any] = {"prompt": "a", "completions": ["b"], "labels": [True]}
ALPACA: dict[str, Any] = {"instruction": "a", "output": "b"}


def for_kind(kind: BatchKind, fields: dict[str, Any], **settings: Any) -> Format:
    return choose(Source(path="rows.jsonl", **settings), [row(fields)], kind=kind)


def refused(kind: BatchKind, fields: dict[str, Any], **settings: Any) -> tuple[str, str]:
    with pytest.raises(FormatError) as caught:
        for_kind(kind, fields, **settings)
    return str(caught.value).removeprefix("rows.jsonl: "), caught.value.hint or ""


def test_every_format_is_for_some_objective() -> None:
    assert {name for names in OF_KIND.values() for name in names} == set(FORMATS)


@pytest.mark.parametrize(
    ("kind", "fields", "described"),
    [
        ("pairs", PAIR, "preference (chosen, rejected, prompt)"),
        ("pairs", {**PAIR, "completion": "b", "label": True}, "preference (chosen, rejected, prompt; unused: completion, label)"),
        ("judged", JUDGED, "judged (completion, label, prompt)"),
        ("judged", PAIR, "preference (chosen, rejected, prompt; each pair is two judged answers)"),
        ("judged", {**PAIR, "id": 1}, "preference (chosen, rejected, prompt; each pair is two judged answers; unused: id)"),
        ("steps", STEPS, "stepwise (prompt, completions, labels)"),
    ],
)
def test_only_what_the_objective_compares_is_looked_for(kind: BatchKind, fields: dict[str, Any], described: str) -> None:
    format = for_kind(kind, fields)
    assert format.describe() == described
    assert for_kind(kind, fields, format=format.name).describe() == described
    assert pickle.loads(pickle.dumps(format)) == format


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "pairs",
            ALPACA,
            "the objective compares two answers, but the rows have one answer at most, and no judgement: "
            "they fit alpaca (instruction, output)",
        ),
        (
            "pairs",
            JUDGED,
            "the objective compares two answers, but the rows have one answer that is judged good or bad: "
            "they fit judged (completion, label)",
        ),
        (
            "judged",
            {"messages": MESSAGES},
            "the objective learns from answers that are judged good or bad, but the rows have one answer at most, and no judgement: "
            "they fit messages (messages)",
        ),
        (
            "steps",
            PAIR,
            "the objective learns from solutions in steps that are right or wrong, but the rows have two answers, one of them preferred: "
            "they fit preference (chosen, rejected)",
        ),
        ("pairs", {"foo": 1}, "no format fits rows with the columns 'foo'"),
    ],
)  # fmt: skip
def test_rows_of_another_kind(kind: BatchKind, fields: dict[str, Any], message: str) -> None:
    assert refused(kind, fields)[0] == message


def test_nearly_the_right_columns_of_pairs() -> None:
    assert refused("pairs", {"prompt": "a", "choosen": "b", "rejected": "c"}) == (
        "no format fits rows with the columns 'prompt', 'choosen', 'rejected'",
        "Did you mean 'format: preference' with 'columns: {chosen: choosen, rejected: rejected}'?",
    )
    assert refused("pairs", {"q": "a"})[1].endswith("Fields by format: preference: chosen + rejected.")
    unclear = {"prompt": "a", "completion": "b", "label": "sport"}
    with pytest.raises(RowError, match="expected true or false, 1 or 0, or good or bad, found the text 'sport'"):
        for_kind("judged", unclear).convert(row(unclear))
    assert (
        refused("pairs", {"prompt": "a", "rejected": "c"})[0]
        == "the rows have 'rejected' but no 'chosen', which the objective compares it with"
    )


@pytest.mark.parametrize(
    ("kind", "format", "fields", "message", "hint"),
    [
        (
            "tokens",
            "preference",
            PAIR,
            "the objective learns from examples to imitate, but rows of the format preference have two answers, one of them preferred",
            "Write 'objective: dpo' (or simpo, orpo, reward ...) to learn from these rows, or 'format: alpaca' or 'format: sharegpt' or",
        ),
        (
            "pairs",
            "alpaca",
            ALPACA,
            "the objective compares two answers, but rows of the format alpaca have one answer at most, and no judgement",
            "Write 'objective: sft' to learn from these rows, or 'format: preference' for this objective.",
        ),
        (
            "judged",
            "stepwise",
            STEPS,
            "the objective learns from answers that are judged good or bad, but rows of the format stepwise have a solution in steps",
            "Write 'objective: process_reward' to learn from these rows, or 'format: judged' or 'format: preference' for this objective.",
        ),
        ("steps", "judged", JUDGED, "the objective learns from solutions in steps that are right or wrong, but", "'objective: kto'"),
    ],
)
def test_a_named_format_of_another_kind(kind: BatchKind, format: str, fields: dict[str, Any], message: str, hint: str) -> None:
    said, advice = refused(kind, fields, format=format)
    assert said.startswith(message) and hint in advice


def test_two_spellings_of_a_pair_are_ambiguous() -> None:
    assert refused("pairs", {**PAIR, "chosen_response": "d", "rejected_response": "e"})[1] == (
        "Write 'columns: {chosen: chosen, rejected: rejected}' or 'columns: {chosen: chosen_response, rejected: rejected_response}'"
        " beside the data set's path."
    )


@pytest.mark.parametrize(
    ("fields", "columns", "described"),
    [
        ({**PAIR, "instruction": "d"}, {}, "preference (chosen, rejected, prompt; unused: instruction)"),
        ({**PAIR, "instruction": "d"}, {"instruction": "instruction"}, "preference (chosen, rejected, instruction; unused: prompt)"),
        (PAIR, {"instruction": "prompt"}, "preference (chosen, rejected, prompt)"),
        ({**PAIR, "messages": MESSAGES}, {}, "preference (chosen, rejected, prompt; unused: messages)"),
        ({**PAIR, "input": "d", "history": []}, {}, "preference (chosen, rejected, prompt; unused: input, history)"),
        (
            {**PAIR, "score_chosen": 1, "score_rejected": 0},
            {},
            "preference (chosen, rejected, prompt; unused: score_chosen, score_rejected)",
        ),
        ({"chosen": "b", "rejected": "c", "input": "a"}, {}, "preference (chosen, rejected, input)"),
        (
            {"chosen": "b", "rejected": "c", "input": "a", "instruction": "d", "messages": []},
            {},
            "preference (chosen, rejected, instruction, input; unused: messages)",
        ),
    ],
)  # fmt: skip
def test_which_column_is_the_prompt(fields: dict[str, Any], columns: dict[str, str], described: str) -> None:
    assert for_kind("pairs", fields, format="preference", columns=columns).describe() == described


# -- formats of one's own -----------------------------------------------------------------------------------------------------------

OWN = """
from burnish.data.types import Completion, Conversation, Judged, Message, Pair, Stepwise

def items(row):
    return Conversation((Message("user", row["q"]), Message("assistant", row["a"])))

def dicts(row):
    return row["made"]

def compared(row):
    good, bad = Completion("a", "b"), Completion("a", "c")
    made = {"pairs": Pair(good, bad, weight=2.0), "judged": Judged(bad, False), "steps": Stepwise("a", ("b",), (1.0,)), "text": good}
    return made[row["kind"]]

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


def test_a_function_that_makes_what_the_objective_compares(folder: Path) -> None:
    own = {"format": "./my_format.py:compared"}
    good, bad = Completion("a", "b"), Completion("a", "c")
    made = [("pairs", "pairs", Pair(good, bad, weight=2.0)), ("judged", "pairs", Pair(good, bad, weight=2.0)),
            ("judged", "judged", Judged(bad, False)), ("steps", "steps", Stepwise("a", ("b",), (1.0,)))]  # fmt: skip
    for kind, returned, item in made:
        format = for_kind(kind, {"kind": returned}, **own)
        assert format.convert(row({"kind": returned})) == item
        assert pickle.loads(pickle.dumps(format)).convert(row({"kind": returned})) == item
    as_dict = for_kind("pairs", {"made": PAIR}, format="./my_format.py:dicts")
    assert as_dict.convert(row({"made": PAIR})) == Pair(good, bad)


@pytest.mark.parametrize(
    ("kind", "returned", "message"),
    [
        ("tokens", "pairs", "returned a Pair, but the objective learns from examples to imitate: expected Conversation or Completion or"),
        ("pairs", "judged", "returned a Judged, but the objective compares two answers: expected Pair"),
        (
            "judged",
            "text",
            "returned a Completion, but the objective learns from answers that are judged good or bad: expected Judged or Pair",
        ),
        ("steps", "pairs", "returned a Pair, but the objective learns from solutions in steps that are right or wrong: expected Stepwise"),
    ],
)
def test_a_function_that_makes_something_else(folder: Path, kind: BatchKind, returned: str, message: str) -> None:
    format = for_kind(kind, {"kind": returned}, format="./my_format.py:compared")
    with pytest.raises(RowError) as caught:
        format.convert(row({"kind": returned}, 9))
    assert str(caught.value).startswith(f"rows.jsonl:9, row 9: ./my_format.py:compared {message}")


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
