"""The head: hidden states at trained positions -> statistics of the targets, without ever holding all logits.

With K trained predictions, hidden size H and vocabulary V, the logits [K, V] are the largest tensor of a training step (8k tokens of
Llama 3 in fp32: 4 GB). Everything an objective needs of them is a handful of numbers per row, so they are computed for a chunk of
rows at a time and forgotten:

    z      = softcap(scale * (h W^T + b))        one chunk of rows
    lse    = log sum_v exp z_v                   logp = z_y - lse        p = softmax(z)

The gradients, row by row (g_* is what comes from above):

    dz = g_logp (1_y - p) + g_lse p + g_mean / V - g_entropy p (log p + entropy)
    dh = dz W          dW = dz^T h          db = sum over rows of dz

Two ways to get them, both exact for any upstream gradient:

*Early* (frozen head, only logp is differentiated: every adapter run). Row k's gradient is g_k times the vector (1_y - p) W, which does
not depend on g. The forward pass has p at hand, so it computes that vector there; the backward pass only scales rows. Two matrix
products in all, the least possible.

*Late* (the head is trained, or other statistics are differentiated). The backward pass computes the chunk's logits again: three matrix
products for dh, a fourth for dW, which is accumulated in fp32 over the chunks.

Matrix products run in the compute type (autocast's, else the inputs'), statistics and dz in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

OPTIONAL = frozenset({"logsumexp", "mean_logit", "entropy", "correct"})
"""What `want` may name besides the log-probabilities."""

_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits held at once: on a CPU what stays near its caches, on a GPU enough rows for full-speed matrix products."""


@dataclass(slots=True)
class TokenStats:
    """What the head says about each trained prediction. All [K], fp32, differentiable but for `correct`.

    `mean_logit` (the mean of the logits over the vocabulary) makes label smoothing, `logsumexp` the z-loss; both are None unless asked.
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None  # bool [K]: the argmax is the target; no gradient


Fields = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""TokenStats as autograd passes it around: a tuple in the order of its fields."""


def head_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    want: frozenset[str] = frozenset(),
) -> TokenStats:
    """Statistics of `softcap(scale * (hidden @ weight.T + bias))` at `targets`, with gradients, in chunks of rows.

    Args:
        hidden: [K, H] hidden states at trained positions. K may be 0.
        weight: [V, H] of the head.
        targets: int64 [K], each in 0..V-1.
        bias: [V] of the head.
        softcap: c in `c * tanh(z / c)` (Gemma 2), applied after `scale`.
        scale: Multiplier of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        chunk: Rows whose logits are held at once. Default: by device.
        want: Optional fields of TokenStats to fill; see OPTIONAL.

    Raises:
        ValueError: `want` names something unknown.
    """
    _check(want)
    rows = chunk or default_chunk(weight.shape[0], hidden.device)
    head = _Head(softcap, scale, _compute_dtype(hidden, weight), rows, want)
    parts = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        return TokenStats(*cast("Fields", _HeadStats.apply(hidden, weight, bias, targets, head)))  # pyright: ignore[reportUnknownMemberType]
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenStats(*_forward(hidden, weight, bias, targets, head, None))


def head_stats_module(
    hidden: torch.Tensor,
    module: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    want: frozenset[str] = frozenset(),
) -> TokenStats:
    """The same for a head that is any module (an adapter on it, quantised weights): called in chunks, recomputed in the backward pass.

    `module` maps [C, H] to [C, vocabulary]. Gradients are autograd's own, so whatever the module does stays exact.
    """
    _check(want)
    rows = chunk or default_chunk(vocabulary, hidden.device)

    def stats(h: torch.Tensor, y: torch.Tensor) -> Fields:
        return _fields(stats_from_logits(_shape(_wide(module(h)), softcap, scale), y, want))

    # One empty chunk where there is nothing to predict, so that the result still hangs on the graph.
    starts = range(0, max(targets.shape[0], 1), rows)
    chunks = [(hidden[a : a + rows], targets[a : a + rows]) for a in starts]
    if torch.is_grad_enabled():
        found = [cast("Fields", checkpoint(stats, h, y, use_reentrant=False)) for h, y in chunks]
    else:
        found = [stats(h, y) for h, y in chunks]
    logprobs, *others = zip(*found, strict=True)
    return TokenStats(torch.cat(logprobs), *(_cat(column) for column in others))


def head_stats_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    want: frozenset[str] = frozenset(),
) -> TokenStats:
    """`head_stats` in plain torch with all logits at once: the oracle of the tests and the baseline of the benchmarks."""
    return stats_from_logits(_shape(_wide(F.linear(hidden, weight, bias)), softcap, scale), targets, want)


def stats_from_logits(logits: torch.Tensor, targets: torch.Tensor, want: frozenset[str] = frozenset()) -> TokenStats:
    """The statistics of finished logits [K, V], in plain differentiable torch."""
    _check(want)
    logits = _wide(logits)
    logp = F.log_softmax(logits, dim=-1)
    return TokenStats(
        logprobs=logp.gather(-1, targets[:, None]).squeeze(-1),
        logsumexp=torch.logsumexp(logits, dim=-1) if "logsumexp" in want else None,
        mean_logit=logits.mean(dim=-1) if "mean_logit" in want else None,
        entropy=-(logp.exp() * logp).sum(dim=-1) if "entropy" in want else None,
        correct=logits.argmax(dim=-1) == targets if "correct" in want else None,
    )


def default_chunk(vocabulary: int, device: torch.device) -> int:
    """Rows of logits to hold at once on `device`."""
    return max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 26) // vocabulary)


@dataclass(frozen=True, slots=True)
class _Head:
    """How logits are made, and what is wanted of them."""

    softcap: float | None
    scale: float
    compute: torch.dtype
    chunk: int
    want: frozenset[str]


class _HeadStats(torch.autograd.Function):
    """Autograd around `_forward` and `_backward`; the module's docstring explains the early and the late gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, head: _Head
    ) -> Fields:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.dtype, ctx.device_type = head, hidden.dtype, hidden.device.type
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        # fp16 products need the loss scale inside dz, or small probabilities vanish: there the gradient is taken late.
        early = frozen and head.compute is not torch.float16 and not head.want & {"logsumexp", "mean_logit"}
        with torch.autocast(ctx.device_type, enabled=False):
            direction = hidden.new_empty(hidden.shape, dtype=_product_dtype(hidden, head)) if early else None
            stats = _forward(hidden, weight, bias, targets, head, direction)
        # An early gradient needs nothing more, unless the entropy turns out to be differentiated too.
        again = not early or "entropy" in head.want
        ctx.save_for_backward(direction, *((hidden, weight, bias, targets) if again else (None,) * 4))
        if stats[4] is not None:
            ctx.mark_non_differentiable(stats[4])
        return stats

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        direction, hidden, weight, bias, targets = ctx.saved_tensors
        logp, *others = upstream[:4]
        if all(gradient is None for gradient in others):
            if logp is None:
                return (None,) * 5
            if direction is not None:
                return (logp[:, None] * direction).to(ctx.dtype), None, None, None, None
        with torch.autocast(ctx.device_type, enabled=False):
            gradients = _backward(hidden, weight, bias, targets, ctx.head, upstream[:4], ctx.needs_input_grad[:3])
        return *gradients, None, None


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: _Head,
    direction: torch.Tensor | None,
) -> Fields:
    """The statistics; fills `direction` [K, H] with d logp_k / d h_k where it is given."""
    w = weight.to(head.compute)
    rows, wide = targets.shape[0], _wide_dtype(hidden.dtype)
    logp, lse, mean, entropy = (hidden.new_empty(rows, dtype=wide) for _ in range(4))
    correct = torch.empty(rows, dtype=torch.bool, device=hidden.device)
    optional = {"logsumexp": lse, "mean_logit": mean, "entropy": entropy, "correct": correct}  # in the order of TokenStats
    for part, z, _ in _chunks(hidden, w, bias, head):
        y = targets[part, None]
        top, arg = z.max(dim=-1, keepdim=True)
        p = torch.softmax(z, dim=-1)
        # The largest p is at least 1 / V, so its logarithm never underflows.
        lse[part] = (top - p.gather(-1, arg).log()).squeeze(-1)
        logp[part] = z.gather(-1, y).squeeze(-1) - lse[part]
        correct[part] = (arg == y).squeeze(-1)
        if "mean_logit" in head.want:
            mean[part] = z.mean(dim=-1)
        if "entropy" in head.want:
            entropy[part] = lse[part] - (p * z).sum(dim=-1)
        if direction is not None:
            dz = p.neg_().scatter_add_(-1, y, torch.ones_like(top))
            direction[part] = torch.mm(_through_shape(dz, z, head).to(head.compute), w)
    return _fields(TokenStats(logp, *(x if name in head.want else None for name, x in optional.items())))


def _backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: _Head,
    upstream: tuple[torch.Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of hidden, weight and bias from those of (logprobs, logsumexp, mean_logit, entropy)."""
    w, wide = weight.to(head.compute), _wide_dtype(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
    for part, z, h in _chunks(hidden, w, bias, head):
        rows = tuple(g[part, None].to(wide) if g is not None else None for g in upstream)
        dz = _through_shape(_logit_gradient(z, targets[part, None], rows), z, head)
        if d_bias is not None:
            d_bias += dz.sum(dim=0)
        dz = dz.to(head.compute)
        if d_hidden is not None:
            d_hidden[part] = torch.mm(dz, w)
        if d_weight is not None:
            d_weight += _mm(dz.t(), h)
    return (
        d_hidden,
        d_weight.to(weight.dtype) if d_weight is not None else None,
        d_bias.to(bias.dtype) if d_bias is not None and bias is not None else None,
    )


def _logit_gradient(z: torch.Tensor, y: torch.Tensor, upstream: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """Gradient [C, V] of the logits z, for targets y [C, 1] and upstream gradients [C, 1] (None is zero)."""
    g_logp, g_lse, g_mean, g_entropy = upstream
    p = torch.softmax(z, dim=-1)
    weight_of_p = torch.zeros_like(z[:, :1])
    if g_lse is not None:
        weight_of_p = weight_of_p + g_lse
    if g_logp is not None:
        weight_of_p = weight_of_p - g_logp
    if g_entropy is None:
        dz = p.mul_(weight_of_p)
    else:
        logp = torch.log_softmax(z, dim=-1)
        entropy = -(p * logp).sum(dim=-1, keepdim=True)
        dz = p.mul_(weight_of_p - g_entropy * (logp + entropy))
    if g_logp is not None:
        dz.scatter_add_(-1, y, g_logp)
    if g_mean is not None:
        dz += g_mean / z.shape[-1]
    return dz


def _chunks(
    hidden: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, head: _Head
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, finished logits in fp32, hidden in the compute type) for one chunk of rows after another."""
    for start in range(0, hidden.shape[0], head.chunk):
        part = slice(start, start + head.chunk)
        h = hidden[part].to(head.compute)
        z = _mm(h, w.t())
        if bias is not None:
            z += bias
        yield part, _shape(z, head.softcap, head.scale), h


def _shape(z: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    """Scale and soft cap, where the model has them."""
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _through_shape(dz: torch.Tensor, z: torch.Tensor, head: _Head) -> torch.Tensor:
    """The gradient before `_shape` from the one after it; z is the shaped logit. In place."""
    if head.softcap is not None:
        dz *= 1 - (z / head.softcap).square()
    return dz if head.scale == 1.0 else dz.mul_(head.scale)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in fp32 (fp64 for fp64). CUDA keeps its fp32 accumulator; a CPU rounds to the operands' type first."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return _wide(torch.mm(a, b))


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Autocast's type inside autocast, else the inputs' own (the wider one where they differ)."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _product_dtype(hidden: torch.Tensor, head: _Head) -> torch.dtype:
    """What early gradients are kept in: as the product leaves them, never narrower than that."""
    return torch.promote_types(hidden.dtype, head.compute)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(_wide_dtype(x.dtype))


def _fields(stats: TokenStats) -> Fields:
    return stats.logprobs, stats.logsumexp, stats.mean_logit, stats.entropy, stats.correct


def _cat(column: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    present = [x for x in column if x is not None]
    return torch.cat(present) if present else None


def _check(want: frozenset[str]) -> None:
    if unknown := want - OPTIONAL:
        raise ValueError(f"unknown statistics {sorted(unknown)}, known are {sorted(OPTIONAL)}")
