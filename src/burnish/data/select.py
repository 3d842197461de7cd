"""Parts of a Batch: the same examples with some of their branches only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from burnish.data.types import Batch


def keep_branches(batch: Batch, keep: Sequence[bool]) -> Batch:
    """The same batch without the tokens, segments and predictions of the branches that are not kept. Prompts stay.

    A prompt that is left with one branch right behind it becomes one segment with it, as if it had never been shared: attention over
    such documents is cheaper than over a tree. Everything that belongs to examples (`weight`, `examples`, values, weights) stays.

    Indices are made on the host and copied to the batch's device; nothing waits for the device.

    Args:
        batch: With `branches` and `branch_segments`. `extras["reference"]`, where it is there, covers all K predictions.
        keep: Of each branch [B], whether it stays.

    Returns:
        A Batch that shares no structure with `batch`, with as many branches as `keep` has true values.

    Raises:
        ValueError: `keep` or the batch's own fields do not fit its branches, a kept segment continues a dropped one, or nothing is left.
    """
    _check(batch, keep)
    dropped = {segment for segment, kept in zip(batch.branch_segments, keep, strict=True) if not kept}
    stays = np.array([segment not in dropped for segment in range(len(batch.doc_ends))])
    if not stays.any():
        raise ValueError("no segment is left, expected a branch to keep or a prompt")
    for segment, parent in enumerate(batch.parents):
        if parent in dropped and segment not in dropped:
            raise ValueError(f"segment {segment} is kept and continues segment {parent}, which is not")
    lengths = np.diff(batch.doc_ends, prepend=0)
    token_stays = np.repeat(stays, lengths)
    number = np.cumsum(stays) - 1
    ends, parents, branch_segments = _join_only_children(
        np.cumsum(lengths[stays]).tolist(),
        [int(number[parent]) if parent >= 0 else -1 for parent, kept in zip(batch.parents, stays, strict=True) if kept],
        [int(number[segment]) for segment, kept in zip(batch.branch_segments, keep, strict=True) if kept],
    )
    device = batch.input_ids.device
    tokens = _index(np.flatnonzero(token_stays), device)
    predictions = _index(np.flatnonzero(np.repeat(np.asarray(keep, dtype=bool), batch.branches)), device)
    branches = _index(np.flatnonzero(keep), device)
    place = _index(np.cumsum(token_stays) - 1, device)  # where each token that stays comes to stand
    extras = dict(batch.extras)
    if "lengths" in extras:
        extras["lengths"] = extras["lengths"].index_select(0, branches)
    if "ends" in extras:
        extras["ends"] = place.index_select(0, extras["ends"].index_select(0, branches))
    if "reference" in extras:
        extras["reference"] = extras["reference"].index_select(0, predictions)
    return replace(
        batch,
        input_ids=batch.input_ids.index_select(0, tokens),
        positions=batch.positions.index_select(0, tokens),
        doc_ends=ends,
        parents=parents,
        rows=place.index_select(0, batch.rows.index_select(0, predictions)),
        targets=batch.targets.index_select(0, predictions),
        token_weights=batch.token_weights.index_select(0, predictions),
        branches=tuple(count for count, kept in zip(batch.branches, keep, strict=True) if kept),
        branch_segments=branch_segments,
        extras=extras,
    )


def _check(batch: Batch, keep: Sequence[bool]) -> None:
    """Whether the lengths of everything that is cut agree."""
    count, predictions = len(batch.branches), batch.rows.shape[0]
    if len(keep) != count:
        raise ValueError(f"found {len(keep)} decisions for {count} branches")
    if len(batch.branch_segments) != count:
        raise ValueError(f"found the segments of {len(batch.branch_segments)} branches, expected those of {count}")
    if sum(batch.branches) != predictions:
        raise ValueError(f"the branches have {sum(batch.branches)} predictions, the batch has {predictions}")
    reference = batch.extras.get("reference")
    if reference is not None and reference.shape[0] != predictions:
        raise ValueError(f"the reference covers {reference.shape[0]} predictions, expected all {predictions}")


def _join_only_children(
    ends: list[int], parents: list[int], branches: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Segments that are no branch become one with their only child, where it stands right behind: new ends, parents, branch segments."""
    children, own = Counter(parents), set(branches)
    joined = [i > 0 and parent == i - 1 and children[parent] == 1 and parent not in own for i, parent in enumerate(parents)]
    number = (np.cumsum(~np.array(joined)) - 1).tolist()
    last = [i + 1 == len(ends) or not joined[i + 1] for i in range(len(ends))]
    return (
        tuple(end for end, is_last in zip(ends, last, strict=True) if is_last),
        tuple(number[parent] if parent >= 0 else -1 for parent, gone in zip(parents, joined, strict=True) if not gone),
        tuple(number[segment] for segment in branches),
    )


def _index(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 on `device`."""
    return torch.as_tensor(values.astype(np.int64)).to(device, non_blocking=True)
