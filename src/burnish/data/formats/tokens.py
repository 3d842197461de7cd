"""Rows that are tokenised already: `{"input_ids": [...], "labels": [...]}`.

Labels are unshifted: -100 where a token is not trained, else the token itself. Without them every token is trained, or those that
`completion_mask` and `assistant_masks` (as TRL writes them) both mark with 1. Padding is taken away: tokens at either end where
`attention_mask` is 0. A hole in the middle of that mask cannot be kept exactly, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from burnish.core.errors import RowError
from burnish.data.formats.base import Fields, Shape, as_list, is_list, kind_of
from burnish.data.types import Tokens

SHAPE = Shape(required=("input_ids",), optional=("labels", "attention_mask", "completion_mask", "assistant_masks"))
IGNORED = -100
_MASKS = ("completion_mask", "assistant_masks")


def looks_like(fields: Fields) -> bool:
    """Whether input_ids is a list of numbers."""
    ids = fields.get("input_ids")
    return is_list(ids) and all(isinstance(token, int) for token in ids[:1])


def convert(fields: Fields) -> Tokens | None:
    """The tokens of a row without its padding; None where there are none.

    Raises:
        RowError: a list is missing, of another length, or holds something else than it should.
    """
    ids = _integers(fields, "input_ids", None)
    if ids is None:
        raise RowError("expected a list of token ids, found null", where=fields.where("input_ids"))
    if negative := next((token for token in ids if token < 0), None):
        raise RowError(f"expected token ids, found {negative}", where=fields.where("input_ids"))
    labels = _labels(fields, ids)
    kept = _without_padding(fields, len(ids))
    if not ids[kept]:
        return None
    return Tokens(tuple(ids[kept]), None if labels is None else tuple(labels[kept]))


def _labels(fields: Fields, ids: Sequence[int]) -> Sequence[int] | None:
    labels = _integers(fields, "labels", len(ids))
    if labels is not None:
        _check_labels(fields, ids, labels)
    masks = [mask for name in _MASKS if (mask := _mask(fields, name, len(ids))) is not None]
    if not masks:
        return labels
    given = ids if labels is None else labels
    return [label if all(marks) else IGNORED for label, *marks in zip(given, *masks, strict=True)]


def _check_labels(fields: Fields, ids: Sequence[int], labels: Sequence[int]) -> None:
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORED, token):
            shifted = all(label in (IGNORED, token) for label, token in zip(labels, ids[1:], strict=False))
            raise RowError(
                f"label {i} is {label}, expected {IGNORED} or the token itself, {token}",
                where=fields.where("labels"),
                hint="The labels look shifted by one; give them unshifted, as long as the tokens." if shifted else None,
            )


def _without_padding(fields: Fields, length: int) -> slice:
    mask = _mask(fields, "attention_mask", length)
    if mask is None or all(mask):
        return slice(0, length)
    if not any(mask):
        return slice(0, 0)
    start, stop = mask.index(1), length - mask[::-1].index(1)
    if not all(mask[start:stop]):
        hole = start + mask[start:].index(0)
        raise RowError(f"the mask has a hole at token {hole}, expected zeros at the ends only", where=fields.where("attention_mask"))
    return slice(start, stop)


def _mask(fields: Fields, name: str, length: int) -> list[int] | None:
    mask = _integers(fields, name, length, truth=True)
    if mask is not None and not set(mask) <= {0, 1}:
        raise RowError(f"expected zeros and ones, found {next(m for m in mask if m not in (0, 1))}", where=fields.where(name))
    return mask


def _integers(fields: Fields, name: str, length: int | None, *, truth: bool = False) -> list[int] | None:
    value = fields.json(name)
    if value is None:
        return None
    where = fields.where(name)
    numbers = as_list(value, where, "whole numbers")
    for i, number in enumerate(numbers):
        if not isinstance(number, int) or (isinstance(number, bool) and not truth):
            raise RowError(f"expected whole numbers, found {kind_of(number)} at place {i}", where=where)
    if length is not None and len(numbers) != length:
        raise RowError(f"{fields.column(name)} has {len(numbers)} entries, but input_ids has {length}", where=where)
    return [int(cast(int, number)) for number in numbers]
