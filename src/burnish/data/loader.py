"""Tokenised examples -> the micro-batches of each optimiser step.

Everything a step holds is a function of (data, seed, epoch, cursor). There is no hidden state and no random generator: every rank knows the
plan of all ranks, the weight of a step over all devices is known without communication, and a resumed run goes on with exactly the
batches that were to come, on any number of devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from burnish.core.errors import CheckpointError, DataError
from burnish.data.collate import collate
from burnish.data.order import IntArray, permutation
from burnish.data.packing import Bin, best_fit_decreasing, plan_micro_batches
from burnish.data.types import Batch, Example

Packing = Literal["auto", "off"]


class ExampleSet(Protocol):
    """Tokenised examples with what the planning needs to know about each of them (satisfied by `data.cache.Examples`)."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each example [N]."""
        ...

    @property
    def trained(self) -> npt.NDArray[np.int32]:
        """Trained predictions of each example [N]."""
        ...

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """Sum of the weights of the trained predictions of each example [N]."""
        ...

    def __len__(self) -> int:
        """Number of examples N."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """One example."""
        ...


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one optimiser step holds over all ranks, for the log."""

    examples: int = 0
    tokens: int = 0
    trained: int = 0
    weight: float = 0.0


class Loader:
    """A `types.Source` over tokenised examples, endless over epochs.

    With `batch_size`, a step is that many examples in the epoch's order: the same examples meet in the same step whether they are packed or
    computed one by one, and on any number of ranks. With `batch_tokens`, the whole data set is packed into bins of `max_length` and a
    step is `batch_tokens // max_length` bins (at least one); companions change every epoch. The last step of an epoch holds what is left:
    nothing is dropped, nothing is repeated.

    Args:
        examples: The tokenised data.
        batch_size: Examples per step over all ranks. Exactly one of this and `batch_tokens`.
        batch_tokens: Tokens per step over all ranks.
        max_length: Longest example; the size of a bin.
        micro_batch_tokens: Most tokens computed at once on one rank.
        packing: `off` computes examples one by one.
        shuffle: A new order every epoch; otherwise the order of the data.
        seed: Decides the orders.
        rank: This process.
        world_size: Number of processes.

    Raises:
        DataError: when there are no examples.
    """

    def __init__(
        self,
        examples: ExampleSet,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int,
        micro_batch_tokens: int,
        packing: Packing = "auto",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if (batch_size is None) == (batch_tokens is None):
            raise ValueError("give exactly one of batch_size and batch_tokens")
        if not len(examples):
            raise DataError("there is no example to train on")
        self._examples = examples
        self._packed = packing == "auto"
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._micro_batch_tokens = micro_batch_tokens
        self._bin_size = max_length if batch_tokens is not None else None
        self._units_per_step = batch_size if batch_size is not None else max(1, (batch_tokens or 0) // max_length)
        self._epoch = 0
        self._cursor = 0  # units (examples, or bins) of this epoch that are used up
        self._units = self._units_of(0)
        self.last_step = StepInfo()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the data; the same in every epoch."""
        return -(-len(self._units) // self._units_per_step)

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens in a step, over all ranks."""
        return float(np.sum(self._examples.lengths, dtype=np.int64)) / self.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with the fraction of the present one."""
        return self._epoch + self._cursor / len(self._units)

    def next(self, policy: Any = None) -> list[Batch]:
        """The micro-batches of the next step on this rank; never empty, and equally many on every rank."""
        if self._cursor >= len(self._units):
            self._start(self._epoch + 1, 0)
        units = self._units[self._cursor : self._cursor + self._units_per_step]
        self._cursor += len(units)
        members = np.concatenate([np.atleast_1d(unit) for unit in units])
        return self._batches(members)

    def state(self) -> dict[str, Any]:
        """Epoch and cursor, and what they refer to. `carry` (examples begun and not finished) is always empty here."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "carry": [],
            "examples": len(self._examples),
            "seed": self._seed,
            "bin_size": self._bin_size,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, also on another number of ranks and with other micro-batches.

        Raises:
            CheckpointError: when the state belongs to other data, another seed, or another way of making steps.
        """
        for key, present in self.state().items():
            if key in ("examples", "seed", "bin_size") and state.get(key) != present:
                what = {"examples": "the number of examples", "seed": "train.seed", "bin_size": "the bin size of train.batch_tokens"}[key]
                raise CheckpointError(
                    f"the checkpoint was made with other data: {what} was {state.get(key)}, it is {present} now",
                    hint="Restore the data and seed of the first run, or start a new one in another output folder.",
                )
        self._start(int(state["epoch"]), int(state["cursor"]))

    def _start(self, epoch: int, cursor: int) -> None:
        self._epoch, self._cursor = epoch, cursor
        self._units = self._units_of(epoch)

    def _units_of(self, epoch: int) -> Sequence[int] | list[IntArray]:
        """The epoch's examples, or bins of examples, in order."""
        count = len(self._examples)
        order = permutation(count, self._seed, epoch) if self._shuffle else np.arange(count)
        if self._bin_size is None:
            return order.tolist()
        bins = best_fit_decreasing(self._examples.lengths[order], self._bin_size)
        # Packing leaves the long examples in the first bins: without a second shuffle an epoch would begin with them.
        turn = permutation(len(bins), self._seed, epoch, 1) if self._shuffle else np.arange(len(bins))
        return [order[bins[number]] for number in turn.tolist()]

    def _batches(self, members: IntArray) -> list[Batch]:
        lengths = self._examples.lengths[members]
        self.last_step = StepInfo(
            examples=len(members),
            tokens=int(lengths.sum(dtype=np.int64)),
            trained=int(self._examples.trained[members].sum(dtype=np.int64)),
            weight=float(self._examples.weights[members].sum()),
        )
        plan = plan_micro_batches(lengths, self._micro_batch_tokens, world_size=self._world_size, packing=self._packed)
        return list(_collated(self._examples, members, plan[self._rank], self.last_step.weight))


def eval_batches(
    examples: ExampleSet, micro_batch_tokens: int, rank: int = 0, world_size: int = 1, *, packing: Packing = "auto"
) -> Iterator[Batch]:
    """All held-out examples once, as the micro-batches of this rank; `step_weight` is the weight of the whole set over all ranks."""
    plan = plan_micro_batches(examples.lengths, micro_batch_tokens, world_size=world_size, packing=packing == "auto")
    yield from _collated(examples, np.arange(len(examples)), plan[rank], float(np.sum(examples.weights)))


def _collated(examples: ExampleSet, members: IntArray, micro_batches: list[Bin], step_weight: float) -> Iterator[Batch]:
    for number, places in enumerate(micro_batches, start=1):
        chosen = [examples[int(members[place])] for place in places]
        yield collate(chosen, step_weight=step_weight, last=number == len(micro_batches))
