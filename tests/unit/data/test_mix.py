from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import SourceError
from burnish.data.mix import Strategy, mix

STRATEGIES: tuple[Strategy, ...] = ("proportional", "round_robin", "oversample", "undersample")
sizes = st.lists(st.integers(0, 30), min_size=1, max_size=4)
seeds = st.integers(0, 2**32 - 1)


def named(*lengths: int) -> list[list[tuple[int, int]]]:
    """Sources whose rows say where they come from: (source, row)."""
    return [[(source, row) for row in range(length)] for source, length in enumerate(lengths)]


@pytest.mark.parametrize("strategy", ["proportional", "round_robin"])
@given(lengths=sizes, seed=seeds)
def test_every_row_once_and_each_source_in_its_order(strategy: Strategy, lengths: list[int], seed: int) -> None:
    sources = named(*lengths)
    mixed = list(mix(sources, [1.0 + n for n in range(len(lengths))], strategy, seed))
    for number, source in enumerate(sources):
        assert [row for row in mixed if row[0] == number] == source


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=seeds)
def test_oversampling_ends_with_the_last_first_end(lengths: list[int], seed: int) -> None:
    mixed = list(mix(named(*lengths), [1.0] * len(lengths), "oversample", seed))
    counts = Counter(source for source, _ in mixed)
    assert all(counts[source] >= length for source, length in enumerate(lengths))
    last = mixed[-1][0]
    assert counts[last] == lengths[last]
    for number, length in enumerate(lengths):
        assert [row for source, row in mixed if source == number] == list(islice((n % length for n in count()), counts[number]))


@given(lengths=sizes, seed=seeds)
def test_undersampling_ends_with_the_first_end(lengths: list[int], seed: int) -> None:
    mixed = list(mix(named(*lengths), [1.0] * len(lengths), "undersample", seed))
    counts = Counter(source for source, _ in mixed)
    if 0 in lengths:
        assert not mixed
        return
    ended = [source for source, length in enumerate(lengths) if counts[source] == length]
    assert ended == [mixed[-1][0]]
    assert all(counts[source] <= length for source, length in enumerate(lengths))


def test_turns_are_taken_in_order() -> None:
    assert list(mix(["abc", "d", "", "ef"], [9, 1, 1, 1], "round_robin", 0)) == list("adebfc")


@pytest.mark.parametrize("strategy", ["proportional", "oversample", "undersample"])
def test_weights_are_shares(strategy: Strategy) -> None:
    mixed = list(islice(mix(named(50_000, 50_000), [3.0, 1.0], strategy, 7), 20_000))
    share = sum(source == 0 for source, _ in mixed) / len(mixed)
    assert share == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_depends_on_the_seed_alone(strategy: Strategy) -> None:
    def order(seed: int) -> list[tuple[int, int]]:
        return list(mix(named(40, 60, 20), [1, 2, 3], strategy, seed))

    assert order(1) == order(1)
    assert (order(1) == order(2)) == (strategy == "round_robin")


def test_the_order_stays_the_same_over_versions() -> None:
    assert "".join(mix(["aaaaaa", "bbbbbb"], [2, 1], "proportional", 42)) == "aaaabbbaabbb"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_drawn_lazily(strategy: Strategy) -> None:
    taken = [0, 0]

    def endless(source: int) -> Iterator[int]:
        for row in count():
            taken[source] += 1
            yield row

    list(islice(mix([endless(0), endless(1)], [1, 1], strategy, 0), 10))
    assert sum(taken) <= 10 + 2


def test_wrong_arguments() -> None:
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="expected one positive weight for each of 2 sources, found "):
            mix(["a", "b"], weights, "proportional", 0)
    with pytest.raises(ValueError, match="expected one positive weight for each of 0 sources"):
        mix([], [], "proportional", 0)


def test_what_cannot_begin_again() -> None:
    with pytest.raises(SourceError, match="source 2 has no row to begin again with"):
        list(mix([[1, 2, 3], []], [1, 1], "oversample", 0))
