"""What stands between the products of a mixture of experts, in Triton: twins of `gate_backward` and `combine` in `kernels.experts`.

Both are bound by memory. `gate_backward` reads u, gate and up once, and writes dp, h and w's gradient: 12 I bytes a pair in half precision,
and half of what the gated unit's own backward and the scaling after it move. One program computes one pair, in fp32, and rounds dp once.
`combine` reads each row once and writes the sum, 2 H (k + 1) bytes a token. One program computes a piece of one token, over j in order.
"""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from burnish.kernels.glu import GluKind
from burnish.kernels.gpu.glu import _activation

_LARGEST_BLOCK = 2048


@triton.jit
def _gate_backward(
    u, p, w, dp, h, dots, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, WANT_H: tl.constexpr, WANT_DOTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(w + row)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < SIZE
        gate, up = row * 2 * SIZE + column, row * 2 * SIZE + SIZE + column
        g = tl.load(u + row * SIZE + column, mask=mask, other=0.0).to(tl.float32)
        activated, slope = _activation(tl.load(p + gate, mask=mask, other=0.0).to(tl.float32), KIND)
        activated = activated.to(p.dtype.element_ty).to(tl.float32)
        other = tl.load(p + up, mask=mask, other=0.0).to(tl.float32)
        tl.store(dp + gate, (weight * g * other * slope).to(dp.dtype.element_ty), mask=mask)
        tl.store(dp + up, (weight * g * activated).to(dp.dtype.element_ty), mask=mask)
        if WANT_H:
            tl.store(h + row * SIZE + column, (activated * other).to(h.dtype.element_ty), mask=mask)
        if WANT_DOTS:
            dot += g * activated * other
    if WANT_DOTS:
        tl.store(dots + row, tl.sum(dot, axis=0))


@triton.jit
def _combine(y, place, weights, out, HIDDEN: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(TOP):
        row = tl.load(place + token * TOP + j)
        part = tl.load(y + row * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * TOP + j)
        total += part
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=mask)


def gate_backward(
    u: torch.Tensor, p: torch.Tensor, w: torch.Tensor, kind: GluKind, *, want_h: bool, want_dots: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `kernels.experts.gate_backward`. w is fp32."""
    u, p, w = u.contiguous(), p.contiguous(), w.contiguous()
    dp = torch.empty_like(p)
    h = torch.empty_like(u) if want_h else None
    dots = torch.empty_like(w) if want_dots else None
    if u.numel():
        block = _block(u.shape[1])
        _gate_backward[(u.shape[0],)](
            u,
            p,
            w,
            dp,
            dp if h is None else h,
            w if dots is None else dots,
            SIZE=u.shape[1],
            BLOCK=block,
            KIND=kind,
            WANT_H=want_h,
            WANT_DOTS=want_dots,
            num_warps=_warps(block),
        )
    return dp, dots, h


def combine(y: torch.Tensor, place: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """As `kernels.experts.combine`. Weights are fp32."""
    tokens, top = place.shape
    out = torch.empty(tokens, y.shape[1], dtype=dtype, device=y.device)
    if out.numel():
        block, place = _block(y.shape[1]), place.contiguous()
        _combine[(tokens, triton.cdiv(y.shape[1], block))](
            y.contiguous(),
            place,
            place if weights is None else weights.contiguous(),
            out,
            HIDDEN=y.shape[1],
            TOP=top,
            BLOCK=block,
            WEIGHTED=weights is not None,
            num_warps=_warps(block),
        )
    return out


def _block(size: int) -> int:
    return min(_LARGEST_BLOCK, max(128, triton.next_power_of_2(size)))


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))
