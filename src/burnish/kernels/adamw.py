"""AdamW (Loshchilov and Hutter, 1711.05101) over flat buffers: scale, clip, decay and update in one pass, with fp32 or 8-bit moments.

A flat buffer holds many parameters one after the other. A `Segment` is a stretch of it that shares its hyper-parameters (those of a
parameter group) and its number of steps. For every element, with g = grad_scale * gradient (unscaling and clipping are one factor):

    p <- p - lr * wd * p                       decoupled decay, before the update
    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

This is the order and the place of eps of torch.optim.AdamW. The decay is subtracted, not multiplied by 1 - lr wd: that factor rounds to
multiples of 6e-8, a systematic error of up to 1.5 % in the decay at lr wd = 2e-6. Factors are computed in fp64 on the host and rounded
once. (`impl="torch"` is torch's own fused kernel, which on CPUs does multiply; it is used where it is because it is torch's, to the bit.)

Bytes for each element in fp32: 16 read (p, g, m, v) and 12 written, against some 60 for a norm, a scaling pass and the update apart.
FLOPs: about 15. So it is bound by memory everywhere.

`shadow`: where parameters are trained in half precision, `param` is their fp32 master copy and `shadow` the rounded one the model
computes with, written in the same pass (2 bytes more).

*8-bit moments* (Dettmers et al., 2110.02861: blocks of 256 elements, each with its largest magnitude `a` in fp32). The codes are powers,
which need no table and cost two square roots:

    first moment   int8   q in -127..127    m = a sign(q) (q / 127)^2
    second moment  uint8  q in 0..255       v = a ((q + 1) / 256)^4

Rounding is to the nearest code, so the error of sqrt(|m| / a) is at most 1 / 254, and that of (v / a)^(1/4) at most 1 / 512 above the
smallest code. No v > 0 becomes 0 (the smallest code stands for 2.3e-10 a), so a moment that is lost to rounding can make an update
smaller, never blow it up. An element's update uses its new moments before they are rounded: errors enter through the history only.
Rounding is deterministic; a resumed run goes on bit for bit. State: 2 bytes and 8/256 of a byte for each element, against 8.
"""
# torch._fused_adamw_ (one kernel, on CPUs too) has no public name
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from burnish.kernels import native
from burnish.kernels.dispatch import Impl, choose

__all__ = [
    "BLOCK",
    "CASES",
    "Quantised",
    "Segment",
    "adamw",
    "adamw_8bit",
    "adamw_8bit_reference",
    "adamw_reference",
    "dequantise",
    "quantise",
]

BLOCK = 256
"""Elements that share a scale in 8-bit moments. Segments of 8-bit buffers begin and end at multiples of it."""

CASES: list[tuple[str, dict[str, Any]]] = [
    # name, sizes of the segments and what else is special
    ("one", {"sizes": [256]}),
    ("odd", {"sizes": [1, 1000, 255, 4099]}),
    ("gap", {"sizes": [700, 300], "gap": 56}),
    ("no-decay", {"sizes": [2048], "weight_decay": 0.0}),
    ("scaled", {"sizes": [512, 768], "grad_scale": 0.37}),
]
"""Shapes for tests and benchmarks."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements `start` to `stop` of a flat buffer, and how they are updated."""

    start: int
    stop: int
    lr: float
    weight_decay: float
    step: int  # counted from 1: this update included
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def factors(self) -> tuple[float, ...]:
        """What every element is computed with: lr wd, b1, 1 - b1, b2, 1 - b2, lr / (1 - b1^t), sqrt(1 - b2^t), eps."""
        size = self.lr / (1 - self.beta1**self.step)
        root = math.sqrt(1 - self.beta2**self.step)
        return (self.lr * self.weight_decay, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, size, root, self.eps)


@dataclass(frozen=True, slots=True)
class Quantised:
    """8-bit moments of a flat buffer of N elements, N a multiple of BLOCK. All zero at the start."""

    first: torch.Tensor  # int8 [N]
    first_scale: torch.Tensor  # fp32 [N / BLOCK]: the largest |m| of each block
    second: torch.Tensor  # uint8 [N]
    second_scale: torch.Tensor  # fp32 [N / BLOCK]: the largest v

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> Quantised:
        """The moments before the first step."""
        scales = [torch.zeros(size // BLOCK, device=device) for _ in range(2)]
        codes = [torch.zeros(size, dtype=dtype, device=device) for dtype in (torch.int8, torch.uint8)]
        return cls(codes[0], scales[0], codes[1], scales[1])

    def part(self, start: int, stop: int) -> Quantised:
        """Views of the elements `start` to `stop`, multiples of BLOCK."""
        rows = slice(start // BLOCK, stop // BLOCK)
        return Quantised(self.first[start:stop], self.first_scale[rows], self.second[start:stop], self.second_scale[rows])


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Sequence[Segment],
    *,
    grad_scale: float = 1.0,
    shadow: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """One AdamW step over flat buffers, in place. Elements outside all segments stay as they are.

    Args:
        param: [N] contiguous.
        grad: [N]; its content is unspecified afterwards.
        exp_avg: [N] first moments.
        exp_avg_sq: [N] second moments.
        segments: Without overlap.
        grad_scale: Factor on the gradient: 1 / loss scale, times the clip factor.
        shadow: [N] copy of `param` in another type, written in the same pass.
        impl: Who computes it. Half precision is read and written as such and computed in fp32. What the C kernel does not take (half
            precision parameters or moments) goes to torch.

    Raises:
        ValueError: shapes differ, a buffer is not contiguous, or a segment lies outside.
    """
    _check((param, grad, exp_avg, exp_avg_sq, *([] if shadow is None else [shadow])), segments)
    chosen = choose(impl, param.device, _has())
    if chosen == "triton":
        from burnish.kernels.gpu import adamw as gpu  # only where Triton is

        gpu.adamw(param, grad, exp_avg, exp_avg_sq, segments, grad_scale, shadow)
    elif chosen == "native" and param.dtype == exp_avg.dtype == exp_avg_sq.dtype == torch.float32 and grad.dtype in _NATIVE_GRADIENTS:
        _in_c(param, grad, exp_avg, exp_avg_sq, segments, grad_scale, shadow)
    else:
        _fused(param, grad, exp_avg, exp_avg_sq, segments, grad_scale, shadow)


def adamw_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Sequence[Segment],
    *,
    grad_scale: float = 1.0,
    shadow: torch.Tensor | None = None,
) -> None:
    """The formula in plain torch, in the type of the buffers (half precision: computed in fp32). In place, like `adamw`."""
    for segment in segments:
        part = slice(segment.start, segment.stop)
        p, g, m, v = (_wide(x[part]) for x in (param, grad, exp_avg, exp_avg_sq))
        p, m, v = _updated(p, g.to(p.dtype), m, v, segment, grad_scale)
        for buffer, value in ((param, p), (exp_avg, m), (exp_avg_sq, v), *([] if shadow is None else [(shadow, p)])):
            buffer[part] = value.to(buffer.dtype)


def adamw_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: Quantised,
    segments: Sequence[Segment],
    *,
    grad_scale: float = 1.0,
    shadow: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """One AdamW step with 8-bit moments, in place.

    Args:
        param: [N] contiguous, N a multiple of BLOCK.
        grad: [N].
        moments: Of N elements.
        segments: Without overlap; each begins and ends at a multiple of BLOCK.
        grad_scale: Factor on the gradient.
        shadow: [N] copy of `param` in another type, written in the same pass.
        impl: Who computes it; there is no native one.

    Raises:
        ValueError: shapes differ, a buffer is not contiguous, or a segment lies outside or across blocks.
    """
    _check((param, grad, moments.first, moments.second, *([] if shadow is None else [shadow])), segments)
    if any(segment.start % BLOCK or segment.stop % BLOCK for segment in segments):
        raise ValueError(f"8-bit moments are kept in blocks of {BLOCK}, found segments that begin or end within one")
    if choose(impl, param.device, frozenset({"triton"})) == "triton":
        from burnish.kernels.gpu import adamw as gpu  # only where Triton is

        gpu.adamw_8bit(param, grad, moments, segments, grad_scale, shadow)
    else:
        adamw_8bit_reference(param, grad, moments, segments, grad_scale=grad_scale, shadow=shadow)


_PIECE = 1 << 20
"""Elements whose moments are widened at once by the plain 8-bit step: 12 MB of them."""


def adamw_8bit_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: Quantised,
    segments: Sequence[Segment],
    *,
    grad_scale: float = 1.0,
    shadow: torch.Tensor | None = None,
) -> None:
    """The same in plain torch, a piece at a time so that the moments are never wide as a whole."""
    for segment in segments:
        for start in range(segment.start, segment.stop, _PIECE):
            part = slice(start, min(start + _PIECE, segment.stop))
            state = moments.part(part.start, part.stop)
            p, m, v = _updated(_wide(param[part]), grad[part].float(), *dequantise(state), segment, grad_scale)
            for buffer in (param, *([] if shadow is None else [shadow])):
                buffer[part] = p.to(buffer.dtype)
            quantise(m, v, state)


def quantise(first: torch.Tensor, second: torch.Tensor, into: Quantised) -> None:
    """Writes moments [N] as codes and scales. `second` must not be negative."""
    m, v = first.view(-1, BLOCK), second.view(-1, BLOCK)
    a = m.abs().amax(1, keepdim=True)
    codes = torch.floor(127 * torch.sqrt(m.abs() / a.clamp_min(_TINY)) + 0.5)
    into.first.copy_((codes * torch.sign(m)).view(-1))
    into.first_scale.copy_(a[:, 0])
    a = v.amax(1, keepdim=True)
    codes = torch.floor(256 * torch.sqrt(torch.sqrt(v / a.clamp_min(_TINY))) + 0.5) - 1
    into.second.copy_(codes.clamp(0, 255).view(-1))
    into.second_scale.copy_(a[:, 0])


def dequantise(moments: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    """The moments [N] in fp32."""
    q = moments.first.view(-1, BLOCK).float() * (1 / 127)
    m = moments.first_scale[:, None] * (q * q.abs())
    r = (moments.second.view(-1, BLOCK).float() + 1) * (1 / 256)
    v = moments.second_scale[:, None] * ((r * r) * (r * r))
    return m.view(-1), v.view(-1)


_TINY = torch.finfo(torch.float32).tiny
"""In place of a scale of zero: a block that is all zero has codes of zero."""


def _updated(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, segment: Segment, grad_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    decay, beta1, rest1, beta2, rest2, size, root, eps = segment.factors()
    g = g * grad_scale
    p = p - decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return p - size * m / (torch.sqrt(v) / root + eps), m, v


def _fused(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Sequence[Segment],
    grad_scale: float,
    shadow: torch.Tensor | None,
) -> None:
    """By torch's own fused kernel, one call for each segment, where it has one for this device and these types."""
    same = param.dtype == exp_avg.dtype == exp_avg_sq.dtype
    if not same or param.device.type not in ("cpu", "cuda", "mps", "xpu"):
        adamw_reference(param, grad, exp_avg, exp_avg_sq, segments, grad_scale=grad_scale, shadow=shadow)
        return
    # The kernel divides by its scale.
    scale = None if grad_scale == 1.0 else torch.tensor(1 / grad_scale, dtype=torch.float32, device=param.device)
    for segment in segments:
        p, g, m, v = (x[segment.start : segment.stop] for x in (param, grad, exp_avg, exp_avg_sq))
        torch._fused_adamw_(
            [p],
            [g.to(p.dtype)],
            [m],
            [v],
            [],
            [torch.tensor(float(segment.step), device=p.device)],
            lr=segment.lr,
            beta1=segment.beta1,
            beta2=segment.beta2,
            weight_decay=segment.weight_decay,
            eps=segment.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
        )
        if shadow is not None:
            shadow[segment.start : segment.stop].copy_(p)


_NATIVE_GRADIENTS = (torch.float32, torch.bfloat16)


def _in_c(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Sequence[Segment],
    grad_scale: float,
    shadow: torch.Tensor | None,
) -> None:
    """By the C kernel, one call for each segment."""
    update = cast("Callable[..., None]", getattr(native, "adamw_flat"))  # noqa: B009  # there where the C kernels are
    for s in segments:
        parts = (x[s.start : s.stop] for x in (param, grad, exp_avg, exp_avg_sq))
        corrections = (1 - s.beta1**s.step, 1 - s.beta2**s.step)
        update(*parts, s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, *corrections, grad_scale)
        if shadow is not None:
            shadow[s.start : s.stop].copy_(param[s.start : s.stop])


def _has() -> frozenset[str]:
    return frozenset({"triton", "native"}) if hasattr(native, "adamw_flat") else frozenset({"triton"})


def _check(buffers: Sequence[torch.Tensor], segments: Sequence[Segment]) -> None:
    size = buffers[0].numel()
    if any(buffer.ndim != 1 or buffer.numel() != size or not buffer.is_contiguous() for buffer in buffers):
        shapes = ", ".join(str(tuple(buffer.shape)) for buffer in buffers)
        raise ValueError(f"flat buffers of one size are expected, contiguous and one-dimensional, found {shapes}")
    if any(not 0 <= segment.start < segment.stop <= size for segment in segments):
        raise ValueError(f"segments must lie within the {size} elements of the buffers, found {list(segments)}")


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()
