"""Seeded orders that are pure functions of their key.

A shuffled order must be the same after a resume, on every rank, and under every version of numpy (whose random streams may change between
releases). So no generator with a state is used: each index is hashed together with a key such as (seed, epoch), and the order is the
order of the hashes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)


def hashed(values: npt.NDArray[np.integer], *key: int) -> HashArray:
    """Hashes each value with the key; equal values and keys give equal hashes, and different ones differ (each key is a bijection).

    The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    """
    state = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        for part in (*key, 0):
            state = _finalise(state * _STEP + np.uint64(part % 2**64) + _STEP)
    return state


def permutation(count: int, *key: int) -> IntArray:
    """The numbers 0..count-1 in the order that belongs to the key."""
    return np.argsort(hashed(np.arange(count), *key), kind="stable").astype(np.int64)


def pick(count: int, *key: int) -> int:
    """One of 0..count-1, decided by the key."""
    return int(hashed(np.zeros(1, np.int64), *key)[0]) % count


def _finalise(state: HashArray) -> HashArray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
