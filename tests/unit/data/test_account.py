from __future__ import annotations

import io
import json

import numpy as np
from rich.console import Console

from burnish.data.account import MOST_PLACES, Account, Lengths, Malformed, Packing, Rows, SourceAccount, Tokens


def account() -> Account:
    first = Rows(read=5, kept=2, duplicate=1, malformed=1, dropped=1, overlong=1)
    second = Rows(read=2, kept=1, fully_masked=1, masked_by_truncation=1)
    return Account(
        sources=[
            SourceAccount("a.json", "alpaca", first, Tokens(20, 10, 6, 4, dropped=7, duplicate=3)),
            SourceAccount("b.json", "text", second, Tokens(9, 5, 5, 0, truncated=1, fully_masked=3)),
        ],
        malformed=[Malformed("a.json", 4, "no [/bold] field")],
        examples=3,
        lengths=Lengths.of(np.array([3, 5, 7], np.int32)),
        packing=Packing(8, 2, 0.9375),
    )


def printed(of: Account) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(of.table())
    return stream.getvalue()


def test_totals_are_sums_over_sources_and_balance() -> None:
    totals = account()
    assert (totals.rows.read, totals.rows.kept, totals.tokens.total, totals.tokens.trained) == (7, 3, 15, 11)
    assert totals.rows.balanced
    assert totals.tokens.balanced


def test_an_account_that_does_not_add_up_says_so() -> None:
    assert not Rows(read=2, kept=1).balanced
    assert not Tokens(rendered=2, total=1, masked=1).balanced
    assert not Tokens(rendered=1, total=1).balanced


def test_json_has_the_keys_of_the_contract_and_comes_back() -> None:
    document = json.loads(json.dumps(account().to_json()))
    assert {"read", "kept", "duplicate", "empty", "malformed", "overlong", "fully_masked"} <= set(document["rows"])
    assert {"total", "trained", "truncated"} <= set(document["tokens"])
    assert document["malformed"] == [{"file": "a.json", "row": 4, "reason": "no [/bold] field"}]
    assert Account.from_json(document) == account()


def test_an_account_with_an_evaluation_comes_back() -> None:
    whole = account()
    whole.evaluation = account()
    whole.notes.update({"tools_left_out": 2})
    assert Account.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_the_table_names_what_was_lost_and_takes_no_text_for_markup() -> None:
    text = printed(account())
    assert "a.json, row 4: no [/bold] field" in text
    for piece in ("rows read", "cut before the answer", "93.8% full", "b.json", "dropped", "truncated"):
        assert piece in text
    assert "empty" not in text


def test_the_table_shows_the_evaluation_and_its_overlap() -> None:
    whole = account()
    whole.evaluation = account()
    whole.eval_rows_also_in_train = 4
    whole.notes.update({"tools_left_out": 2})
    text = printed(whole)
    assert "evaluation" in text
    assert "4 eval rows are also trained on" in text
    assert "tools left out: 2" in text


def test_places_of_malformed_rows_are_remembered_up_to_a_limit() -> None:
    full = Account()
    for row in range(2 * MOST_PLACES):
        full.note(Malformed("f", row, "bad"))
    assert len(full.malformed) == MOST_PLACES
    assert full.malformed[0].row == 0


def test_the_histogram_holds_every_example_once() -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, 500).astype(np.int32)
    summary = Lengths.of(sizes)
    assert sum(count for _, _, count in summary.histogram) == 500
    assert len(summary.histogram) <= 16
    for start, end, count in summary.histogram:
        assert count == int(((sizes >= start) & (sizes <= end)).sum())
    assert (summary.min, summary.max) == (sizes.min(), sizes.max())


def test_lengths_of_nothing() -> None:
    assert Lengths.of(np.zeros(0, np.int32)) == Lengths()
    assert Lengths.of([1]).histogram == [(1, 1, 1)]


def test_the_line_names_every_loss_and_nothing_else() -> None:
    whole = Account([SourceAccount("a", "text", Rows(read=2, kept=2), Tokens(1500, 1500, 1000, 500))], examples=2)
    assert whole.line() == "data: 2 examples, 1,500 tokens, 1,000 trained (66.7%)"
    assert account().line() == (
        "data: 3 examples, 15 tokens, 11 trained (73.3%); "
        "left out: 1 too long, 1 duplicate, 1 malformed, 1 fully masked (1 cut before the answer)"
    )
    cut = Rows(read=9, kept=5, eval=1, empty=3, overlong=2)
    held_out = Account([SourceAccount("b", "text", Rows(read=4, kept=4), Tokens())])
    some = Account([SourceAccount("a", "text", cut, Tokens(60, 50, 50, truncated=10))], examples=5, evaluation=held_out)
    assert some.line() == (
        "data: 5 examples, 50 tokens, 50 trained (100.0%); 5 rows held out; "
        "2 rows longer than data.max_length (10 tokens cut off); left out: 3 empty"
    )
