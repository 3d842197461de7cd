from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.order import hashed, permutation, pick


@given(st.integers(0, 300), st.integers(0, 2**63), st.integers(0, 1000))
def test_a_permutation_holds_every_number_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(count, seed, epoch).tolist()) == list(range(count))


def test_the_key_decides_the_order() -> None:
    orders = [permutation(50, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert permutation(50, 1, 2).tolist() == permutation(50, 1, 2).tolist()


def test_the_order_is_fixed_for_all_time() -> None:
    # A checkpoint made today must resume under any later numpy: these numbers must never change.
    assert permutation(10, 42, 0).tolist() == [5, 2, 4, 7, 0, 8, 6, 3, 1, 9]
    assert int(hashed(np.array([7]), 1, 2)[0]) == 1536415823740479337


def test_places_are_spread_evenly() -> None:
    first = np.bincount([permutation(10, seed)[0] for seed in range(2000)], minlength=10)
    assert first.min() > 140
    assert first.max() < 260


def test_pick_stays_in_range() -> None:
    assert {pick(3, 1, draw) for draw in range(100)} == {0, 1, 2}
