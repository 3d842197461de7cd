"""Attention over a flat forest of segments: nothing is padded, nothing leaks.

A batch is T tokens in a row, cut into segments. A segment attends causally to itself and fully to its parent's chain. Packing is a
forest of roots; a preference pair is a prompt with two children that share it:

    tokens    p p p p | a a a | b b        parents = (-1, 0, 0)
    a sees    p p p p   a
    b sees    p p p p           b

Seen from one segment, its chain and itself are an ordinary sequence, of which it is the end. So every path below computes ordinary
causal attention aligned at the last key ("lower right"), and a sliding window counts along the chain.

    eager    one dense mask [T, T] in plain torch: the oracle of the tests, and the only path with soft caps and sinks
    sdpa     one fused scaled_dot_product_attention per segment: CPU, dropout, trees
    varlen   one flash-attention call over all segments: CUDA, half precision, roots

`attend` is what models call through transformers' AttentionInterface (see models/policy.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from burnish.core.errors import ModelError
from burnish.kernels.dispatch import AttentionKind, attention_kind


@dataclass(frozen=True)
class Forest:
    """The segments of a flat batch: where each ends, and which segment it continues (-1: none). Parents stand before children."""

    doc_ends: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.doc_ends) != len(self.parents):
            raise ValueError(f"{len(self.doc_ends)} segments but {len(self.parents)} parents")
        if any(not -1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ValueError(f"a parent must be -1 or stand before its child, found parents {self.parents}")
        if any(length <= 0 for length in self.lengths):
            raise ValueError(f"segments must not be empty, found ends {self.doc_ends}")

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment, without its ancestors'."""
        return tuple(end - start for start, end in zip((0, *self.doc_ends), self.doc_ends, strict=False))

    @cached_property
    def is_tree(self) -> bool:
        """Whether any segment shares another as its beginning."""
        return any(parent >= 0 for parent in self.parents)

    def chain(self, segment: int) -> list[int]:
        """The segment and its ancestors, root first."""
        links = [segment]
        while (parent := self.parents[links[0]]) >= 0:
            links.insert(0, parent)
        return links

    def rows(self, segment: int) -> slice:
        """The flat tokens of a segment."""
        return slice(self.doc_ends[segment] - self.lengths[segment], self.doc_ends[segment])

    def visible(self, window: int | None = None, device: torch.device | None = None) -> torch.Tensor:
        """Bool [T, T]: token q (row) attends to token k (column)."""
        total = self.doc_ends[-1] if self.doc_ends else 0
        mask = torch.zeros(total, total, dtype=torch.bool)
        for i in range(len(self.lengths)):
            chain = torch.cat([torch.arange(total)[self.rows(j)] for j in self.chain(i)])
            mask[self.rows(i), chain] = causal_mask(self.lengths[i], len(chain), window, torch.device("cpu"))
        return mask.to(device)

    def cumulative(self, device: torch.device) -> torch.Tensor:
        """int32 [N + 1] on `device`: 0 and the ends, copied there once per batch."""
        if device not in self._cumulative:
            self._cumulative[device] = torch.tensor((0, *self.doc_ends), dtype=torch.int32, device=device)
        return self._cumulative[device]

    @cached_property
    def _cumulative(self) -> dict[torch.device, torch.Tensor]:
        return {}


def forest_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forest: Forest,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
    kind: AttentionKind = "auto",
) -> torch.Tensor:
    """Attention of every token to what it may see.

    Args:
        q: [1, Hq, T, D].
        k: [1, Hkv, T, D]; each key head serves Hq / Hkv query heads.
        v: [1, Hkv, T, D'].
        forest: The segments of the T tokens.
        scaling: Factor on q k^T; default 1 / sqrt(D).
        window: A token sees itself and the `window - 1` tokens before it (transformers' convention).
        softcap: c in `c * tanh(scores / c)` (Gemma 2).
        sinks: [Hq] a learned score beside the keys' that takes probability and gives nothing (gpt-oss).
        dropout: On the probabilities.
        kind: Which implementation; `auto` chooses by device and arguments.

    Returns:
        [1, Hq, T, D'].

    Raises:
        ModelError: `kind` was chosen by name and cannot do what the model asks for.
    """
    if kind == "auto":
        kind = attention_kind(
            q.device,
            q.dtype,
            q.shape[-1] if q.shape[-1] == v.shape[-1] else 0,
            tree=forest.is_tree,
            softcap=softcap is not None,
            sinks=sinks is not None,
            dropout=dropout > 0,
        )
    else:
        needs = {
            "soft caps": softcap is not None,
            "sinks": sinks is not None,
            "shared prompts": forest.is_tree,
            "dropout": dropout > 0,
            f"tensors on {q.device.type}": q.device.type != "cuda",
        }
        _refuse(kind, {name for name, needed in needs.items() if needed})
    if kind == "varlen" and q.dtype in (torch.float16, torch.bfloat16):  # it has no kernel for full precision
        return _varlen(q, k, v, forest, scaling, window)
    if kind in ("sdpa", "varlen"):
        return _per_segment(q, k, v, forest, scaling, window, dropout)
    mask = forest.visible(window, q.device)
    return eager_attention(q, k, v, mask, scaling=scaling, softcap=softcap, sinks=sinks, dropout=dropout)


_KNOWN = ("auto", "eager", "sdpa", "varlen")


def _refuse(kind: str, needs: set[str]) -> None:
    """Raises where an implementation asked for by name does not know something: ignoring it would train another model."""
    if kind not in _KNOWN:
        raise ModelError(f"attention '{kind}' is not available, expected one of {', '.join(_KNOWN)}")
    able = {"eager": needs, "sdpa": needs - {"soft caps", "sinks"}, "varlen": set[str]()}[kind]
    if missing := sorted(needs - able):
        raise ModelError(f"attention '{kind}' does not know {' or '.join(missing)}", hint="Leave model.attention at auto.")


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [queries, keys] for the last `queries` of `keys` tokens: causal, within the window where there is one."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Dense attention in plain torch, softmax in fp32.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, D'].
        mask: Bool, broadcast to [B, 1, Tq, Tk], true where attended; None is causal, aligned at the last key.
        scaling: As in `forest_attention`, like the rest.
        softcap: Cap of the scores.
        sinks: [Hq] scores of the sinks.
        dropout: On the probabilities.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if scores.dtype is torch.float64 else scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], None, q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        p = torch.softmax(scores, dim=-1)
    else:
        beside = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        p = torch.softmax(torch.cat((scores, beside), dim=-1), dim=-1)[..., :-1]
    p = F.dropout(p, dropout) if dropout > 0 else p
    return torch.matmul(p.to(v.dtype), v)


_FAST_IN_FP32 = 768
"""Shorter segments are attended to in fp32 on a CPU: its half precision kernels have a slow backward pass (1.8 times at 128 tokens)."""


def _per_segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forest: Forest, scaling: float | None, window: int | None, dropout: float
) -> torch.Tensor:
    """One fused call per segment.

    `split` and `cat` rather than slices: the backward pass of a slice writes a zero tensor of all T tokens for every segment.
    """
    dtype = q.dtype
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and max(forest.lengths) < _FAST_IN_FP32:
        q, k, v = q.float(), k.float(), v.float()
    queries, keys, values = (x.split_with_sizes(forest.lengths, dim=2) for x in (q, k, v))
    outputs: list[torch.Tensor] = []
    for i, query in enumerate(queries):
        chain = forest.chain(i)
        outputs.append(_causal(query, _join(keys, chain), _join(values, chain), scaling, window, dropout))
    return torch.cat(outputs, dim=2).to(dtype)


def _join(parts: Sequence[torch.Tensor], chain: list[int]) -> torch.Tensor:
    return parts[chain[0]] if len(chain) == 1 else torch.cat([parts[j] for j in chain], dim=2)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, window: int | None, dropout: float) -> torch.Tensor:
    """Fused attention of the last tokens of one sequence, in blocks of queries where a window leaves most keys out."""
    queries, total = q.shape[2], k.shape[2]
    if window is None or window >= total:
        # The fused kernels' own causal mask is aligned at the first key, so it fits whole sequences only.
        mask = None if queries == total else causal_mask(queries, total, None, q.device)
        return _fused(q, k, v, mask, scaling, dropout)
    outputs: list[torch.Tensor] = []
    block = max(window, 128)
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        last = total - queries + stop  # keys seen by the block: from the first one in the first query's window to its own last token
        first = max(0, last - (stop - start) - window + 1)
        mask = causal_mask(stop - start, last - first, window, q.device)
        outputs.append(_fused(q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], mask, scaling, dropout))
    return torch.cat(outputs, dim=2)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float | None, dropout: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=scaling, enable_gqa=grouped)


_VARLEN_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # newer than the oldest torch we take


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forest: Forest, scaling: float | None, window: int | None) -> torch.Tensor:
    """Flash attention over all roots at once. It wants [T, H, D] and int32 boundaries.

    Its window counts the tokens to the left, without the token itself: one less than transformers'.
    """
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if _VARLEN_GROUPS_HEADS else {}
    if not grouped and q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    ends, longest = forest.cumulative(q.device), max(forest.lengths)
    left = -1 if window is None else window - 1
    output = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(left, 0), **grouped)
    assert isinstance(output, torch.Tensor)
    return output.transpose(0, 1).unsqueeze(0)
