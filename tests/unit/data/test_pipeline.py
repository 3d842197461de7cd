from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from burnish.core.errors import DataError, RowError, TemplateError
from burnish.data.pipeline import CHUNK_CHARACTERS, CHUNK_ROWS, Fate, Pipeline, Task, chunks, identity, is_blank
from burnish.data.sources.row import Row
from burnish.data.types import Completion, Conversation, Item, Message, Text, Tokens

from .fakes import Letters, Words


def tasks(*fields: dict[str, Any]) -> list[Task]:
    return [Task(0, Row("rows.jsonl", number, values)) for number, values in enumerate(fields, start=1)]


def pipeline(**options: Any) -> Pipeline:
    return Pipeline(
        **{"formats": [Words()], "renderer": Letters(), "max_length": 8, "overlong": "truncate", "skip_malformed": False} | options
    )


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def pieces(chunk: Any) -> list[list[int]]:
    return (
        [piece.tolist() for piece in np.split(chunk.block.input_ids, np.cumsum(chunk.block.lengths)[:-1])]
        if len(chunk.block.lengths)
        else []
    )


def text(chunk: Any) -> list[str]:
    return ["".join(map(chr, piece)) for piece in pieces(chunk)]


def test_rows_that_fit_are_kept_as_they_are() -> None:
    chunk = pipeline().run(tasks(pair("ab", "cd"), {"text": "efg"}))
    assert text(chunk) == ["abcd", "efg"]
    assert chunk.block.trained.tolist() == [2, 2]
    assert chunk.block.weights.tolist() == [2.0, 2.0]
    assert chunk.block.rows.tolist() == [0, 1]
    assert chunk.rendered.tolist() == [4, 3]
    assert not chunk.overlong.any()


def test_runs_give_the_weights_back() -> None:
    block = pipeline().run(tasks(pair("abc", "de"), {"text": "x"}, pair("ab", "c"))).block
    assert np.repeat(block.run_weights, block.run_lengths).tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert block.runs.tolist() == [2, 2]  # the single letter has nothing to be predicted from


def test_truncation_keeps_the_head_and_counts_the_rest() -> None:
    chunk = pipeline().run(tasks(pair("abcd", "efghijkl")))
    assert text(chunk) == ["abcdefgh"]
    assert (chunk.overlong[0], chunk.rendered[0], chunk.truncated[0]) == (True, 12, 4)


def test_a_row_cut_before_its_answer_is_told_from_one_without_an_answer() -> None:
    chunk = pipeline().run(tasks(pair("abcdefghi", "jk"), pair("abc", "")))
    assert chunk.fates.tolist() == [Fate.MASKED_BY_TRUNCATION, Fate.FULLY_MASKED]
    assert text(chunk) == []


def test_dropping_counts_all_tokens() -> None:
    chunk = pipeline(overlong="drop").run(tasks(pair("abcd", "efghijkl"), pair("a", "b")))
    assert chunk.fates.tolist() == [Fate.DROPPED, Fate.KEPT]
    assert chunk.rendered.tolist() == [12, 2]
    assert text(chunk) == ["ab"]


def test_splitting_gives_consecutive_pieces_and_counts_those_without_a_trained_token() -> None:
    chunk = pipeline(overlong="split", max_length=4).run(tasks(pair("abcdef", "ghijkl")))
    assert text(chunk) == ["efgh", "ijkl"]
    assert chunk.block.rows.tolist() == [0, 0]
    assert (chunk.masked_pieces[0], chunk.truncated[0]) == (4, 0)


def test_an_overlong_row_can_be_an_error_even_when_malformed_rows_are_skipped() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl, row 2: the example has 12 tokens, more than data.max_length = 8"):
        pipeline(overlong="error", skip_malformed=True).run(tasks(pair("a", "b"), pair("abcd", "efghijkl")))


def test_a_malformed_row_stops_with_its_place() -> None:
    with pytest.raises(RowError, match=r"rows.jsonl, row 2, field 'prompt': the field 'prompt' is missing"):
        pipeline().run(tasks(pair("a", "b"), {"other": 1}))


def test_malformed_rows_are_skipped_and_counted_on_request() -> None:
    broken = Task(0, Row("rows.jsonl", 3, {}, fault=RowError("invalid JSON")))
    chunk = pipeline(skip_malformed=True).run([*tasks(pair("a", "b"), {"other": 1}), broken])
    assert chunk.fates.tolist() == [Fate.KEPT, Fate.MALFORMED, Fate.MALFORMED]
    assert chunk.reasons == {1: "the field 'prompt' is missing", 2: "invalid JSON"}
    assert chunk.identities[1:] == [b"", b""]


def test_a_broken_template_stops_even_when_malformed_rows_are_skipped() -> None:
    with pytest.raises(TemplateError, match=r"rows.jsonl, row 1: the template is broken"):
        pipeline(skip_malformed=True).run(tasks(pair("a", "boom")))


def test_a_fault_of_ours_stays_one_and_says_on_which_row() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        pipeline().run(tasks(pair("a", "bug")))
    assert "rows.jsonl, row 1" in caught.value.__notes__[0]


def test_empty_rows_are_told_apart() -> None:
    chunk = pipeline().run(tasks({"text": ""}, {"text": " \n"}, pair("", " "), pair("a", "b")))
    assert chunk.fates.tolist() == [Fate.EMPTY] * 3 + [Fate.KEPT]


def test_notes_are_counted() -> None:
    assert pipeline().run(tasks(pair("a", "note"), pair("b", "note"))).notes == {"noted": 2}


def test_a_chunk_of_nothing() -> None:
    chunk = pipeline().run([])
    assert len(chunk.fates) == len(chunk.block.lengths) == len(chunk.block.input_ids) == 0


@pytest.mark.parametrize(
    ("item", "blank"),
    [
        (Conversation(()), True),
        (
            Conversation(
                (Message("user", " "), Message("assistant", "")),
            ),
            True,
        ),
        (Conversation((Message("user", ""), Message("assistant", "", reasoning="hm"))), False),
        (Completion("", "\n"), True),
        (Completion("a", ""), False),
        (Text("\t"), True),
        (Tokens(()), True),
        (Tokens((1,)), False),
    ],
)
def test_blank_means_nothing_but_white_space(item: Item, blank: bool) -> None:
    assert is_blank(item) is blank


def test_identity_is_of_the_whole_content() -> None:
    same = [Conversation((Message("user", "a"), Message("assistant", "b"))) for _ in range(2)]
    other = Conversation((Message("user", "a"), Message("assistant", "b", train=False)))
    assert identity(same[0]) == identity(same[1]) != identity(other)
    assert len(identity(Text("half of a pair: \ud800"))) == 16
    assert identity(Text("a")) != identity(Completion("a", ""))


def test_chunks_are_bounded_in_rows_and_in_characters() -> None:
    many = [Task(0, Row("f", number, {"text": "x"})) for number in range(CHUNK_ROWS + 1)]
    assert [len(chunk) for chunk in chunks(many)] == [CHUNK_ROWS, 1]
    long = [Task(0, Row("f", number, {"messages": [{"content": "x" * CHUNK_CHARACTERS}]})) for number in range(3)]
    assert [len(chunk) for chunk in chunks(long)] == [1, 1, 1]
    assert list(chunks([])) == []
