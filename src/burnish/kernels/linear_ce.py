"""The head: hidden states at trained positions -> statistics of the targets, without ever holding all logits.

With K trained predictions, hidden size H and vocabulary V, the logits [K, V] are the largest tensor of a training step (8k tokens of
Llama 3 in fp32: 4 GB). Everything an objective needs of them is a handful of numbers per row, so they are computed for a chunk of
rows at a time and forgotten:

    z      = softcap(scale * (h W^T + b)) / temperature      one chunk of rows
    top    = max_v z_v       log_total = log sum_v exp(z_v - top)       lse = top + log_total
    logp   = (z_y - top) - log_total       p = exp(z - top - log_total)       entropy = log_total - sum_v p_v (z_v - top)

(from differences to the top, so that nothing is lost where logits are large). The gradients, row by row (g_* comes from above):

    dz = g_logp (1_y - p) + g_lse p + g_mean / V - g_entropy p (log p + entropy)
    dh = dz W          dW = dz^T h          db = sum over rows of dz

Three ways to get them, all exact for any upstream gradient:

*Early* (frozen head, only logp is differentiated: every adapter run). Row k's gradient is g_k times the vector (1_y - p) W, which does
not depend on g. The forward pass has p at hand, so it computes that vector there; the backward pass only scales rows. Two matrix
products in all, the least possible.

*Late* (the head is trained, or other statistics are differentiated). The backward pass computes the chunk's logits again: three matrix
products for dh, a fourth for dW, which is accumulated in fp32 over the chunks.

*Weighted* (`weighted_nll`: the head is trained, and each row's weight in the sum is known before). What comes from above is then one
number, so dh, dW and db are computed early as well: three products instead of four.

Matrix products run in the compute type (autocast's, else the inputs'), statistics in fp32 (fp64 for fp64 inputs), dz is rounded to the
compute type once. What happens to a chunk of logits between its products is in logit_rows.py, three times: plain torch,
C for CPUs, Triton for GPUs.

Saved for the backward pass: early [K, H]; weighted [K, H], dW in fp32, db; late the inputs. Nothing here makes the host wait for a GPU.
The peers: Liger-Kernel's fused linear cross-entropy, Apple's cut cross-entropy (2411.09009), torch's F.linear_cross_entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from burnish.kernels.dispatch import Impl
from burnish.kernels.logit_rows import (
    OPTIONAL,
    Fields,
    Head,
    add_mm,
    check,
    chunks,
    default_chunk,
    logit_gradient,
    make_head,
    shape,
    statistics,
    tempered,
    wide,
    wide_dtype,
)
from burnish.kernels.matmul import mm_wide

__all__ = [
    "CASES",
    "OPTIONAL",
    "TokenStats",
    "default_chunk",
    "head_stats",
    "head_stats_module",
    "head_stats_reference",
    "stats_from_logits",
    "weighted_nll",
]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("smollm2-135m", {"k": 512, "h": 576, "v": 49152}),
    ("llama3-1b", {"k": 8192, "h": 2048, "v": 128256}),
    ("llama3-8b", {"k": 8192, "h": 4096, "v": 128256}),
    ("gemma2-2b", {"k": 4096, "h": 2304, "v": 256000, "softcap": 30.0}),
    ("gemma3-1b", {"k": 4096, "h": 1152, "v": 262144}),
]
"""Heads of real models, for benchmarks: (name, shape and options)."""


@dataclass(slots=True)
class TokenStats:
    """What the head says about each trained prediction. All [K], fp32, differentiable but for the last two. None unless asked for.

    `mean_logit` (the mean of the logits over the vocabulary) makes label smoothing, `logsumexp` the z-loss.
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None  # bool [K]: the argmax is the target
    log_sum_sq: torch.Tensor | None = None  # log sum_v p_v^2: the log-probability of two equal draws


def head_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    want: frozenset[str] = frozenset(),
    impl: Impl = "auto",
) -> TokenStats:
    """Statistics of `softcap(scale * (hidden @ weight.T + bias)) / temperature` at `targets`, with gradients, in chunks of rows.

    Args:
        hidden: [K, H] hidden states at trained positions. K may be 0.
        weight: [V, H] of the head.
        targets: int64 [K], each in 0..V-1.
        bias: [V] of the head.
        softcap: c in `c * tanh(z / c)` (Gemma 2), applied after `scale`.
        scale: Multiplier of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        temperature: Divisor of the finished logits, as in sampling.
        chunk: Most rows whose logits are held at once. Default: by device.
        want: Optional fields of TokenStats to fill; see OPTIONAL.
        impl: Who computes a chunk; `auto` chooses by device and type.

    Raises:
        ValueError: `want` names something unknown, `temperature` is not positive, or `impl` does not know the compute type.
    """
    head = make_head(hidden, weight, softcap, scale, temperature, chunk, want, impl)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (hidden, weight, bias)):
        return TokenStats(*cast("Fields", _HeadStats.apply(hidden, weight, bias, targets, head)))  # pyright: ignore[reportUnknownMemberType]
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenStats(*_forward(hidden, weight, bias, targets, head))


def weighted_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    want: frozenset[str] = frozenset(),
    impl: Impl = "auto",
) -> tuple[torch.Tensor, TokenStats]:
    """`-(row_weights * head_stats(...).logprobs).sum()` and the statistics, detached: the cheap way to train a head.

    Exact like `head_stats`, whatever is done with the sum; only, with a trained head, the logits are not computed a second time.

    Args:
        hidden: As in `head_stats`, like every argument not named here.
        weight: Of the head.
        targets: What is to become likely.
        row_weights: [K] weight of each row.
        bias: Of the head.
        softcap: Of the logits.
        scale: Of the logits.
        temperature: Of the logits.
        chunk: Most rows at once.
        want: Optional statistics.
        impl: Who computes a chunk.

    Returns:
        The sum, a scalar, and the statistics.

    Raises:
        ValueError: As `head_stats`.
    """
    head = make_head(hidden, weight, softcap, scale, temperature, chunk, want, impl)
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trained and not row_weights.requires_grad and head.compute is not torch.float16:
        total, *fields = cast("Any", _WeightedNLL.apply(hidden, weight, bias, targets, row_weights, head))  # pyright: ignore[reportUnknownMemberType]
        return total, TokenStats(*fields)
    stats = head_stats(
        hidden, weight, targets, bias=bias, softcap=softcap, scale=scale, temperature=temperature, chunk=chunk, want=want, impl=impl
    )
    total = -(row_weights * stats.logprobs).sum()
    return total, TokenStats(*(x.detach() if x is not None else None for x in _fields(stats)))  # pyright: ignore[reportArgumentType]


def head_stats_module(
    hidden: torch.Tensor,
    module: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    want: frozenset[str] = frozenset(),
) -> TokenStats:
    """The same for a head that is any module (an adapter on it, quantised weights): called in chunks, recomputed in the backward pass.

    `module` maps [C, H] to [C, vocabulary]. Gradients are autograd's own, so whatever the module does stays exact.
    """
    check(want, temperature)
    rows = chunk or default_chunk(vocabulary, hidden.device)

    def stats(h: torch.Tensor, y: torch.Tensor) -> Fields:
        return _fields(stats_from_logits(shape(wide(module(h)), *tempered(softcap, scale, temperature)), y, want))

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
    temperature: float = 1.0,
    want: frozenset[str] = frozenset(),
) -> TokenStats:
    """`head_stats` in plain torch with all logits at once: the oracle of the tests and the baseline of the benchmarks."""
    return stats_from_logits(shape(wide(F.linear(hidden, weight, bias)), softcap, scale) / temperature, targets, want)


def stats_from_logits(logits: torch.Tensor, targets: torch.Tensor, want: frozenset[str] = frozenset()) -> TokenStats:
    """The statistics of finished logits [K, V], in plain differentiable torch."""
    check(want)
    logits = wide(logits)
    logp = F.log_softmax(logits, dim=-1)
    return TokenStats(
        logprobs=logp.gather(-1, targets[:, None]).squeeze(-1),
        logsumexp=torch.logsumexp(logits, dim=-1) if "logsumexp" in want else None,
        mean_logit=logits.mean(dim=-1) if "mean_logit" in want else None,
        entropy=-(logp.exp() * logp).sum(dim=-1) if "entropy" in want else None,
        correct=logits.argmax(dim=-1) == targets if "correct" in want else None,
        log_sum_sq=(2 * logp.detach()).logsumexp(dim=-1) if "log_sum_sq" in want else None,
    )


class _HeadStats(torch.autograd.Function):
    """Early and late gradients; the module's docstring explains them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, head: Head
    ) -> Fields:
        ctx.set_materialize_grads(False)
        ctx.head, ctx.dtype, ctx.device_type = head, hidden.dtype, hidden.device.type
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        # fp16 products need the loss scale inside dz, or small probabilities vanish: there the gradient is taken late.
        early = frozen and head.compute is not torch.float16 and not head.want & {"logsumexp", "mean_logit"}
        gradients = Gradients(hidden, weight, bias, (True, False, False), product_dtype(hidden, head)) if early else None
        with torch.autocast(ctx.device_type, enabled=False):
            stats = _forward(hidden, weight, bias, targets, head, gradients)
        # An early gradient needs nothing more, unless the entropy turns out to be differentiated too.
        again = not early or "entropy" in head.want
        direction = gradients.hidden if gradients is not None else None
        ctx.save_for_backward(direction, *((hidden, weight, bias, targets) if again else (None,) * 4))
        ctx.mark_non_differentiable(*(x for x in stats[4:] if x is not None))
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
                return times(direction, logp[:, None], ctx.dtype), None, None, None, None
        with torch.autocast(ctx.device_type, enabled=False):
            gradients = _backward(hidden, weight, bias, targets, ctx.head, upstream[:4], ctx.needs_input_grad[:3])
        return *gradients, None, None


class _WeightedNLL(torch.autograd.Function):
    """Every gradient in the forward pass; the backward pass multiplies by one number."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        row_weights: torch.Tensor,
        head: Head,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = tuple(x.dtype if x is not None else None for x in (hidden, weight, bias))
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], product_dtype(hidden, head))
        factors = -row_weights.to(wide_dtype(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            stats = _forward(hidden, weight, bias, targets, head, gradients, factors)
        ctx.save_for_backward(*gradients.done())
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return (factors * stats[0]).sum(), *stats

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        scaled = (times(x, upstream, dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None, None


class Gradients:
    """Gradients of the head's inputs, gathered over the chunks: that of `hidden` in `dtype`, those of weight and bias in fp32."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: tuple[bool, ...], dtype: torch.dtype
    ) -> None:
        self.hidden = torch.empty_like(hidden, dtype=dtype) if needs[0] else None
        self.bias = torch.zeros_like(bias, dtype=wide_dtype(hidden.dtype)) if bias is not None and needs[2] else None
        self.weight: torch.Tensor | None = None
        self._like = weight if needs[1] else None

    def add(self, part: slice, dz: torch.Tensor, h: torch.Tensor, w: torch.Tensor, factors: torch.Tensor | None) -> None:
        """Adds one chunk's. `factors` [C] weigh the rows of dz, and are cheaper on the thin matrices: each product has one."""
        if self.hidden is not None:
            product = mm_wide(dz, w) if self.hidden.dtype is torch.float32 else torch.mm(dz, w)
            self.hidden[part] = product if factors is None else product * factors[:, None]
        if self.bias is not None:
            self.bias += dz.sum(dim=0, dtype=self.bias.dtype) if factors is None else (dz * factors[:, None]).sum(dim=0)
        if self._like is not None:
            h = h if factors is None else (h * factors[:, None]).to(h.dtype)
            self.weight = mm_wide(dz.t(), h) if self.weight is None else add_mm(self.weight, dz.t(), h)

    def done(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Those of hidden, weight and bias; zero where there was no chunk."""
        if self._like is not None and self.weight is None:
            self.weight = torch.zeros_like(self._like, dtype=wide_dtype(self._like.dtype))
        return self.hidden, self.weight, self.bias


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: Head,
    gradients: Gradients | None = None,
    factors: torch.Tensor | None = None,
) -> Fields:
    """The statistics; adds up the gradients of the sum of `factors` (default: ones) times logprobs where `gradients` is given."""
    w, wide = weight.to(head.compute), wide_dtype(hidden.dtype)
    names = (field.name for field in dataclasses.fields(TokenStats))
    kinds = {name: torch.bool if name == "correct" else wide for name in names}
    wanted = head.want | {"logprobs"}
    stats = [hidden.new_empty(targets.shape, dtype=kind) if name in wanted else None for name, kind in kinds.items()]
    for part, z, h in chunks(hidden, w, bias, head):
        found, dz = statistics(z, targets[part], head, gradients is not None)
        for column, values in zip(stats, found, strict=True):
            if column is not None and values is not None:
                column[part] = values
        if gradients is not None and dz is not None:
            gradients.add(part, dz, h, w, factors[part] if factors is not None else None)
    return cast("Fields", tuple(stats))


def _backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: Head,
    upstream: tuple[torch.Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of hidden, weight and bias from those of (logprobs, logsumexp, mean_logit, entropy)."""
    w, wide = weight.to(head.compute), wide_dtype(hidden.dtype)
    upstream = tuple(g.to(wide).contiguous() if g is not None else None for g in upstream)
    gradients = Gradients(hidden, weight, bias, needs, hidden.dtype)
    for part, z, h in chunks(hidden, w, bias, head):
        rows = tuple(g[part] if g is not None else None for g in upstream)
        gradients.add(part, logit_gradient(z, targets[part], rows, head), h, w, None)
    parts = zip(gradients.done(), (hidden, weight, bias), strict=True)
    return tuple(x.to(like.dtype) if x is not None and like is not None else None for x, like in parts)


def times(x: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """`factor x`, rounded to `dtype` once."""
    return None if x is None else torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def product_dtype(hidden: torch.Tensor, head: Head) -> torch.dtype:
    """What early gradients are kept in until their factor is known, as wide as products come: on CUDA in fp32, so as to round once."""
    return wide_dtype(hidden.dtype) if hidden.device.type == "cuda" else torch.promote_types(hidden.dtype, head.compute)


def _fields(stats: TokenStats) -> Fields:
    return stats.logprobs, stats.logsumexp, stats.mean_logit, stats.entropy, stats.correct, stats.log_sum_sq


def _cat(column: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    present = [x for x in column if x is not None]
    return torch.cat(present) if present else None
