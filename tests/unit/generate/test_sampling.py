"""Sampling, with numbers: each filter against hand-computed cases and against the reference in transformers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from burnish.core.errors import ConfigError
from burnish.generate.sampling import (
    RULED_OUT,
    Options,
    choose,
    distribution,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repeats,
)

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.1])
LOGITS = PROBABILITIES.log()


def survivors(logits: torch.Tensor) -> list[int]:
    return (logits > RULED_OUT).nonzero().flatten().tolist()


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_likeliest(k: int, expected: list[int]) -> None:
    assert survivors(keep_top_k(LOGITS, k)) == expected


def test_top_k_keeps_ties_with_the_last() -> None:
    assert survivors(keep_top_k(torch.tensor([3.0, 1.0, 1.0, 0.0]), 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.0, [0]), (0.3, [0]), (0.51, [0, 1]), (0.74, [0, 1]), (0.76, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, expected: list[int]) -> None:
    assert survivors(keep_top_p(LOGITS, p)) == expected


def test_top_p_does_not_depend_on_the_order_of_the_vocabulary() -> None:
    shuffled = LOGITS[[2, 0, 3, 1]]
    assert survivors(keep_top_p(shuffled, 0.7)) == [1, 3]


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, [0, 1, 2, 3]), (0.25, [0, 1, 2]), (0.4, [0, 1]), (0.6, [0]), (1.0, [0])])
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(fraction: float, expected: list[int]) -> None:
    assert survivors(keep_min_p(LOGITS, fraction)) == expected


def test_repetition_penalty_pushes_seen_tokens_down_on_both_sides_of_zero() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0])
    assert penalise_repeats(logits, torch.tensor([0, 1, 1, 3]), 2.0).tolist() == [1.0, -4.0, 1.0, 0.0]


def test_temperature_sharpens_and_flattens() -> None:
    assert torch.allclose(distribution(LOGITS, Options(temperature=1.0)), PROBABILITIES)
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert torch.allclose(distribution(LOGITS, Options(temperature=0.5)), squared)
    rooted = PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()
    assert torch.allclose(distribution(LOGITS, Options(temperature=2.0)), rooted)


def test_filters_leave_a_distribution_over_the_survivors() -> None:
    left = distribution(LOGITS, Options(temperature=1.0, top_k=2))
    assert torch.allclose(left, torch.tensor([2 / 3, 1 / 3, 0.0, 0.0]))


def test_greedy_puts_all_mass_on_the_likeliest_token() -> None:
    assert distribution(LOGITS, Options()).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert choose(LOGITS, Options(), torch.Generator()) == 0


def test_greedy_heeds_the_repetition_penalty() -> None:
    assert choose(torch.tensor([2.0, 1.5, 0.0]), Options(repetition_penalty=2.0), torch.Generator(), seen=[0]) == 1


def test_the_same_seed_draws_the_same_tokens_and_the_frequencies_are_right() -> None:
    options = Options(temperature=1.0)

    def draws(seed: int) -> list[int]:
        rng = torch.Generator().manual_seed(seed)
        return [choose(LOGITS, options, rng) for _ in range(4000)]

    first = draws(1)
    assert first == draws(1)
    assert first != draws(2)
    shares = torch.bincount(torch.tensor(first), minlength=4) / len(first)
    assert torch.allclose(shares, PROBABILITIES, atol=4 * math.sqrt(0.25 / len(first)))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(1, 40),
    top_p=st.floats(0.05, 0.99),
    min_p=st.floats(0.01, 0.99),
    penalty=st.floats(0.5, 2.0),
)
def test_a_batch_of_rows_gets_what_transformers_gives(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 32, generator=rng) * 3
    seen = torch.randint(0, 32, (3, 10), generator=rng)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits)
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        expected = warper(seen, expected)
    options = Options(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    assert torch.allclose(distribution(logits, options, seen), expected.softmax(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, found -1.0"),
        ({"temperature": math.nan}, "temperature must be 0 or more, found nan"),
        ({"top_p": 1.5}, "top_p must be a probability from 0 to 1, found 1.5"),
        ({"min_p": -0.1}, "min_p must be a fraction from 0 to 1, found -0.1"),
        ({"top_k": -3}, "top_k must be 0 (off) or more, found -3"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, found 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0, found 0.0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2^63 - 1, found -1"),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options(**values)  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == message
