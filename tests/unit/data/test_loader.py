from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import CheckpointError, DataError
from burnish.data.loader import Loader, Step, eval_batches
from burnish.data.types import Batch, Example

from .listed import Listed, numbered


@pytest.fixture
def examples() -> Listed:
    """Twenty-three: a prime, so that no batch size divides it."""
    return numbered(23)


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def loader(examples: Listed, **options: Any) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 5, "max_length": 12, "micro_batch_tokens": 30, "seed": 3}
    if "batch_tokens" in options:
        defaults.pop("batch_size")
    return Loader(examples, **{**defaults, **options})


def members(batches: list[Batch]) -> list[int]:
    """The numbers of the examples in a step."""
    numbers = []
    for batch in batches:
        starts = [0, *batch.doc_ends[:-1]]
        numbers += [int(batch.input_ids[start]) for start in starts] if batch.examples else []
    return numbers


def steps(source: Loader, count: int) -> list[list[int]]:
    return [sorted(members(source.next())) for _ in range(count)]


def test_an_epoch_holds_every_example_once_and_ends_with_a_partial_step(examples: Listed) -> None:
    source = loader(examples)
    epoch = steps(source, source.steps_per_epoch)
    assert [len(step) for step in epoch] == [5, 5, 5, 5, 3]
    assert sorted(flat(epoch)) == list(range(23))
    assert source.epoch == 1.0


def test_epochs_differ_and_go_on_for_ever(examples: Listed) -> None:
    source = loader(examples)
    first, second = steps(source, 5), steps(source, 5)
    assert first != second
    assert sorted(flat(second)) == list(range(23))
    assert source.epoch == 2.0


def test_without_shuffling_the_order_is_that_of_the_data(examples: Listed) -> None:
    source = loader(examples, shuffle=False)
    assert steps(source, 6)[:2] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert steps(loader(examples, shuffle=False), 6)[5] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"batch_tokens": 36}])
@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_same_examples_meet_in_a_step_packed_or_not_on_any_number_of_ranks(
    examples: Listed, options: dict[str, int], packing: Any, world_size: int
) -> None:
    alone = loader(examples, **options)
    ranks = [loader(examples, packing=packing, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for _ in range(12):
        reference = alone.next()
        parts = [rank.next() for rank in ranks]
        assert sorted(flat(members(part) for part in parts)) == sorted(members(reference))
        assert len({len(part) for part in parts}) == 1
        assert [batch.last for batch in parts[0]] == [False] * (len(parts[0]) - 1) + [True]
        batches = flat(parts)
        assert {batch.step_weight for batch in batches} == {reference[0].step_weight}
        assert sum(batch.weight for batch in batches) == pytest.approx(reference[0].step_weight, abs=1e-9)
        if packing == "off":
            assert all(batch.examples <= 1 for batch in batches)


def test_micro_batches_stay_within_the_budget(examples: Listed) -> None:
    source = loader(examples, batch_size=23)
    assert all(len(batch.input_ids) <= 30 for batch in source.next())
    assert len(loader(examples, batch_size=23, micro_batch_tokens=10_000).next()) == 1


def test_steps_of_tokens_are_whole_bins(examples: Listed) -> None:
    source = loader(examples, batch_tokens=40)  # three bins of twelve
    epoch = [source.next() for _ in range(source.steps_per_epoch)]
    assert sorted(flat(members(step) for step in epoch)) == list(range(23))
    assert all(sum(len(batch.input_ids) for batch in step) <= 36 for step in epoch)
    assert loader(examples, batch_tokens=2).steps_per_epoch >= source.steps_per_epoch


def test_packed_companions_change_every_epoch() -> None:
    source = loader(numbered(60, longest=6), batch_tokens=12)
    count = source.steps_per_epoch
    assert sorted(steps(source, count)) != sorted(steps(source, count))
    assert source.steps_per_epoch == count
    assert source.epoch == 2.0


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_tokens": 30}])
@settings(max_examples=25, deadline=None)
@given(done=st.integers(0, 20), world_size=st.integers(1, 3))
def test_a_restored_loader_goes_on_exactly(options: dict[str, int], done: int, world_size: int) -> None:
    examples = numbered(23)
    source = loader(examples, **options)
    for _ in range(done):
        source.next()
    state = json.loads(json.dumps(source.state()))
    fresh = [loader(examples, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for rank in fresh:
        rank.restore(state)
    for _ in range(8):
        expected = source.next()
        found = [rank.next() for rank in fresh]
        assert sorted(flat(members(part) for part in found)) == sorted(members(expected))
        if world_size == 1:
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(expected, found[0], strict=True))
            assert all(torch.equal(a.token_weights, b.token_weights) for a, b in zip(expected, found[0], strict=True))
    assert fresh[0].epoch == source.epoch
    assert fresh[0].state() == source.state()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "train.seed"),
        ({"batch_tokens": 24}, "batch_tokens"),
    ],
)
def test_a_state_of_another_run_is_refused(examples: Listed, change: dict[str, Any], message: str) -> None:
    state = loader(examples).state()
    with pytest.raises(CheckpointError, match=message):
        loader(examples, **change).restore(state)


def test_a_state_of_other_data_is_refused(examples: Listed) -> None:
    with pytest.raises(CheckpointError, match="number of examples was 23, it is 22 now"):
        loader(numbered(22)).restore(loader(examples).state())


def test_the_log_can_tell_what_a_step_held(examples: Listed) -> None:
    source = loader(examples, shuffle=False)
    source.next()
    info = source.last_step
    assert info.examples == 5
    assert info.tokens == int(examples.lengths[:5].sum())
    assert info.trained == int(examples.trained[:5].sum())
    assert info.weight == float(examples.weights[:5].sum())
    assert source.tokens_per_step == pytest.approx(examples.lengths.sum() / 5)


def test_no_examples_are_an_error() -> None:
    with pytest.raises(DataError, match="no example"):
        loader(Listed([]))


def test_exactly_one_size_of_step_is_given(examples: Listed) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Loader(examples, max_length=12, micro_batch_tokens=12)


@pytest.mark.parametrize("world_size", [1, 2, 30])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_evaluation_sees_every_example_once(examples: Listed, world_size: int, packing: Any) -> None:
    ranks = [list(eval_batches(examples, 30, rank, world_size, packing=packing)) for rank in range(world_size)]
    assert sorted(flat(members(batches) for batches in ranks)) == list(range(23))
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch.step_weight for batches in ranks for batch in batches} == {float(examples.weights.sum())}


@pytest.mark.parametrize("known", [True, False])
def test_all_ranks_ask_the_reference_or_none_does(known: bool) -> None:
    rows = [Example(np.arange(4, dtype=np.int32), np.ones(4, np.float32), (2, 3, 4), (-1, 0, 0)) for _ in range(2)]
    if known:
        rows = [replace(row, reference=np.zeros(3, np.float32)) for row in rows]
    step = Step(Listed(rows), np.arange(2))
    ranks = [list(step.batches(30, rank, 3, packing=False)) for rank in range(3)]
    assert sorted(batch.examples for batches in ranks for batch in batches) == [0, 1, 1]
    assert all(("reference" in batch.extras) is known for batches in ranks for batch in batches)
