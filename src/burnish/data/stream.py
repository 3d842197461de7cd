"""Rows rendered while training, for data that does not fit the disk, or does not end.

    rows -> [pipeline, in workers] -> incoming -> shuffle buffer -> held -> step

The order is exact all the same. A draw from the buffer is a function of (seed, epoch, number of the draw), and the state names every
example that has been read and not yet trained on by (place of its row in the stream, piece of the row). A resumed run reads the stream
again up to the cursor, renders only the rows that are named, and goes on as if it had never stopped.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config.sections import Data
from burnish.core.errors import CheckpointError
from burnish.data.account import Account
from burnish.data.cache import ExampleBlock
from burnish.data.loader import Listed, Step, StepInfo
from burnish.data.order import pick
from burnish.data.pipeline import Chunk, Renderer, Task, chunks
from burnish.data.prepare import check_something_is_left, open_set, pipeline_of
from burnish.data.tally import Tally
from burnish.data.types import Batch, BatchKind, Example
from burnish.data.workers import cores, prepared

BUFFER = 2048
"""Examples that the shuffle chooses from."""

_MOST_WORKERS = 4  # in the shadow of training, each of them feeds far more than a device can eat


@dataclass(frozen=True, slots=True)
class _Placed:
    """An example with the place of its row in the epoch's stream, and its number among the pieces of the row."""

    turn: int
    piece: int
    example: Example

    @property
    def name(self) -> list[int]:
        return [self.turn, self.piece]


class StreamLoader:
    """A `types.Source` over rows that are rendered as they come, endless over epochs.

    As with `Loader`, the same examples meet in a step on any number of ranks: every rank reads the whole stream, because the step's
    weight and plan must be known without communication. The last step of a pass over the stream holds what is left.

    Args:
        data: The `data` section.
        renderer: Turns items into tokens.
        batch_size: Examples per step over all ranks. Exactly one of this and `batch_tokens`.
        batch_tokens: Most tokens per step over all ranks; a step takes examples as long as they fit, and one at least.
        micro_batch_tokens: Most tokens computed at once on one rank.
        seed: Decides the mixing of sources and the shuffling.
        rank: Which of the ranks with examples of their own this is.
        world_size: How many these are.
        processes: All that read the stream on this machine, which share its cores; as many as `world_size` if left out.
        buffer: Examples that the shuffle chooses from.
        base: The run file's folder, for formats in files of the user's own.
        kind: What the objective compares.
        mismatched: As for `Loader`.
    """

    def __init__(
        self,
        data: Data,
        renderer: Renderer,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        micro_batch_tokens: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        processes: int | None = None,
        buffer: int = BUFFER,
        base: Path = Path(),
        kind: BatchKind = "tokens",
        mismatched: bool = False,
    ) -> None:
        if (batch_size is None) == (batch_tokens is None):
            raise ValueError("give exactly one of batch_size and batch_tokens")
        self._data = data
        self._mismatched = mismatched
        self._opened = open_set(data.train, kind, seed=seed, streaming=True, base=base)
        self._pipeline = pipeline_of(data, self._opened, renderer)
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._buffer_size = buffer if data.shuffle else 1
        self._workers = max(1, min(_MOST_WORKERS, cores() // (processes or world_size))) if data.workers == "auto" else data.workers
        self.account = self._opened.account()
        """Of the first pass; it grows as rows are read."""
        self.last_step = StepInfo()
        self._last: list[Example] = []
        self._results: Generator[tuple[list[Task], Chunk]] | None = None
        self._begin(0)

    @property
    def steps_per_epoch(self) -> int:
        """Unknown, and so beyond any run: what is due once an epoch never falls due."""
        return sys.maxsize

    @property
    def tokens_per_step(self) -> float:
        """Tokens in a step over all ranks; with `batch_size`, judged by the examples that are waiting in the buffer."""
        if self._batch_tokens is not None:
            return float(self._batch_tokens)
        self._fill()
        waiting = [len(placed.example.input_ids) for placed in self._buffer]
        return float(np.mean(waiting)) * (self._batch_size or 1) if waiting else float(self._data.max_length)

    @property
    def epoch(self) -> float:
        """Whole passes over the stream so far."""
        return float(self._epoch)

    def next(self, policy: Any = None) -> list[Batch]:
        """The micro-batches of the next step on this rank; never empty, and equally many on every rank.

        Raises:
            DataError: a row is malformed, or a whole pass gave nothing to train on.
        """
        step = self._step()
        if not step:
            check_something_is_left(self.account, self._data, "train")
            self._begin(self._epoch + 1)
            step = self._step()
        self._last = [placed.example for placed in step]
        return self.again()

    def again(self) -> list[Batch]:
        """The micro-batches of the step that `next` gave last, cut as `micro_batch_tokens` says now."""
        step = Step(Listed(self._last), np.arange(len(self._last)), mismatched=self._mismatched)
        self.last_step = step.info
        packing = self._data.packing == "auto"
        return list(step.batches(self.micro_batch_tokens, self._rank, self._world_size, packing=packing))

    def halve(self, times: int) -> None:
        """Halves `micro_batch_tokens` so often."""
        self.micro_batch_tokens = max(1, self.micro_batch_tokens >> times)

    def state(self) -> dict[str, Any]:
        """Epoch, cursor (rows read in this epoch), and the examples that were read and not trained on yet."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "carry": [placed.name for placed in self._buffer],
            "incoming": [placed.name for placed in self._incoming],
            "held": [placed.name for placed in self._held],
            "draws": self._draws,
            "seed": self._seed,
            "buffer": self._buffer_size,
            "account": self.account.to_json(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, also on another number of ranks.

        Raises:
            CheckpointError: the state belongs to another seed or buffer, or the stream has other rows now.
        """
        for key, present in (("seed", self._seed), ("buffer", self._buffer_size)):
            if state.get(key) != present:
                raise CheckpointError(f"the checkpoint was made with another shuffle: {key} was {state.get(key)}, it is {present} now")
        names = {key: [(int(turn), int(piece)) for turn, piece in state[key]] for key in ("carry", "incoming", "held")}
        self._begin(int(state["epoch"]))
        found = self._replay(int(state["cursor"]), {turn for waiting in names.values() for turn, _ in waiting})
        try:
            buffer, incoming, held = ([found[name] for name in names[key]] for key in ("carry", "incoming", "held"))
        except KeyError as error:
            raise CheckpointError("the checkpoint was made with other data: a row that was waiting is no longer there") from error
        self._buffer, self._incoming, self._held = list(buffer), deque(incoming), list(held)
        self._draws = int(state["draws"])
        self.account = Account.from_json(state["account"])
        if self._epoch == 0:
            self._tally.account = self.account

    def close(self) -> None:
        """Ends the worker processes."""
        if self._results is not None:
            self._results.close()
        self._results = None

    # The stream, from its source to a step.

    def _begin(self, epoch: int) -> None:
        self.close()
        self._epoch = epoch
        self._cursor = 0  # rows of this epoch that went through the pipeline
        self._draws = 0
        self._incoming: deque[_Placed] = deque()
        self._buffer: list[_Placed] = []
        self._held: list[_Placed] = []  # at most one, that did not fit into the last step
        # Later passes read the same rows again; counting them twice would make the account a lie.
        self._tally = Tally(self.account if epoch == 0 else self._opened.account(), deduplicate=self._data.deduplicate)
        self._tasks = self._opened.tasks(self._data, self._seed)

    def _replay(self, cursor: int, wanted: set[int]) -> dict[tuple[int, int], _Placed]:
        """Reads the stream up to the cursor again, and renders only the rows that are wanted."""
        found: dict[tuple[int, int], _Placed] = {}
        for turn, task in enumerate(islice(self._tasks, cursor)):
            if turn in wanted:
                for placed in _placed(self._pipeline.run([task]).block, turn):
                    found[placed.turn, placed.piece] = placed
            if self._data.deduplicate:
                self._tally.remember(task, self._pipeline.identity_of(task))
        self._cursor = cursor
        return found

    def _pull(self) -> _Placed | None:
        """The next example of the stream, or None at its end."""
        if self._results is None:
            self._results = prepared(chunks(self._tasks), self._pipeline, self._workers)
        while not self._incoming:
            result = next(self._results, None)
            if result is None:
                return None
            tasks, chunk = result
            self._incoming.extend(_placed(self._tally.enter(tasks, chunk).block, self._cursor))
            self._cursor += len(tasks)
        return self._incoming.popleft()

    def _fill(self) -> None:
        while len(self._buffer) < self._buffer_size and (placed := self._pull()) is not None:
            self._buffer.append(placed)

    def _draw(self) -> _Placed | None:
        """An example from the buffer, whose place is taken by the last one."""
        if self._held:
            return self._held.pop()
        self._fill()
        if not self._buffer:
            return None
        place = pick(len(self._buffer), self._seed, self._epoch, self._draws)
        self._draws += 1
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()

    def _step(self) -> list[_Placed]:
        """The examples of the next step; none at the end of a pass."""
        step: list[_Placed] = []
        tokens = 0
        while self._batch_size is None or len(step) < self._batch_size:
            placed = self._draw()
            if placed is None:
                break
            tokens += len(placed.example.input_ids)
            if self._batch_tokens is not None and step and tokens > self._batch_tokens:
                self._held.append(placed)
                break
            step.append(placed)
        return step


def _placed(block: ExampleBlock, first_turn: int) -> Iterator[_Placed]:
    """The examples of a block, whose rows stand from `first_turn` on in the stream."""
    piece, last_row = 0, -1
    for row, example in zip(block.rows.tolist(), block.examples(), strict=True):
        piece = piece + 1 if row == last_row else 0
        last_row = row
        yield _Placed(first_turn + row, piece, example)
