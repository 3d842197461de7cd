"""Optimal transport between two sets of numbers, for losses that compare distributions and not single pairs (AOT, 2406.05882).

On a line the optimal coupling goes by rank, for every convex cost of the difference: smallest with smallest, largest with largest. Where
values have weights, it goes by mass: a value is coupled with as many partners as its mass reaches over, so a value of weight 2 does what
two values of weight 1 do. Equal values share their partners evenly, so nothing depends on the order in which values stand.

The coupling is that of a whole optimiser step, while losses are evaluated one micro-batch at a time. With l the loss of a coupled pair,
L = sum over couplings of mass l(a, b), and a micro-batch holds some of the a and some of the b:

    dL/da = sum over a's partners of mass l_1(a, b)          dL/db = sum over b's partners of mass l_2(a, b)

Partners are constants, known from a pass over the step without gradients. So a micro-batch returns the couplings of its own a as they
are, and those of its own b less their value: over all micro-batches and ranks, values add up to L and gradients to those of L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from burnish.objectives.base import Totals

Partners = dict[float, list[tuple[float, float]]]
"""Value -> (partner, share of the value's mass)."""


@dataclass(frozen=True, slots=True)
class Matches:
    """Who the values of one micro-batch are coupled with: M couplings, of value `places[m]` with the number `partners[m]`."""

    places: torch.Tensor  # int64 [M]
    partners: torch.Tensor  # [M]
    masses: torch.Tensor  # [M]; those of one place sum to its weight


def couple(left: Mapping[float, float], right: Mapping[float, float]) -> tuple[Partners, Partners]:
    """The optimal coupling of two sets of values with their weights, seen from either side.

    Args:
        left: Value -> weight, 0 or more.
        right: The same; as much weight in all.
    """
    rows = [sorted((value, weight) for value, weight in side.items() if weight > 0) for side in (left, right)]
    least = 1e-12 * sum(weight for _, weight in rows[0])  # what rounding may leave of a weight
    found: tuple[Partners, Partners] = ({}, {})
    at, spent = [0, 0], [0.0, 0.0]
    while at[0] < len(rows[0]) and at[1] < len(rows[1]):
        (a, weight_a), (b, weight_b) = rows[0][at[0]], rows[1][at[1]]
        mass = min(weight_a - spent[0], weight_b - spent[1])
        found[0].setdefault(a, []).append((b, mass / weight_a))
        found[1].setdefault(b, []).append((a, mass / weight_b))
        for side, weight in enumerate((weight_a, weight_b)):
            spent[side] += mass
            if weight - spent[side] <= least:
                at[side], spent[side] = at[side] + 1, 0.0
    return found


def match_step(
    values: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[torch.Tensor], totals: Totals
) -> list[tuple[Matches, Matches]]:
    """Couples the two sides of a step, over all micro-batches and ranks. Waits for the device once.

    Args:
        values: Of each micro-batch, the left and the right values [P].
        weights: Of each micro-batch, the weights of its pairs [P].
        totals: Adds up over the ranks. Exact values are its keys, and so the ranks learn each other's.

    Returns:
        The matches of each micro-batch's left values and of its right ones.
    """
    sides = [torch.cat([pair[side].detach().double() for pair in values]) for side in (0, 1)]
    gathered = torch.stack([*sides, torch.cat([weight.double() for weight in weights]).to(sides[0].device)])
    numbers = cast("list[list[float]]", gathered.tolist())  # pyright: ignore[reportUnknownMemberType]
    shares: dict[str, tuple[float, float]] = {}
    for name, column in zip(("left", "right"), numbers[:2], strict=True):
        for value, weight in zip(column, numbers[2], strict=True):
            key = f"{name} {_known(value).hex()}"
            shares[key] = (shares.get(key, (0.0, 0.0))[0] + weight, 1.0)
    step: dict[str, dict[float, float]] = {"left": {}, "right": {}}
    for key, (weight, _) in totals(shares).items():
        name, value = key.split(" ")
        step[name][_known(float.fromhex(value))] = weight
    partners = couple(step["left"], step["right"])
    found: list[tuple[Matches, Matches]] = []
    begin = 0
    for left, _ in values:
        part = slice(begin, begin := begin + len(left))
        both = [_matches(column[part], numbers[2][part], side, left) for column, side in zip(numbers[:2], partners, strict=True)]
        found.append((both[0], both[1]))
    return found


def transported(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    left: torch.Tensor,
    right: torch.Tensor,
    matches: tuple[Matches, Matches],
) -> torch.Tensor:
    """One micro-batch's share of the loss of the whole step, a scalar (the module says how it is cut).

    Args:
        loss: Of coupled values, [M] and [M] -> [M].
        left: The micro-batch's left values [P], whose couplings are counted here.
        right: Its right values [P], which add their gradient alone.
        matches: Of the left values and of the right ones.
    """
    mine, theirs = matches
    total = (mine.masses * loss(left[mine.places], mine.partners)).sum()
    if not right.requires_grad:
        return total
    other = (theirs.masses * loss(theirs.partners, right[theirs.places])).sum()
    return total + (other - other.detach())


def _matches(values: Sequence[float], weights: Sequence[float], partners: Partners, like: torch.Tensor) -> Matches:
    rows = [
        (place, partner, weight * share)
        for place, (value, weight) in enumerate(zip(values, weights, strict=True))
        for partner, share in partners.get(_known(value), ())
    ]
    places, others, masses = zip(*rows, strict=True) if rows else ((), (), ())
    return Matches(
        torch.tensor(places, dtype=torch.int64).to(like.device),
        torch.tensor(others, dtype=torch.float64).to(like.device, like.dtype),
        torch.tensor(masses, dtype=torch.float64).to(like.device, like.dtype),
    )


def _known(value: float) -> float:
    """The value as a key: 0 for -0 too, and one NaN for all of them, which finds itself again (the engine skips such a step)."""
    return math.nan if math.isnan(value) else value + 0.0
