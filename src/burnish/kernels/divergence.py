"""Two heads compared at trained positions, without ever holding all logits: distillation from a teacher's whole distribution.

With p = softmax(z_teacher / T) and q = softmax(z_student / T), row by row (2306.13649, equation 1; M is the mixture):

    forward_kl    D = sum_v p (log p - log q)                        dD/dz =  (q - p) / T
    reverse_kl    D = sum_v q (log q - log p)                        dD/dz =  q (log q - log p - D) / T
    js            M = m p + (1 - m) q
                  D = m sum_v p (log p - log M)                      dD/dz =  (1 - m) q (l - sum_v q l) / T
                      + (1 - m) sum_v q (log q - log M)              where l = log q - log M

D is not multiplied by T^2. The cross-entropy -log softmax(z_student)_y of the target comes from the same logits, at temperature 1:

    total = sum over rows of w ((1 - a) D + a nll)       a is `sft_weight`, w the row's weight

What comes from above is one number, because the rows' weights are known before. So each chunk of logits is made once, both models', and
its gradients (of the student's hidden states, and of its head where that is trained) are computed on the spot: two products for the
logits, one for dh, one for dW. The backward pass multiplies by that number. The teacher gets no gradient.

Heads that are a weight and a bias go this way. Any other student's head is called in chunks with autograd, and again in the backward
pass; a teacher's may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from burnish.kernels.linear_ce import Gradients, product_dtype, times
from burnish.kernels.logit_rows import Head, compute_dtype, default_chunk, shape, through_shape, wide, wide_dtype
from burnish.kernels.matmul import linear, mm_wide

__all__ = [
    "CASES",
    "DivergenceKind",
    "DivergenceStats",
    "HeadInputs",
    "divergence_rows",
    "weighted_divergence",
    "weighted_divergence_reference",
]

DivergenceKind = Literal["forward_kl", "reverse_kl", "js"]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("smollm2-360m-to-135m", {"k": 512, "h": 576, "teacher_h": 960, "v": 49152}),
    ("llama3-8b-to-1b", {"k": 4096, "h": 2048, "teacher_h": 4096, "v": 128256}),
    ("qwen2.5-7b-to-0.5b", {"k": 4096, "h": 896, "teacher_h": 3584, "v": 151936}),
]
"""Students and teachers of real families, for benchmarks: (name, shape)."""

_BUFFERS = 8
"""Bytes an element that a chunk is sized by: two models' logits in fp32. Their probabilities and logarithms come on top."""

_Fields = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """Hidden states at trained positions and the head that makes logits of them: `softcap(scale * head(hidden))`.

    The head is `weight` and `bias`, or else `module`, or else nothing: then `hidden` are the model's finished logits.
    """

    hidden: torch.Tensor  # [K, H]
    vocabulary: int  # V
    weight: torch.Tensor | None = None  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    module: Callable[[torch.Tensor], torch.Tensor] | None = None  # [C, H] -> [C, V]
    scale: float = 1.0
    softcap: float | None = None


@dataclass(slots=True)
class DivergenceStats:
    """What is known of each row, [K], without gradients. Log-probabilities are the student's, at temperature 1."""

    divergence: torch.Tensor
    logprobs: torch.Tensor
    correct: torch.Tensor  # bool: the student's first choice is the target
    agree: torch.Tensor  # bool: student and teacher have the same first choice


@dataclass(frozen=True, slots=True)
class _Spec:
    """What is computed of a pair of logits."""

    kind: DivergenceKind
    mix: float
    temperature: float
    sft_weight: float
    vocabulary: int


def divergence_rows(
    student: torch.Tensor, teacher: torch.Tensor, *, kind: DivergenceKind = "forward_kl", mix: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """The divergence of each row [K] of finished logits [K, V], in plain differentiable torch: the definition, and the tests' oracle.

    Args:
        student: Its logits.
        teacher: Its logits; no gradient is stopped here.
        kind: Which divergence.
        mix: Of `js`: the teacher's share m of the mixture.
        temperature: Divides both.
    """
    log_q, log_p = (F.log_softmax(wide(z) / temperature, dim=-1) for z in (student, teacher))
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    log_m = torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))
    return mix * (log_p.exp() * (log_p - log_m)).sum(dim=-1) + (1 - mix) * (log_q.exp() * (log_q - log_m)).sum(dim=-1)


def weighted_divergence(
    student: HeadInputs,
    teacher: HeadInputs,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    *,
    kind: DivergenceKind = "forward_kl",
    mix: float = 0.5,
    temperature: float = 1.0,
    sft_weight: float = 0.0,
    vocabulary: int | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, DivergenceStats]:
    """The weighted sum of divergence and cross-entropy over all rows, with gradients to the student, in chunks of rows.

    Args:
        student: Its hidden states and head. K may be 0.
        teacher: The same of the teacher; its hidden size may differ. Nothing of it gets a gradient.
        targets: int64 [K], each below `vocabulary`.
        row_weights: [K] weight of each row; not differentiated.
        kind: Which divergence; the module's docstring has the formulas.
        mix: Of `js`: the teacher's share of the mixture.
        temperature: Divides both models' finished logits, for the divergence alone.
        sft_weight: Share of the targets' cross-entropy.
        vocabulary: Compare the first so many entries only, as if there were no others. Default: all.
        chunk: Most rows whose logits are held at once. Default: by device.

    Returns:
        The sum, a scalar, and the statistics of each row, detached.

    Raises:
        ValueError: The vocabularies differ and `vocabulary` does not say what they share, or a setting is out of its range.
    """
    spec = _spec(student, teacher, kind, mix, temperature, sft_weight, vocabulary)
    rows = chunk or default_chunk(spec.vocabulary, student.hidden.device, _BUFFERS)
    if not torch.is_grad_enabled():
        student = _detached(student)
    weight, bias = student.weight, student.bias
    if weight is None:
        return _through_module(student, teacher, targets, row_weights, spec, rows)
    if spec.vocabulary < weight.shape[0]:
        weight, bias = weight[: spec.vocabulary], bias[: spec.vocabulary] if bias is not None else None
    compute = compute_dtype(student.hidden, weight)
    head = Head(student.softcap, student.scale, compute, rows, frozenset(), "torch")
    arguments = student.hidden, weight, bias, targets, row_weights.detach(), _detached(teacher), spec, head
    total, *fields = cast("Any", _Weighted.apply(*arguments))  # pyright: ignore[reportUnknownMemberType]
    return total, DivergenceStats(*fields)


def weighted_divergence_reference(
    student: HeadInputs,
    teacher: HeadInputs,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    *,
    kind: DivergenceKind = "forward_kl",
    mix: float = 0.5,
    temperature: float = 1.0,
    sft_weight: float = 0.0,
    vocabulary: int | None = None,
) -> tuple[torch.Tensor, DivergenceStats]:
    """`weighted_divergence` with all logits at once and autograd's gradients: the oracle of the tests and the baseline of benchmarks."""
    spec = _spec(student, teacher, kind, mix, temperature, sft_weight, vocabulary)

    def logits(head: HeadInputs) -> torch.Tensor:
        z = head.hidden
        if head.weight is not None:
            z = F.linear(z, head.weight, head.bias)
        elif head.module is not None:
            z = head.module(z)
        return shape(wide(z), head.softcap, head.scale)[:, : spec.vocabulary]

    with torch.no_grad():
        theirs = logits(teacher)
    losses, fields = _plain(logits(student), theirs, targets, spec)
    return (row_weights * losses).sum(), DivergenceStats(*fields)


class _Weighted(torch.autograd.Function):
    """Every gradient in the forward pass; the backward pass multiplies by one number."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        row_weights: torch.Tensor,
        teacher: HeadInputs,
        spec: _Spec,
        head: Head,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = tuple(x.dtype if x is not None else None for x in (hidden, weight, bias))
        kind, wanted = wide_dtype(hidden.dtype), any(ctx.needs_input_grad[:3])
        # Without a loss scale small probabilities vanish in fp16, so there gradients are products in fp32.
        narrow = head.compute is torch.float16
        products = torch.float32 if narrow else head.compute
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], kind if narrow else product_dtype(hidden, head))
        student = HeadInputs(hidden, spec.vocabulary, weight.to(head.compute), bias, None, head.scale, head.softcap)
        w = weight.to(products) if wanted else weight
        weights = row_weights.to(kind)
        teacher = _cast(teacher)
        found: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, max(hidden.shape[0], 1), head.chunk):
            part = slice(start, start + head.chunk)
            z, theirs = _logits(student, part, spec.vocabulary), _logits(teacher, part, spec.vocabulary)
            fields, dz = _rows(z, theirs, targets[part], spec, wanted)
            found.append(fields)
            if dz is not None and hidden.shape[0]:
                with torch.autocast(hidden.device.type, enabled=False):
                    gradients.add(part, through_shape(dz, z, head).to(products), hidden[part].to(products), w, weights[part])
        columns = tuple(torch.cat(column) for column in zip(*found, strict=True))
        ctx.save_for_backward(*gradients.done())
        ctx.mark_non_differentiable(*columns)
        losses = (1 - spec.sft_weight) * columns[0] - spec.sft_weight * columns[1]
        return (weights * losses).sum(), *columns

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        scaled = (times(x, upstream, dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None, None, None, None


def _rows(z: torch.Tensor, theirs: torch.Tensor, y: torch.Tensor, spec: _Spec, gradient: bool) -> tuple[_Fields, torch.Tensor | None]:
    """Statistics of finished logits [C, V] at y [C], and the gradient of (1 - a) D + a nll with respect to the student's."""
    t = spec.temperature
    log_q, log_p = torch.log_softmax(z / t, dim=-1), torch.log_softmax(theirs / t, dim=-1)
    q = log_q.exp()
    if spec.kind == "forward_kl":
        p = log_p.exp()
        divergence = (p * (log_p - log_q)).sum(dim=-1)
        dz = q - p
    elif spec.kind == "reverse_kl":
        ratio = log_q - log_p
        divergence = (q * ratio).sum(dim=-1)
        dz = ratio.sub_(divergence[:, None]).mul_(q)
    else:
        p, m = log_p.exp(), spec.mix
        log_m = torch.logaddexp(log_p + math.log(m), log_q + math.log1p(-m))
        ratio = log_q - log_m
        mean = (q * ratio).sum(dim=-1)
        divergence = m * (p * (log_p - log_m)).sum(dim=-1) + (1 - m) * mean
        dz = ratio.sub_(mean[:, None]).mul_(q).mul_(1 - m)
    log_one = log_q if t == 1 else torch.log_softmax(z, dim=-1)
    first, at = z.argmax(dim=-1), y[:, None]
    fields = divergence, log_one.gather(-1, at).squeeze(-1), first == y, first == theirs.argmax(dim=-1)
    if not gradient:
        return fields, None
    share = spec.sft_weight
    dz *= (1 - share) / t
    if share:
        dz.add_(q if t == 1 else log_one.exp(), alpha=share)
        dz.scatter_add_(-1, at, torch.full_like(dz[:, :1], -share))
    return fields, dz


def _plain(z: torch.Tensor, theirs: torch.Tensor, y: torch.Tensor, spec: _Spec) -> tuple[torch.Tensor, _Fields]:
    """The losses [C] with autograd's gradients, and the statistics."""
    divergence = divergence_rows(z, theirs, kind=spec.kind, mix=spec.mix, temperature=spec.temperature)
    logprobs = F.log_softmax(z, dim=-1).gather(-1, y[:, None]).squeeze(-1)
    first = z.argmax(dim=-1)
    losses = (1 - spec.sft_weight) * divergence - spec.sft_weight * logprobs
    return losses, (divergence.detach(), logprobs.detach(), first == y, first == theirs.argmax(dim=-1))


def _through_module(
    student: HeadInputs, teacher: HeadInputs, targets: torch.Tensor, row_weights: torch.Tensor, spec: _Spec, rows: int
) -> tuple[torch.Tensor, DivergenceStats]:
    """The same for a student's head that is any module: called in chunks, recomputed in the backward pass."""
    teacher = _cast(_detached(teacher))

    def losses(hidden: torch.Tensor, part: slice) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            theirs = _logits(teacher, part, spec.vocabulary)
        z = _logits(replace(student, hidden=hidden), slice(None), spec.vocabulary)
        row_losses, fields = _plain(z, theirs, targets[part], spec)
        return row_losses, *fields

    # One empty chunk where there is nothing to predict, so that the result still hangs on the graph.
    parts = [slice(start, start + rows) for start in range(0, max(targets.shape[0], 1), rows)]
    if torch.is_grad_enabled():
        found = [cast("Any", checkpoint(losses, student.hidden[part], part, use_reentrant=False)) for part in parts]
    else:
        found = [losses(student.hidden[part], part) for part in parts]
    total, *fields = (torch.cat(column) for column in zip(*found, strict=True))
    return (row_weights.detach() * total).sum(), DivergenceStats(*fields)


def _logits(head: HeadInputs, part: slice, vocabulary: int) -> torch.Tensor:
    """Finished logits [C, vocabulary] of some rows, in fp32 (fp64 for fp64). Autograd does not see through a head's `weight`."""
    hidden = head.hidden[part]
    if head.weight is not None:
        compute = compute_dtype(hidden, head.weight)
        h, w = hidden.to(compute), head.weight[:vocabulary].to(compute)
        bias = head.bias[:vocabulary] if head.bias is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.device.type == "cuda":  # keeps the product's fp32 sums
                z = mm_wide(h, w.t())
                z = z if bias is None else z.add_(bias)
            else:
                z = linear(h, w, bias.to(compute) if bias is not None else None)
    else:
        z = (hidden if head.module is None else head.module(hidden))[..., :vocabulary]
    return shape(wide(z), head.softcap, head.scale)


def _cast(head: HeadInputs) -> HeadInputs:
    """The same with its weight in the type of its products, once for all chunks."""
    return head if head.weight is None else replace(head, weight=head.weight.to(compute_dtype(head.hidden, head.weight)))


def _detached(head: HeadInputs) -> HeadInputs:
    return replace(
        head,
        hidden=head.hidden.detach(),
        weight=head.weight.detach() if head.weight is not None else None,
        bias=head.bias.detach() if head.bias is not None else None,
    )


def _spec(
    student: HeadInputs,
    teacher: HeadInputs,
    kind: DivergenceKind,
    mix: float,
    temperature: float,
    sft_weight: float,
    vocabulary: int | None,
) -> _Spec:
    """The settings, checked."""
    sizes = student.vocabulary, teacher.vocabulary
    if vocabulary is None and sizes[0] != sizes[1]:
        raise ValueError(f"the student has {sizes[0]} logits and the teacher {sizes[1]}, expected the same number or `vocabulary`")
    shared = min(sizes) if vocabulary is None else vocabulary
    if not 0 < shared <= min(sizes):
        raise ValueError(f"`vocabulary` is {shared}, expected 1 to {min(sizes)}")
    if kind not in ("forward_kl", "reverse_kl", "js"):
        raise ValueError(f"unknown divergence '{kind}', expected forward_kl, reverse_kl or js")
    if not 0 < mix < 1 or not temperature > 0 or not 0 <= sft_weight <= 1:
        raise ValueError(f"expected 0 < mix < 1, temperature > 0, 0 <= sft_weight <= 1, found {mix}, {temperature}, {sft_weight}")
    return _Spec(kind, mix, temperature, sft_weight, shared)
