from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.collate import collate
from burnish.data.types import Example


def example(ids: list[int], weights: list[float]) -> Example:
    return Example(np.array(ids, np.int32), np.array(weights, np.float32))


def test_two_examples_lie_end_to_end() -> None:
    batch = collate([example([5, 6, 7], [1, 0, 1]), example([8, 9], [0, 0.5])], step_weight=10.0, last=False)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.doc_ends == (3, 5)
    assert batch.parents == (-1, -1)
    assert batch.rows.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 9]
    assert batch.token_weights.tolist() == [1.0, 0.5]
    assert (batch.weight, batch.step_weight, batch.last, batch.examples) == (1.5, 10.0, False, 2)


def test_types_are_those_of_the_contract() -> None:
    batch = collate([example([5, 6], [0, 1])], step_weight=1.0)
    kinds = [batch.input_ids.dtype, batch.positions.dtype, batch.rows.dtype, batch.targets.dtype, batch.token_weights.dtype]
    assert kinds == [torch.int64] * 4 + [torch.float32]
    assert batch.last is True


def test_no_examples_make_a_placeholder_that_trains_nothing() -> None:
    batch = collate([], step_weight=7.0)
    assert len(batch.input_ids) == 1
    assert batch.doc_ends == (1,)
    assert len(batch.rows) == len(batch.targets) == len(batch.token_weights) == 0
    assert (batch.weight, batch.examples) == (0.0, 0)


def test_the_arrays_of_the_examples_are_left_as_they_are() -> None:
    weights = np.ones(3, np.float32)
    weights.flags.writeable = False  # memory-mapped examples cannot be written to
    ids = np.arange(3, dtype=np.int32)
    ids.flags.writeable = False
    batch = collate([Example(ids, weights)], step_weight=2.0)
    assert weights.tolist() == [1, 1, 1]
    assert batch.weight == 2.0


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 1.0, 0.25])), min_size=1, max_size=8), min_size=1, max_size=6))
def test_every_trained_token_is_predicted_from_the_token_before_it(segments: list[list[tuple[int, float]]]) -> None:
    batch = collate([example([t for t, _ in s], [w for _, w in s]) for s in segments], step_weight=1.0)
    expected = [(token, weight) for s in segments for token, weight in s[1:] if weight > 0]
    assert list(zip(batch.targets.tolist(), batch.token_weights.tolist(), strict=True)) == expected
    assert torch.equal(batch.input_ids[batch.rows + 1], batch.targets)
    starts = {0, *batch.doc_ends}
    assert not starts & set((batch.rows + 1).tolist())
    assert batch.weight == pytest.approx(sum(weight for _, weight in expected))
    assert len(batch.input_ids) == batch.doc_ends[-1] == sum(map(len, segments))
