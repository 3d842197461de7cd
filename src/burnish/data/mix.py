"""Several sources in one stream: in which order their rows meet, and when the stream ends.

    proportional    by weight, no repeats; a source that has run out drops out, until all have
    round_robin     one row of each in turn, weights aside; a source that has run out drops out, until all have
    oversample      by weight; a source that has run out begins again, until the last of them has run out
    undersample     by weight; the stream ends when the first has run out

Weights are shares: with 3 and 1, three rows of four come from the first source, as long as it lasts.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, Literal, TypeVar

from burnish.core.errors import SourceError

Strategy = Literal["proportional", "round_robin", "oversample", "undersample"]
T = TypeVar("T")


def mix(sources: Sequence[Iterable[T]], weights: Sequence[float], strategy: Strategy, seed: int) -> Iterator[T]:
    """Draws from several sources, lazily; the order depends on the arguments alone.

    Args:
        sources: One iterable each; with `oversample`, iterating anew must begin anew (a list, not a generator).
        weights: One positive share each.
        strategy: See above.
        seed: Decides the draws. `random.Random` promises the same numbers in every version of Python.

    Yields:
        The rows. Every source keeps its own order.

    Raises:
        ValueError: no source, as many weights as sources are not there, or one is not positive.
        SourceError: a source that has to begin again has no row.
    """
    if not sources or len(sources) != len(weights) or min(weights) <= 0:
        raise ValueError(f"expected one positive weight for each of {len(sources)} sources, found {list(weights)}")
    streams = [_Stream(source) for source in sources]
    if strategy == "round_robin":
        return _in_turn(streams)
    draws = random.Random(seed)
    if strategy == "proportional":
        return _until_all_end(streams, weights, draws)
    return _oversampled(streams, weights, draws) if strategy == "oversample" else _undersampled(streams, weights, draws)


class _Stream(Generic[T]):
    """A source that knows, one row ahead, whether it has run out."""

    def __init__(self, source: Iterable[T]) -> None:
        self._source = source
        self._ahead: list[T] = []
        self._rows = iter(source)
        self._fill()

    @property
    def ended(self) -> bool:
        return not self._ahead

    def take(self) -> T:
        row = self._ahead.pop()
        self._fill()
        return row

    def restart(self) -> None:
        self._rows = iter(self._source)
        self._fill()

    def _fill(self) -> None:
        for row in self._rows:
            self._ahead.append(row)
            return


def _draw(weights: Sequence[float], draws: random.Random) -> int:
    ends = list(accumulate(weights))
    return min(bisect_right(ends, draws.random() * ends[-1]), len(ends) - 1)


def _in_turn(streams: Sequence[_Stream[T]]) -> Iterator[T]:
    live = [index for index, stream in enumerate(streams) if not stream.ended]
    while live:
        for index in live:
            yield streams[index].take()
        live = [index for index in live if not streams[index].ended]


def _until_all_end(streams: Sequence[_Stream[T]], weights: Sequence[float], draws: random.Random) -> Iterator[T]:
    while live := [index for index, stream in enumerate(streams) if not stream.ended]:
        index = live[_draw([weights[index] for index in live], draws)]
        yield streams[index].take()


def _undersampled(streams: Sequence[_Stream[T]], weights: Sequence[float], draws: random.Random) -> Iterator[T]:
    while not any(stream.ended for stream in streams):
        index = _draw(weights, draws)
        yield streams[index].take()


def _oversampled(streams: Sequence[_Stream[T]], weights: Sequence[float], draws: random.Random) -> Iterator[T]:
    waiting = set(range(len(streams)))  # for their first end
    while waiting:
        index = _draw(weights, draws)
        if streams[index].ended:
            streams[index].restart()
        if streams[index].ended:
            raise SourceError(f"source {index + 1} has no row to begin again with")
        yield streams[index].take()
        if streams[index].ended:
            waiting.discard(index)
