from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import RowError
from burnish.data.types import Tokens

from .converting import convert, malformed

IDS = [5, 6, 7, 8]


def tokens(**fields: Any) -> object:
    return convert({"input_ids": IDS, **fields}, "tokens")


def test_without_labels_every_token_is_trained() -> None:
    assert tokens() == Tokens((5, 6, 7, 8))
    assert tokens(labels=None, attention_mask=[1, 1, 1, 1]) == Tokens((5, 6, 7, 8))


def test_labels() -> None:
    assert tokens(labels=[-100, -100, 7, 8]) == Tokens((5, 6, 7, 8), (-100, -100, 7, 8))
    assert tokens(labels="[-100, -100, 7, 8]") == tokens(labels=[-100, -100, 7, 8])


def test_masks_as_trl_writes_them() -> None:
    assert tokens(completion_mask=[0, 0, 1, 1]) == Tokens((5, 6, 7, 8), (-100, -100, 7, 8))
    assert tokens(completion_mask=[0, 1, 1, 1], assistant_masks=[1, 1, 0, 1]) == Tokens((5, 6, 7, 8), (-100, 6, -100, 8))
    assert tokens(labels=[5, -100, 7, 8], assistant_masks=[0, 1, 1, 0]) == Tokens((5, 6, 7, 8), (-100, -100, 7, -100))


@given(left=st.integers(0, 3), right=st.integers(0, 3), inner=st.integers(0, 5), pad=st.integers(0, 9))
def test_padding_is_taken_away(left: int, right: int, inner: int, pad: int) -> None:
    ids = [pad] * left + list(range(10, 10 + inner)) + [pad] * right
    labels = [-100] * left + list(range(10, 10 + inner)) + [pad] * right
    mask = [0] * left + [1] * inner + [0] * right
    item = convert({"input_ids": ids, "labels": labels, "attention_mask": mask}, "tokens")
    kept = tuple(range(10, 10 + inner))
    assert item == (Tokens(kept, kept) if inner else None)


def test_the_pad_id_inside_the_text_is_kept() -> None:
    assert convert({"input_ids": [0, 0, 1, 0], "attention_mask": [0, 1, 1, 1]}, "tokens") == Tokens((0, 1, 0))


def test_no_tokens_is_an_empty_row() -> None:
    assert convert({"input_ids": []}, "tokens") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": None}, "field 'input_ids': expected a list of token ids, found null"),
        ({"input_ids": "1 2 3"}, "field 'input_ids': expected JSON, found '1 2 3' (extra data at character 3)"),
        ({"input_ids": 7}, "field 'input_ids': expected a list of whole numbers, found the number 7"),
        ({"input_ids": [1, 2.5]}, "field 'input_ids': expected whole numbers, found the number 2.5 at place 1"),
        ({"input_ids": [1, True]}, "field 'input_ids': expected whole numbers, found true at place 1"),
        ({"input_ids": [[1, 2]]}, "field 'input_ids': expected whole numbers, found a list at place 0"),
        ({"input_ids": [1, -100]}, "field 'input_ids': expected token ids, found -100"),
        ({"labels": [1, 2]}, "field 'labels': labels has 2 entries, but input_ids has 4"),
        ({"labels": [5, 6, 9, 8]}, "field 'labels': label 2 is 9, expected -100 or the token itself, 7"),
        ({"attention_mask": [1, 1]}, "field 'attention_mask': attention_mask has 2 entries, but input_ids has 4"),
        ({"attention_mask": [1, 0, 1, 1]}, "field 'attention_mask': the mask has a hole at token 1, expected zeros at the ends only"),
        ({"attention_mask": [1, 2, 1, 1]}, "field 'attention_mask': expected zeros and ones, found 2"),
        ({"completion_mask": [0, 0, 1]}, "field 'completion_mask': completion_mask has 3 entries, but input_ids has 4"),
    ],
)
def test_malformed_rows(fields: dict[str, Any], message: str) -> None:
    assert malformed({"input_ids": IDS, **fields}, "tokens") == message


def test_shifted_labels_are_recognised() -> None:
    with pytest.raises(RowError) as caught:
        convert({"input_ids": IDS, "labels": [-100, 7, 8, -100]}, "tokens")
    assert caught.value.hint == "The labels look shifted by one; give them unshifted, as long as the tokens."
