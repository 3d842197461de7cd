"""Attention over trees (and with sinks) from calls that know neither: partial attentions, merged by their log-sum-exp.

Softmax over a union of disjoint sets of keys follows from the sets' own results, each an output and the logarithm of its denominator:

    lse = log(e^lse_1 + e^lse_2)        O = e^(lse_1 - lse) O_1 + e^(lse_2 - lse) O_2

So a segment attends to itself (causal) and to every ancestor (all of it) apart, and what it may see is the merge. All descendants of an
ancestor are one sequence of queries against its keys, so a prompt's keys are read once for all its answers, and never copied per answer:

    part 0         every segment with itself, causal
    part 1 + d     every ancestor at depth d with the tokens of all its descendants

Sinks are one more set, of output zero: lse = log(e^lse + e^sink), O shrinks by e^(its lse - lse).

The backward pass needs no merge. P = e^(S - lse) with the total lse holds in every part, and delta = rowsum(dO * O) with the total O, so
each part's ordinary backward, given the totals, yields its exact share: dK and dV of its keys, and a summand of dQ.

    dV = P^T dO     dS = P * (dO V^T - delta)     dQ += scale dS K     dK = scale dS^T Q     d sink = -sum e^(sink - lse) delta

A sliding window cuts a prompt at a different place for every token, which no part can express. Then there is one part in which each
segment has its whole chain as keys, those out of every window left out; where no window reaches past the longest chain there is none.

Kept: q, k, v, the output, and lse (fp32 [Hq, T]). FLOPs are those of attention, no pair is computed twice. Merging is by index, each index
once in a part, so sums have a fixed order.

Parts are computed by flash attention (CUDA, half precision; checked on a GPU by tests/gpu) or by plain torch, its twin.
Merging by log-sum-exp: Milakov and Gimelshein, 1805.02867; sharing a prompt among queries: Juravsky et al., 2402.05099.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from torch.autograd.function import once_differentiable

from burnish.kernels.forest import Forest, causal_mask

PartImpl = Literal["torch", "flash"]
"""Who computes a part. `torch`: plain, everywhere. `flash`: torch's flash attention, CUDA with half precision."""


@dataclass(frozen=True)
class Part:
    """Sequences of queries, each against its own sequence of keys.

    Attributes:
        queries: int64 [Nq] their flat tokens, no token twice; None is all tokens in order.
        keys: int64 [Nk] likewise, but tokens may repeat.
        ends: int32 [N + 1] twice: where the sequences of queries and of keys end in these lists.
        longest: The most queries and keys of a sequence.
        causal: Whether the queries are the last of the keys, and see none after themselves.
        window: Tokens that a query sees, itself included.
        rounds: Positions in `keys`, cut so that no token is twice in a round; empty where none is twice in `keys`.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    ends: tuple[torch.Tensor, torch.Tensor]
    longest: tuple[int, int]
    causal: bool
    window: int | None = None
    rounds: tuple[torch.Tensor, ...] = ()


@lru_cache(maxsize=8)
def parts(forest: Forest, window: int | None, device: torch.device) -> tuple[Part, ...]:
    """The parts of a forest's attention, the first with all tokens as queries."""
    chains = [[forest.rows(link) for link in forest.chain(i)] for i in range(len(forest.lengths))]
    longest = max((sum(_length(rows) for rows in chain) for chain in chains), default=0)
    if window is not None and window >= longest:
        window = None
    if window is None or not forest.is_tree:
        itself = forest.cumulative(device)
        most = max(forest.lengths, default=0)
        first = Part(None, None, (itself, itself), (most, most), causal=True, window=window)
        return (first, *(_part(sequences, device) for sequences in _ancestors(forest)))
    visible = [_visible(chain, window) for chain in chains]
    ends = (forest.cumulative(device), _ends([_count(v) for v in visible], device))
    keys = _tokens(visible)
    most = (max(forest.lengths), max(_count(v) for v in visible))
    return (Part(None, keys.to(device), ends, most, True, window, tuple(r.to(device) for r in _rounds(keys))),)


def _ancestors(forest: Forest) -> Iterator[list[tuple[list[slice], list[slice]]]]:
    """For each depth: (tokens of all descendants, own tokens) of every segment at that depth that has descendants."""
    chains = [forest.chain(i) for i in range(len(forest.lengths))]
    for depth in range(max((len(chain) for chain in chains), default=0) - 1):
        below: dict[int, list[slice]] = {}
        for i, chain in enumerate(chains):
            if len(chain) > depth + 1:
                below.setdefault(chain[depth], []).append(forest.rows(i))
        yield [(below[ancestor], [forest.rows(ancestor)]) for ancestor in sorted(below)]


def _part(sequences: list[tuple[list[slice], list[slice]]], device: torch.device) -> Part:
    queries, keys = [q for q, _ in sequences], [k for _, k in sequences]
    counts = [_count(q) for q in queries], [_count(k) for k in keys]
    ends = (_ends(counts[0], device), _ends(counts[1], device))
    return Part(_tokens(queries).to(device), _tokens(keys).to(device), ends, (max(counts[0]), max(counts[1])), causal=False)


def _visible(chain: list[slice], window: int) -> list[slice]:
    """The end of a chain that some token of its last segment sees."""
    count = _length(chain[-1]) + window - 1
    kept: list[slice] = []
    for rows in reversed(chain):
        taken = min(count, _length(rows))
        count -= taken
        if taken:
            kept.insert(0, slice(rows.stop - taken, rows.stop))
    return kept


def _rounds(keys: torch.Tensor) -> Iterator[torch.Tensor]:
    """Positions of the first occurrence of every token, then of the second, and so on."""
    order, counts = torch.argsort(keys, stable=True), torch.bincount(keys)
    occurrence = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[keys[order]]
    for number in range(int(counts.max())):
        yield order[occurrence == number]


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _count(rows: Sequence[slice]) -> int:
    return sum(_length(r) for r in rows)


def _tokens(sequences: Sequence[Sequence[slice]]) -> torch.Tensor:
    return torch.cat([torch.arange(rows.start, rows.stop) for sequence in sequences for rows in sequence])


def _ends(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *accumulate(counts)), dtype=torch.int32, device=device)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forest: Forest,
    *,
    scaling: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    impl: PartImpl = "torch",
) -> torch.Tensor:
    """Attention over a forest by merged parts; arguments and result as those of `attention.forest_attention`.

    Args:
        q: [1, Hq, T, D].
        k: [1, Hkv, T, D].
        v: [1, Hkv, T, D'].
        forest: The segments of the T tokens.
        scaling: Factor on q k^T; default 1 / sqrt(D).
        window: Tokens that a token sees, itself included.
        sinks: [Hq] scores of the sinks.
        impl: Who computes the parts. `flash` needs D = D'.

    Returns:
        [1, Hq, T, D'], laid out so that `.transpose(1, 2)` is contiguous.
    """
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    plan = parts(forest, window, q.device)
    output = cast("torch.Tensor", _TreeAttention.apply(query, key, value, sinks, plan, scale, impl))  # pyright: ignore[reportUnknownMemberType]
    return output.transpose(0, 1).unsqueeze(0)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        plan: tuple[Part, ...],
        scale: float,
        impl: PartImpl,
    ) -> torch.Tensor:
        output, lse = _forward(q, k, v, sinks, plan, scale, impl)
        ctx.save_for_backward(q, k, v, sinks, output, lse)
        ctx.plan, ctx.scale, ctx.impl = plan, scale, impl
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, output, lse = ctx.saved_tensors
        dq, dk, dv = _backward(grads[0], q, k, v, output, lse, ctx.plan, ctx.scale, ctx.impl)
        dsinks = None
        if sinks is not None:
            delta = (grads[0].to(lse.dtype) * output).sum(-1)
            dsinks = -(torch.exp(sinks[:, None].to(lse.dtype) - lse) * delta.t()).sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: tuple[Part, ...],
    scale: float,
    impl: PartImpl,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, D'] and the total lse [Hq, T]."""
    run = flash_part if impl == "flash" else part_reference
    output, lse = run(q, _pick(k, plan[0].keys), _pick(v, plan[0].keys), plan[0], scale)
    if len(plan) == 1 and sinks is None:
        return output, lse
    total = output.to(lse.dtype)
    for part in plan[1:]:
        assert part.queries is not None
        rows = part.queries
        found, own = run(q[rows], k[part.keys], v[part.keys], part, scale)
        before = lse[:, rows]
        after = torch.logaddexp(before, own)
        total[rows] = total[rows] * _by_row(before - after) + found * _by_row(own - after)
        lse[:, rows] = after
    if sinks is not None:
        after = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        total *= _by_row(lse - after)
        lse = after
    return total.to(q.dtype), lse


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    plan: tuple[Part, ...],
    scale: float,
    impl: PartImpl,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, summed over the parts in the type of lse."""
    run = flash_part_backward if impl == "flash" else part_backward_reference
    first, *others = plan
    found = run(grad, q, _pick(k, first.keys), _pick(v, first.keys), output, lse, first, scale)
    if not others and first.keys is None:
        return found
    dq = found[0].to(lse.dtype)
    if first.keys is None:
        dk, dv = (x.to(lse.dtype) for x in found[1:])
    else:
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
        for chosen in first.rounds:
            dk.index_add_(0, first.keys[chosen], found[1][chosen].to(lse.dtype))
            dv.index_add_(0, first.keys[chosen], found[2][chosen].to(lse.dtype))
    for part in others:
        assert part.queries is not None and part.keys is not None
        rows, keys = part.queries, part.keys
        shares = run(grad[rows], q[rows], k[keys], v[keys], output[rows], lse[:, rows], part, scale)
        for total, index, share in zip((dq, dk, dv), (rows, keys, keys), shares, strict=True):
            total.index_add_(0, index, share.to(lse.dtype))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _pick(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    return x if tokens is None else x[tokens]


def _by_row(logarithm: torch.Tensor) -> torch.Tensor:
    """e^x of [H, T], as a factor of [T, H, D]."""
    return logarithm.exp().t()[..., None]


def part_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One part in plain torch: q [Nq, Hq, D], k [Nk, Hkv, D], v [Nk, Hkv, D'] -> (output [Nq, Hq, D'], lse [Hq, Nq] in fp32 or fp64)."""
    outputs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for rows, keys in _sequences(part):
        scores = _scores(q[rows], k[keys], part, scale)
        lse = torch.logsumexp(scores, dim=-1)
        p = torch.exp(scores - lse[..., None])
        outputs.append(torch.einsum("hqk,khd->qhd", p, _repeat(v[keys], q.shape[1], p.dtype)))
        sums.append(lse)
    return torch.cat(outputs).to(q.dtype), torch.cat(sums, dim=1)


def part_backward_reference(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    part: Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A part's share of the gradients of q, k and v, given the total output [Nq, Hq, D'] and lse [Hq, Nq]."""
    wide, heads = lse.dtype, k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    delta = (grad.to(wide) * output.to(wide)).sum(-1).t()
    for rows, keys in _sequences(part):
        p = torch.exp(_scores(q[rows], k[keys], part, scale) - lse[:, rows, None])
        above = grad[rows].to(wide)
        dp = torch.einsum("qhd,khd->hqk", above, _repeat(v[keys], q.shape[1], wide))
        ds = p * (dp - delta[:, rows, None]) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, _repeat(k[keys], q.shape[1], wide))
        dk[keys] = _grouped(torch.einsum("hqk,qhd->khd", ds, q[rows].to(wide)), heads)
        dv[keys] = _grouped(torch.einsum("hqk,qhd->khd", p, above), heads)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _sequences(part: Part) -> Iterator[tuple[slice, slice]]:
    queries, keys = (cast("list[int]", ends.tolist()) for ends in part.ends)  # pyright: ignore[reportUnknownMemberType]
    for i in range(len(queries) - 1):
        yield slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])


def _scores(q: torch.Tensor, k: torch.Tensor, part: Part, scale: float) -> torch.Tensor:
    """[Hq, Nq, Nk] of one sequence, minus infinity where not seen."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), _repeat(k, q.shape[1], wide)) * scale
    if not part.causal:
        return scores
    return scores.masked_fill(~causal_mask(q.shape[0], k.shape[0], part.window, q.device), float("-inf"))


def _repeat(x: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).repeat_interleave(heads // x.shape[1], dim=1)


def _grouped(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[T, Hq, D] -> [T, heads, D], summed over the heads of a group."""
    return x.reshape(x.shape[0], heads, -1, x.shape[2]).sum(2)


def flash_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`part_reference` by flash attention. It takes grouped heads as they are, and aligns causal masks at the last key."""
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *part.ends, *part.longest, 0.0, _unbounded(part), False, scale=scale, **_window(part)
    )
    return output, lse


def flash_part_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    part: Part,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`part_backward_reference` by flash attention. The state of the random numbers is asked for and, without dropout, not used."""
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, output.contiguous(), lse.contiguous(), *part.ends, *part.longest, 0.0, _unbounded(part), state, unused,
        scale=scale, **_window(part),
    )  # fmt: skip


def _unbounded(part: Part) -> bool:
    return part.causal and part.window is None


def _window(part: Part) -> dict[str, int]:
    """Flash attention counts the tokens to the left without the token itself; -1 is no bound."""
    left = -1 if part.window is None else part.window - 1
    return {"window_size_left": left, "window_size_right": 0 if part.causal else -1}
