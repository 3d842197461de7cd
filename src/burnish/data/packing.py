"""Which examples lie side by side: bins over a whole data set, and micro-batches within one optimiser step.

Batches are flat and never padded, so packing wastes no computation whatever it does. What it decides is how evenly the work is cut:
bins of `max_length` give steps of the same number of tokens, micro-batches of a token budget bound the memory.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

Bin = list[int]


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[Bin]:
    """Packs items into bins: longest first, each into the fullest bin that still has room.

    The bins open at any time are kept by the room they have left, and one bit per amount of room says whether such a bin exists. The
    tightest fit is then the lowest set bit at or above the length, found by a scan over machine words; so n items cost O(n log n) for the
    sorting and O(capacity / 64) words each. The rule never needs more than 11/9 of the fewest bins possible, plus one (Johnson 1973).

    Args:
        lengths: Length of each item in tokens, at least 1.
        capacity: Room of a bin. An item longer than that gets a bin of its own.

    Returns:
        Bins of item numbers. Items of equal length are taken in the given order, so a shuffled order gives other companions, and the number
        and fullness of the bins depend on the lengths alone.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bins: list[Bin] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set while some bin has room for exactly r more tokens
    order = np.argsort(-sizes, kind="stable")
    for item, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room = max(capacity, length)
            number = len(bins)
            bins.append([])
        bins[number].append(item)
        if room > length:
            by_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return bins


def fullness(lengths: Sequence[int] | np.ndarray, bins: int, capacity: int) -> float:
    """The share of the bins' room that holds tokens; 1 is full."""
    return float(np.sum(lengths)) / (bins * capacity) if bins else 0.0


def plan_micro_batches(lengths: Sequence[int] | np.ndarray, budget: int, *, world_size: int = 1, packing: bool = True) -> list[list[Bin]]:
    """Cuts the examples of one step into micro-batches of at most `budget` tokens, and deals these to the ranks.

    Every rank gets the same number of micro-batches, as collective operations need; some may be empty. The plan is a function of its
    arguments alone, so every rank computes the plan of all ranks by itself.

    Args:
        lengths: Tokens of each example of the step.
        budget: Most tokens in a micro-batch. A longer example is a micro-batch by itself.
        world_size: Number of ranks.
        packing: False puts each example into a micro-batch of its own.

    Returns:
        `plan[rank][k]` is the k-th micro-batch of a rank, as places in `lengths`; the biggest come first, so that memory runs out at once
        or never.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bins = best_fit_decreasing(sizes, budget) if packing else [[place] for place in range(len(sizes))]
    rounds = max(1, -(-len(bins) // world_size))
    bins += [[] for _ in range(rounds * world_size - len(bins))]
    if packing:
        bins = _levelled(sizes, len(bins), budget) or bins
    bins = [sorted(members) for members in bins]
    bins.sort(key=lambda members: -int(sizes[members].sum()))
    ranks: list[list[Bin]] = [[] for _ in range(world_size)]
    for turn in range(rounds):
        dealt = bins[turn * world_size : (turn + 1) * world_size]
        # The heaviest of a round goes to the rank that got the lightest of the last one.
        for rank, members in enumerate(dealt if turn % 2 == 0 else reversed(dealt)):
            ranks[rank].append(members)
    return ranks


def _levelled(sizes: np.ndarray, count: int, budget: int) -> list[Bin] | None:
    """The same items in `count` bins of about equal load: longest first into the emptiest bin. None where a bin would overflow."""
    bins: list[Bin] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in np.argsort(-sizes, kind="stable").tolist():
        load, number = loads[0]
        length = int(sizes[item])
        if load and load + length > budget:
            return None
        bins[number].append(item)
        heapq.heapreplace(loads, (load + length, number))
    return bins
