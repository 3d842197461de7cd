"""Examples -> one flat Batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from burnish.data.types import Batch, Example


def collate(examples: Sequence[Example], *, step_weight: float, last: bool = True) -> Batch:
    """Lays examples end to end: a forest of roots, never padded.

    A token with weight w > 0 at place i of its example becomes a prediction made at token i - 1 whose truth is token i. The first token
    of an example is never predicted. Positions start again at 0 in every example.

    With no examples at all the batch is a placeholder of one token and no predictions: ranks that have run out of examples still take
    part in the step's collective operations, and add exactly nothing.

    Args:
        examples: The micro-batch, in order. Each at least one token long.
        step_weight: The sum of token weights over all micro-batches of the optimiser step on all ranks.
        last: Whether this is the last micro-batch of its step.

    Returns:
        A Batch with T = the sum of the lengths, K = the number of trained predictions, N = len(examples).
    """
    segments = examples or [Example(np.zeros(1, np.int32), np.zeros(1, np.float32))]
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
        examples=len(examples),
    )
