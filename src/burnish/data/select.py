"""A part of a batch as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from burnish.data.types import Batch


def keep_branches(batch: Batch, keep: Sequence[bool]) -> Batch:
    """The same batch without some branches: their tokens and predictions are gone, prompts stay, and what is counted stays too.

    What the reference says must not be known yet.

    Everything is decided on the host; the device is only told which rows to take.

    Args:
        batch: With branches, each a segment of its own that no other hangs under.
        keep: One flag for each branch [B].
    """
    assert "reference" not in batch.extras
    gone = {segment for segment, stays in zip(batch.branch_segments, keep, strict=True) if not stays}
    starts = (0, *batch.doc_ends[:-1])
    kept = [segment for segment in range(len(batch.doc_ends)) if segment not in gone]
    renamed = {segment: place for place, segment in enumerate(kept)} | {-1: -1}
    tokens = np.concatenate([np.arange(starts[segment], batch.doc_ends[segment]) for segment in kept])
    moved = np.zeros(batch.doc_ends[-1], np.int64)
    moved[tokens] = np.arange(len(tokens))
    stays = np.array(keep, bool)
    predictions = np.flatnonzero(np.repeat(stays, batch.branches))
    device = batch.input_ids.device
    token_index, moved_index, prediction_index, branch_index = (
        torch.as_tensor(index).to(device, non_blocking=True) for index in (tokens, moved, predictions, np.flatnonzero(stays))
    )
    extras = dict(batch.extras)
    extras["lengths"] = extras["lengths"][branch_index]
    extras["ends"] = moved_index[extras["ends"][branch_index]]
    return replace(
        batch,
        input_ids=batch.input_ids[token_index],
        positions=batch.positions[token_index],
        doc_ends=tuple(np.cumsum([batch.doc_ends[segment] - starts[segment] for segment in kept]).tolist()),
        parents=tuple(renamed[batch.parents[segment]] for segment in kept),
        rows=moved_index[batch.rows[prediction_index]],
        targets=batch.targets[prediction_index],
        token_weights=batch.token_weights[prediction_index],
        branches=tuple(count for count, on in zip(batch.branches, keep, strict=True) if on),
        branch_segments=tuple(renamed[segment] for segment, on in zip(batch.branch_segments, keep, strict=True) if on),
        extras=extras,
    )
