"""Examples -> one flat Batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from burnish.data.tree import is_tree, loss_weight, segments_of
from burnish.data.types import Batch, Example


def collate(
    examples: Sequence[Example], *, step_weight: float, step_tokens: float = 0.0, last: bool = True, referenced: bool = False
) -> Batch:
    """Lays examples end to end: a forest, never padded.

    A token with weight w > 0 becomes a prediction whose truth it is, made at the token before it: in its own segment, or at the end of the
    parent. The first token of a root is never predicted. Positions start at 0 in every root and go on in its children.

    With no examples at all the batch is a placeholder of one token and no predictions: ranks that have run out of examples still take
    part in the step's collective operations, and add exactly nothing.

    Args:
        examples: The micro-batch, in order. Each at least one token long.
        step_weight: The sum of what the examples count in the loss, over all micro-batches of the optimiser step on all ranks.
        step_tokens: The sum of the token weights of the first branches, over the same.
        last: Whether this is the last micro-batch of its step.
        referenced: For a placeholder: the reference's log-probabilities are known in this step, so there is nothing to ask it.

    Returns:
        A Batch with T = the sum of the lengths, K = the number of trained predictions.
    """
    if examples and not any(map(is_tree, examples)):
        return _roots(examples, step_weight, last)
    made = _forest(examples, step_weight, step_tokens, last)
    if referenced and not examples:
        made.extras["reference"] = torch.zeros(0)
    return made


def _roots(segments: Sequence[Example], step_weight: float, last: bool) -> Batch:
    """A forest of roots, all at once."""
    lengths = np.array([len(example.input_ids) for example in segments], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    ids = np.concatenate([example.input_ids for example in segments]).astype(np.int64)
    weights = np.concatenate([example.weights for example in segments]).astype(np.float32)
    weights[starts] = 0  # nothing comes before a first token
    places = np.flatnonzero(weights > 0)
    token_weights = weights[places]
    return Batch(
        input_ids=torch.as_tensor(ids),
        positions=torch.as_tensor(np.arange(len(ids)) - np.repeat(starts, lengths)),
        doc_ends=tuple(ends.tolist()),
        parents=(-1,) * len(lengths),
        rows=torch.as_tensor(places - 1),
        targets=torch.as_tensor(ids[places]),
        token_weights=torch.as_tensor(token_weights),
        weight=float(token_weights.sum(dtype=np.float64)),
        step_weight=step_weight,
        last=last,
        examples=len(segments),
    )


class _Forest:
    """Segments laid end to end. One that is its parent's only child, right behind it, is the same to attention, and joins it."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.parents: list[int] = []
        self.positions: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.branches: list[int] = []
        self.branch_segments: list[int] = []
        self.branch_ends: list[int] = []
        self.length = 0

    def add(self, example: Example) -> None:
        """One example's segments."""
        offset, segments = self.length, segments_of(example)
        children = [sum(parent == segment for _, _, parent in segments) for segment in range(len(segments))]
        depths: list[int] = []
        numbers: list[int] = []  # of this example's segments within the forest
        for segment, (start, end, parent) in enumerate(segments):
            depth = depths[parent] if parent >= 0 else 0
            depths.append(depth + end - start)
            self.positions.append(np.arange(depth, depths[-1]))
            if parent >= 0 and parent == segment - 1 and children[parent] == 1:
                numbers.append(numbers[parent])
                self.ends[numbers[parent]] = offset + end
            else:
                numbers.append(len(self.ends))
                self.ends.append(offset + end)
                self.parents.append(numbers[parent] if parent >= 0 else -1)
            self._predict(example, start, end, segments[parent][1] if parent >= 0 else None, numbers[-1])
        self.length = offset + segments[-1][1]

    def _predict(self, example: Example, start: int, end: int, parent_end: int | None, number: int) -> None:
        skipped = int(parent_end is None)  # nothing comes before the first token of a root
        places = np.flatnonzero(example.weights[start + skipped : end] > 0) + start + skipped
        if not len(places):
            return
        rows = places - 1
        if parent_end is not None and places[0] == start:
            rows[0] = parent_end - 1
        self.rows.append(rows + self.length)
        self.places.append(places + self.length)
        self.branches.append(len(places))
        self.branch_segments.append(number)
        self.branch_ends.append(self.length + end - 1)


def _forest(examples: Sequence[Example], step_weight: float, step_tokens: float, last: bool) -> Batch:
    laid = _Forest()
    for example in examples or [Example(np.zeros(1, np.int32), np.zeros(1, np.float32))]:
        laid.add(example)
    ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64) if examples else np.zeros(1, np.int64)
    weights = np.concatenate([example.weights for example in examples]) if examples else np.zeros(1, np.float32)
    places, rows = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (laid.places, laid.rows))
    counted = [loss_weight(example) for example in examples]
    values = tuple(value for example in examples for value in example.values)
    extras = {
        "lengths": np.array(laid.branches, np.int64),
        "ends": np.array(laid.branch_ends, np.int64),
        "values": np.array(values, np.float32),
        "weights": np.array(counted, np.float32),
    }
    known = [example.reference for example in examples]
    if known and all(one is not None for one in known):
        extras["reference"] = np.concatenate([one for one in known if one is not None]).astype(np.float32)
    return Batch(
        input_ids=torch.as_tensor(ids),
        positions=torch.as_tensor(np.concatenate(laid.positions)),
        doc_ends=tuple(laid.ends),
        parents=tuple(laid.parents),
        rows=torch.as_tensor(rows),
        targets=torch.as_tensor(ids[places]),
        token_weights=torch.as_tensor(weights[places].astype(np.float32)),
        weight=float(sum(counted)),
        step_weight=step_weight,
        last=last,
        examples=len(examples),
        branches=tuple(laid.branches),
        branch_segments=tuple(laid.branch_segments),
        values=values,
        step_tokens=step_tokens,
        extras={name: torch.as_tensor(value) for name, value in extras.items()},
    )
