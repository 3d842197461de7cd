"""Losses that jump up, beside those of the steps before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from burnish.config.sections import Spike

__all__ = ["Spikes"]


class Spikes:
    """Looks for losses far above those of the steps before.

    Args:
        config: The section of the run file.
    """

    def __init__(self, config: Spike) -> None:
        self._sigma = config.sigma
        self._losses: deque[float] = deque(maxlen=config.window)
        self._enough = max(8, config.window // 4)

    def is_one(self, loss: float) -> bool:
        """Whether `loss` is a spike beside the steps before it."""
        if len(self._losses) < self._enough:
            return False
        mean = math.fsum(self._losses) / len(self._losses)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in self._losses) / len(self._losses))
        return loss > mean + self._sigma * deviation

    def add(self, loss: float) -> None:
        """Remembers the loss of a step that was applied."""
        self._losses.append(loss)

    def state(self) -> list[float]:
        """JSON-able."""
        return list(self._losses)

    def restore(self, state: Sequence[float]) -> None:
        """Goes on from `state`."""
        self._losses.clear()
        self._losses.extend(state)
