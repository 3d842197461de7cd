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
from burnish.data.packing import best_fit_decreasing, plan_micro_batches
from burnish.data.tree import leading_weight, loss_weight, trained_counts, with_mismatched
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
        """What each example counts in the loss [N]: the sum of the weights of its trained predictions, or 1 for a pair."""
        ...

    @property
    def leading(self) -> npt.NDArray[np.float64]:
        """Sum of the weights of the trained predictions in the first branch of each example [N]."""
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
        rank: Which of the ranks with examples of their own this is.
        world_size: How many these are.
        mismatched: Give each judged answer that of another example of the step beside it (see `tree.with_mismatched`).

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
        mismatched: bool = False,
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
        self._mismatched = mismatched
        self.micro_batch_tokens = micro_batch_tokens
        self._bin_size = max_length if batch_tokens is not None else None
        self._units_per_step = batch_size if batch_size is not None else max(1, (batch_tokens or 0) // max_length)
        self._epoch = 0
        self._cursor = 0  # units (examples, or bins) of this epoch that are used up
        self._units = self._units_of(0)
        self._members: IntArray = np.arange(0)
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

    def looked_at(self, steps: int) -> IntArray:
        """Places of the examples that the first steps hold, in order."""
        if steps >= self.steps_per_epoch:
            return np.arange(len(self._examples))
        units = self._units_of(0)[: steps * self._units_per_step]
        return np.unique(np.concatenate([np.atleast_1d(unit) for unit in units]))

    def refer(self, examples: ExampleSet) -> None:
        """Takes the examples from here, the same ones with more beside their tokens."""
        self._examples = examples

    def next(self, policy: Any = None) -> list[Batch]:
        """The micro-batches of the next step on this rank; never empty, and equally many on every rank."""
        if self._cursor >= len(self._units):
            self._start(self._epoch + 1, 0)
        units = self._units[self._cursor : self._cursor + self._units_per_step]
        self._cursor += len(units)
        self._members = np.concatenate([np.atleast_1d(unit) for unit in units])
        return self.again()

    def again(self) -> list[Batch]:
        """The micro-batches of the step that `next` gave last, cut as `micro_batch_tokens` says now."""
        step = Step(self._examples, self._members, mismatched=self._mismatched)
        self.last_step = step.info
        return list(step.batches(self.micro_batch_tokens, self._rank, self._world_size, packing=self._packed))

    def halve(self, times: int) -> None:
        """Halves `micro_batch_tokens` so often."""
        self.micro_batch_tokens = max(1, self.micro_batch_tokens >> times)

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


class Listed:
    """Examples in a list as an ExampleSet."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self.lengths = np.array([len(example.input_ids) for example in examples], np.int32)
        self.trained = np.array([sum(trained_counts(example)) for example in examples], np.int32)
        self.weights = np.array([loss_weight(example) for example in examples], np.float64)
        self.leading = np.array([leading_weight(example) for example in examples], np.float64)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Example:
        """One example."""
        return self._examples[index]


class Step:
    """The examples of one optimiser step over all ranks, and how they are cut into micro-batches.

    Args:
        examples: A set of examples.
        members: Those of the step, in order.
        mismatched: As for `Loader`.
    """

    def __init__(self, examples: ExampleSet, members: IntArray, *, mismatched: bool = False) -> None:
        if mismatched:
            examples = Listed(with_mismatched([examples[member] for member in members.tolist()]))
            members = np.arange(len(examples))
        self._examples = examples
        self._members = members
        self._lengths = examples.lengths[members]
        self._leading = float(examples.leading[members].sum())
        tokens, trained = (int(column.sum(dtype=np.int64)) for column in (self._lengths, examples.trained[members]))
        self.info = StepInfo(len(members), tokens, trained, float(examples.weights[members].sum()))

    def batches(self, micro_batch_tokens: int, rank: int, world_size: int, *, packing: bool) -> Iterator[Batch]:
        """The micro-batches of one rank; examples are read when they are needed."""
        plan = plan_micro_batches(self._lengths, micro_batch_tokens, world_size=world_size, packing=packing)[rank]
        for number, places in enumerate(plan, start=1):
            chosen = [self._examples[int(self._members[place])] for place in places]
            # All ranks ask the reference, or none does.
            referenced = not chosen and len(self._members) > 0 and self._examples[int(self._members[0])].reference is not None
            last = number == len(plan)
            yield collate(chosen, step_weight=self.info.weight, step_tokens=self._leading, last=last, referenced=referenced)


def eval_batches(
    examples: ExampleSet,
    micro_batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    packing: Packing = "auto",
    mismatched: bool = False,
) -> Iterator[Batch]:
    """All held-out examples once, as the micro-batches of this rank; `step_weight` is the weight of the whole set over all ranks."""
    step = Step(examples, np.arange(len(examples)), mismatched=mismatched)
    yield from step.batches(micro_batch_tokens, rank, world_size, packing=packing == "auto")
