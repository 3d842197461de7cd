from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.packing import best_fit_decreasing, fullness, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 64), max_size=120)


@given(LENGTHS, st.integers(1, 64))
def test_every_item_is_in_exactly_one_bin_and_no_bin_overflows(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert all(members for members in bins)
    assert all(sum(lengths[i] for i in members) <= capacity or len(members) == 1 for members in bins)


@given(LENGTHS, st.integers(1, 64))
def test_it_is_the_textbook_rule(lengths: list[int], capacity: int) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else max(capacity, length)) - length)
    bins = best_fit_decreasing(lengths, capacity)
    found = [max(capacity, max(lengths[i] for i in members)) - sum(lengths[i] for i in members) for members in bins]
    assert sorted(found) == sorted(rooms)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.randoms())
def test_the_shape_of_the_bins_depends_on_the_lengths_alone(lengths: list[int], random) -> None:
    shuffled = lengths[:]
    random.shuffle(shuffled)
    shapes = [sorted(sorted(some[i] for i in members) for members in best_fit_decreasing(some, 64)) for some in (lengths, shuffled)]
    assert shapes[0] == shapes[1]


def test_bins_of_realistic_lengths_are_nearly_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.8, 5000).astype(int), 1, 2048)
    bins = best_fit_decreasing(lengths, 2048)
    assert fullness(lengths, len(bins), 2048) > 0.98


def test_fullness_of_nothing_is_zero() -> None:
    assert best_fit_decreasing([], 8) == []
    assert fullness([], 0, 8) == 0.0


@given(LENGTHS, st.integers(1, 200), st.integers(1, 5), st.booleans())
def test_a_plan_deals_every_example_once_and_equally_many_micro_batches_to_all_ranks(
    lengths: list[int], budget: int, world_size: int, packing: bool
) -> None:
    plan = plan_micro_batches(lengths, budget, world_size=world_size, packing=packing)
    micro_batches = [members for rank in plan for members in rank]
    assert sorted(i for members in micro_batches for i in members) == list(range(len(lengths)))
    assert len(plan) == world_size
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1
    assert all(sum(lengths[i] for i in members) <= budget or len(members) == 1 for members in micro_batches)
    if not packing:
        assert all(len(members) <= 1 for members in micro_batches)


def test_ranks_get_about_the_same_work() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(5.3, 0.8, 64).astype(int), 1, 2048)
    plan = plan_micro_batches(lengths, 4096, world_size=4)
    loads = [sum(int(lengths[i]) for members in rank for i in members) for rank in plan]
    assert max(loads) < 1.05 * min(loads)


def test_the_biggest_micro_batch_comes_first() -> None:
    plan = plan_micro_batches([3, 50, 9, 30, 30], 60)
    loads = [sum([3, 50, 9, 30, 30][i] for i in members) for members in plan[0]]
    assert loads == sorted(loads, reverse=True)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_without_examples_has_one_empty_micro_batch_per_rank(world_size: int) -> None:
    assert plan_micro_batches([], 10, world_size=world_size) == [[[]]] * world_size
