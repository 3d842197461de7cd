"""Attention over a flat forest of segments: nothing is padded, nothing leaks.

A batch is T tokens in a row, cut into segments. A segment attends causally to itself and fully to its parent's chain. Packing is a
forest of roots; a preference pair is a prompt with two children that share it:

    tokens    p p p p | a a a | b b        parents = (-1, 0, 0)
    a sees    p p p p   a
    b sees    p p p p           b

Seen from one segment, its chain and itself are an ordinary sequence, of which it is the end. So every path below computes ordinary
causal attention aligned at the last key ("lower right"), and a sliding window counts along the chain.

    native   flash attention in C: CPU, bf16 and fp32, where there is a compiler (attention_native.py)
    gemm     a few large matrix products per stretch of queries: other CPUs and types (attention_cpu.py)
    varlen   one flash-attention call over all segments: CUDA, half precision, roots
    cascade  flash-attention calls for segments and for their ancestors, merged: CUDA, half precision, trees, sinks (attention_tree.py)
    sdpa     one fused scaled_dot_product_attention per segment, or for all where they are equally long: dropout, full precision and
             equal lengths on CUDA, very short or very long segments on a CPU without C kernels
    eager    plain torch, segment by segment: what nothing else can do (soft caps on CUDA)

`forest_attention_reference` is the oracle: one dense mask [T, T]. Under autocast, q, k and v are taken in its type, as it does itself.

`attend` is what models call through transformers' AttentionInterface (see models/policy.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from burnish.core.errors import ModelError
from burnish.kernels.attention_cpu import gemm_attention
from burnish.kernels.attention_native import native_attention
from burnish.kernels.attention_tree import tree_attention
from burnish.kernels.dispatch import AttentionKind, attention_kind, flash_takes
from burnish.kernels.forest import Forest, causal_mask

__all__ = ["AttentionKind", "Forest", "as_autocast", "causal_mask", "eager_attention", "forest_attention", "forest_attention_reference"]


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
        kind: Which implementation; `auto` chooses by device and arguments (see `dispatch.attention_kind`).

    Returns:
        [1, Hq, T, D'].

    Raises:
        ModelError: `kind` was chosen by name and cannot do what the model asks for.
    """
    q, k, v = as_autocast(q, k, v)
    head_dim = q.shape[-1] if q.shape[-1] == v.shape[-1] else 0
    if kind == "auto":
        kind = attention_kind(
            q.device,
            q.dtype,
            head_dim,
            tree=forest.is_tree,
            softcap=softcap is not None,
            sinks=sinks is not None,
            dropout=dropout > 0,
            window=window,
            lengths=forest.lengths,
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
    flash = flash_takes(q.device, q.dtype, head_dim)
    if kind == "native":
        return native_attention(q, k, v, forest, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    if kind == "gemm":
        return gemm_attention(q, k, v, forest, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    if kind == "cascade":
        return tree_attention(q, k, v, forest, scaling=scaling, window=window, sinks=sinks, impl="flash" if flash else "torch")
    if kind == "varlen" and flash:  # it has no kernel for full precision
        return _varlen(q, k, v, forest, scaling, window)
    if kind in ("sdpa", "varlen"):
        return _per_segment(q, k, v, forest, scaling, window, dropout)
    return _eager(q, k, v, forest, scaling, window, softcap, sinks, dropout)


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's type, where it is on: what it would do before any product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype is torch.float64 else x.to(dtype) for x in tensors)


_ABLE = {
    "eager": frozenset({"soft caps", "sinks", "shared prompts", "dropout", "other devices"}),
    "sdpa": frozenset({"shared prompts", "dropout", "other devices"}),
    "native": frozenset({"soft caps", "sinks", "shared prompts", "tensors on cpu"}),
    "gemm": frozenset({"soft caps", "sinks", "shared prompts", "other devices"}),
    "varlen": frozenset[str](),
    "cascade": frozenset({"sinks", "shared prompts", "other devices"}),
}


def _refuse(kind: str, needs: set[str]) -> None:
    """Raises where an implementation asked for by name does not know something: ignoring it would train another model."""
    if kind not in _ABLE:
        raise ModelError(f"attention '{kind}' is not available, expected one of {', '.join(sorted(('auto', *_ABLE)))}")
    able = _ABLE[kind]
    if missing := sorted(need for need in needs - able if not (need.startswith("tensors on") and "other devices" in able)):
        raise ModelError(f"attention '{kind}' does not know {' or '.join(missing)}", hint="Leave model.attention at auto.")


def forest_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forest: Forest,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`forest_attention` with one dense mask over all tokens: the oracle of the tests and the baseline of the benchmarks."""
    mask = forest.visible(window, q.device)
    return eager_attention(q, k, v, mask, scaling=scaling, softcap=softcap, sinks=sinks)


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


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forest: Forest,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Plain attention segment by segment, so that memory grows with the longest, not with all of them together."""
    queries, keys, values = (x.split_with_sizes(forest.lengths, dim=2) for x in (q, k, v))
    outputs: list[torch.Tensor] = []
    for i, query in enumerate(queries):
        chain = forest.chain(i)
        key, value = _join(keys, chain), _join(values, chain)
        mask = causal_mask(query.shape[2], key.shape[2], window, q.device)
        outputs.append(eager_attention(query, key, value, mask, scaling=scaling, softcap=softcap, sinks=sinks, dropout=dropout))
    return torch.cat(outputs, dim=2)


_FAST_IN_FP32 = 768
"""Shorter segments are attended to in fp32 on a CPU: its half precision kernels have a slow backward pass (1.8 times at 128 tokens)."""


def _per_segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forest: Forest, scaling: float | None, window: int | None, dropout: float
) -> torch.Tensor:
    """One fused call per segment.

    `split` and `cat` rather than slices: the backward pass of a slice writes a zero tensor of all T tokens for every segment.
    """
    dtype = q.dtype
    if q.device.type == "cuda" and forest.uniform and (window is None or window >= forest.lengths[0]):
        return _batched(q, k, v, forest, scaling, dropout)
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and max(forest.lengths) < _FAST_IN_FP32:
        q, k, v = q.float(), k.float(), v.float()
    queries, keys, values = (x.split_with_sizes(forest.lengths, dim=2) for x in (q, k, v))
    outputs: list[torch.Tensor] = []
    for i, query in enumerate(queries):
        chain = forest.chain(i)
        outputs.append(_causal(query, _join(keys, chain), _join(values, chain), scaling, window, dropout))
    return torch.cat(outputs, dim=2).to(dtype)


def _batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forest: Forest, scaling: float | None, dropout: float) -> torch.Tensor:
    """One fused call for roots of one length: [1, H, N L, D] seen as [N, H, L, D]."""
    count, length = len(forest.lengths), forest.lengths[0]
    query, key, value = (x.view(x.shape[1], count, length, x.shape[3]).transpose(0, 1) for x in (q, k, v))
    return _fused(query, key, value, None, scaling, dropout).transpose(0, 1).flatten(1, 2).unsqueeze(0)


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
