"""Examples of several segments: a prompt with the answers that hang under it, or steps one after the other.

    prompt ─┬─ chosen           a pair            parents (-1, 0, 0)
            └─ rejected
    prompt ─── answer           a judged answer   parents (-1, 0)
    prompt ─── step ─── step    a solution        parents (-1, 0, 1)

A plain example is one root. A *branch* is a segment with trained tokens, a *path* the tokens from the root to the end of a segment, which
is what the model reads: the limit of `data.max_length` is for paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from burnish.data.types import Example


def is_tree(example: Example) -> bool:
    """Whether the example has segments of its own."""
    return bool(example.ends)


def segments_of(example: Example) -> list[tuple[int, int, int]]:
    """(start, end, parent) of every segment."""
    if not example.ends:
        return [(0, len(example.input_ids), -1)]
    starts = (0, *example.ends[:-1])
    return list(zip(starts, example.ends, example.parents, strict=True))


def paths(example: Example) -> list[int]:
    """Length of the path to the end of every segment."""
    lengths: list[int] = []
    for start, end, parent in segments_of(example):
        lengths.append(end - start + (lengths[parent] if parent >= 0 else 0))
    return lengths


def trained_counts(example: Example) -> list[int]:
    """Trained predictions of every segment; the first token of a root is none, since nothing comes before it."""
    counts: list[int] = []
    for start, end, parent in segments_of(example):
        counts.append(int(np.count_nonzero(example.weights[start + (parent < 0) : end] > 0)))
    return counts


def usable(example: Example) -> bool:
    """Whether there is something to learn from: every segment that nothing hangs under has a trained token."""
    counts = trained_counts(example)
    inner = set(example.parents)
    return all(count for segment, count in enumerate(counts) if segment not in inner)


def leading_weight(example: Example) -> float:
    """The sum of the token weights of the first branch: of the chosen answer of a pair."""
    for start, end, parent in segments_of(example):
        weights = example.weights[start + (parent < 0) : end]
        if np.any(weights > 0):
            return float(weights.sum(dtype=np.float64))
    return 0.0


def loss_weight(example: Example) -> float:
    """What the example counts in the loss."""
    return float(example.weights[1:].sum(dtype=np.float64)) if example.weight is None else example.weight


def grow(sides: Sequence[Example], *, values: tuple[float, ...], weight: float, share: bool = True) -> Example:
    """One tree of several answers to the same prompt.

    The prompt is the longest run of tokens that all sides begin with and none of them trains. So the split is exact whatever a chat
    template does: where it renders the same messages differently before different answers, less is shared.

    Args:
        sides: Plain examples, each of prompt and answer.
        values: The tree's.
        weight: The tree's.
        share: False gives each side a root of its own.
    """
    shared = _shared(sides) if share else 0
    parts = [side.input_ids[shared:] for side in sides]
    weights = [side.weights[shared:].copy() for side in sides]
    parents = [0] * len(sides)
    if shared:
        parts.insert(0, sides[0].input_ids[:shared])
        weights.insert(0, np.zeros(shared, np.float32))
        parents.insert(0, -1)
    else:
        parents = [-1] * len(sides)
        for own in weights:
            own[:1] = 0.0
    ends = np.cumsum([len(part) for part in parts])
    return Example(np.concatenate(parts), np.concatenate(weights), tuple(ends.tolist()), tuple(parents), values, weight)


def chain(parts: Sequence[np.ndarray], *, trained: Sequence[bool], values: tuple[float, ...], weight: float) -> Example:
    """One tree of parts that follow each other; empty ones are left out."""
    kept = [(part, on) for part, on in zip(parts, trained, strict=True) if len(part)]
    weights = np.concatenate([np.full(len(part), float(on), np.float32) for part, on in kept])
    ends = np.cumsum([len(part) for part, _ in kept]).tolist()
    return Example(np.concatenate([part for part, _ in kept]), weights, tuple(ends), tuple(range(-1, len(kept) - 1)), values, weight)


def cut(example: Example, limit: int, *, whole: bool = False) -> Example:
    """The tree with every path cut at `limit` tokens.

    Args:
        example: A tree.
        limit: Most tokens of a path.
        whole: Leave a segment out rather than cut it, with its value (a step whose last token is gone cannot be judged).
    """
    depths = paths(example)
    pieces: list[slice] = []
    parents: list[int] = []
    renamed: dict[int, int] = {-1: -1}
    for segment, (start, end, parent) in enumerate(segments_of(example)):
        before = depths[parent] if parent >= 0 else 0
        room = min(end - start, limit - before)
        if parent not in renamed or room <= 0 or (whole and parent >= 0 and room < end - start):
            continue
        renamed[segment] = len(pieces)
        parents.append(renamed[parent])
        pieces.append(slice(start, start + room))
    lost = len(depths) - len(pieces)
    values = example.values[: len(example.values) - lost] if whole else example.values
    ends = np.cumsum([piece.stop - piece.start for piece in pieces]).tolist()
    ids, weights = (np.concatenate([column[:0], *(column[piece] for piece in pieces)]) for column in (example.input_ids, example.weights))
    weight = float(len(values)) if whole else example.weight  # steps are counted one by one
    return replace(example, input_ids=ids, weights=weights, ends=tuple(ends), parents=tuple(parents), values=values, weight=weight)


def with_mismatched(examples: Sequence[Example]) -> list[Example]:
    """Every judged answer with that of the example before it as a second, mismatched branch under its own prompt.

    The pairing goes round, so each answer is used once; one example alone has nothing to be mismatched with, and stays as it is.
    """
    if len(examples) < 2:
        return list(examples)
    return [_joined(example, examples[place - 1]) for place, example in enumerate(examples)]


def _joined(example: Example, other: Example) -> Example:
    start = other.ends[-2]
    return replace(
        example,
        input_ids=np.concatenate([example.input_ids, other.input_ids[start:]]),
        weights=np.concatenate([example.weights, other.weights[start:]]),
        ends=(*example.ends, len(example.input_ids) + len(other.input_ids) - start),
        parents=(*example.parents, 0),
    )


def _shared(sides: Sequence[Example]) -> int:
    """Length of the prompt that can be shared: each side keeps a token of its own."""
    first = sides[0].input_ids
    shared = min(_before_answer(side) for side in sides)
    for side in sides[1:]:
        differs = np.flatnonzero(first[:shared] != side.input_ids[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


def _before_answer(side: Example) -> int:
    trained = np.flatnonzero(side.weights > 0)
    return int(trained[0]) if len(trained) else len(side.input_ids) - 1
