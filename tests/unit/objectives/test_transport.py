"""The coupling by rank: against sorting, against the best of all pairings, and with anything for values."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.objectives._transport import couple, match_step, transported


def merged(values, weights):
    side = {}
    for value, weight in zip(values, weights, strict=True):
        side[value] = side.get(value, 0.0) + weight
    return side


def cost(left, right):
    return (left - right).square()


def total(values, others, weights, cut):
    """Value and gradients of the transported loss in pieces."""
    sides = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (values, others)]
    pieces = list(zip(*(x.split(cut) for x in sides), strict=True))
    shares = torch.tensor(weights, dtype=torch.float64).split(cut)
    matches = match_step(pieces, shares, dict)
    loss = sum(transported(cost, *piece, match) for piece, match in zip(pieces, matches, strict=True))
    return loss.item(), torch.autograd.grad(loss, sides)


numbers = st.lists(
    st.tuples(st.floats(-5, 5).map(lambda x: round(x, 2)), st.floats(-5, 5).map(lambda x: round(x, 2)), st.integers(0, 3)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(rows=numbers, data=st.data())
def test_weights_are_repetitions_and_cuts_do_not_matter(rows, data):
    values, others, weights = zip(*rows, strict=True)
    repeated = [sorted(x for x, weight in zip(side, weights, strict=True) for _ in range(weight)) for side in (values, others)]
    expected = sum((a - b) ** 2 for a, b in zip(*repeated, strict=True))
    cut, rest = [], len(rows)
    while rest:
        cut.append(data.draw(st.integers(1, rest)))
        rest -= cut[-1]
    found, gradients = total(values, others, weights, cut)
    whole, whole_gradients = total(values, others, weights, [len(rows)])
    assert found == pytest.approx(expected, abs=1e-9)
    assert whole == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradients, whole_gradients)


def test_the_gradient_is_that_of_the_sort():
    values, others = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    found, gradients = total(values, others, [1.0] * 7, [3, 4])
    sides = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (values, others)]
    expected = cost(*(x.sort().values for x in sides)).sum()
    assert found == pytest.approx(expected.item())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, sides))


def test_no_other_pairing_is_cheaper():
    left, right = [0.3, -1.0, 2.0, 0.9], [1.1, 0.0, -3.0, 0.2]
    partners, _ = couple(merged(left, [1.0] * 4), merged(right, [1.0] * 4))
    found = sum((value - other) ** 2 * share for value, row in partners.items() for other, share in row)
    assert found == pytest.approx(min(sum((a - b) ** 2 for a, b in zip(left, order, strict=True)) for order in permutations(right)))


def test_masses_are_split():
    left, right = couple({0.0: 0.5, 1.0: 1.5}, {5.0: 1.0, 6.0: 1.0})
    assert left == {0.0: [(5.0, 1.0)], 1.0: [(5.0, pytest.approx(1 / 3)), (6.0, pytest.approx(2 / 3))]}
    assert right == {5.0: [(0.0, 0.5), (1.0, 0.5)], 6.0: [(1.0, 1.0)]}


def test_weights_that_no_binary_number_holds():
    weights = [0.1, 0.2, 0.3, 0.7, 1.1]
    left, right = couple(merged(range(5), weights), merged(range(5), reversed(weights)))
    for side in (left, right):
        assert sorted(side) == list(range(5))
        assert all(sum(share for _, share in row) == pytest.approx(1.0) for row in side.values())


def test_nothing_and_not_a_number():
    empty = torch.zeros(0)
    matches = match_step([(empty, empty)], [empty], dict)
    assert transported(cost, empty, empty, matches[0]).item() == 0.0
    broken = torch.tensor([float("nan"), 1.0, float("nan")])
    matches = match_step([(broken, torch.zeros(3))], [torch.ones(3)], dict)
    assert transported(cost, broken, torch.zeros(3), matches[0]).isnan()
