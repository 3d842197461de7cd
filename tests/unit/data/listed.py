"""Examples in memory, for the tests of what comes after the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from burnish.data.types import Example


class Listed:
    """A set of examples in memory, with the interface of `data.cache.Examples`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)
        self.lengths = np.array([len(e.input_ids) for e in examples], np.int32)
        self.trained = np.array([int((e.weights[1:] > 0).sum()) for e in examples], np.int32)
        self.weights = np.array([float(e.weights[1:].sum(dtype=np.float64)) for e in examples], np.float64)
        self.leading = np.zeros(len(examples))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def numbered(count: int, *, longest: int = 12, seed: int = 0) -> Listed:
    """Examples of several lengths; the first id of each is its number, so that batches can be told apart."""
    random = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        length = int(random.integers(2, longest + 1))
        weights = random.integers(0, 2, length).astype(np.float32)
        weights[-1] = 1.0
        examples.append(Example(np.array([number, *random.integers(0, 50, length - 1)], np.int32), weights))
    return Listed(examples)
