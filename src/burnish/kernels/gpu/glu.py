"""Gated linear units in Triton: `kernels.glu`'s raw functions for GPUs. Formulas and arguments stand there.

One program computes a piece of one row, in fp32. The GELU with tanh is x * sigmoid(2 u): no tanh, and no cancellation for small x.
"""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from burnish.kernels.glu import GluKind

_LARGEST_BLOCK = 2048


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """act(x) and act'(x)."""
    if KIND == "gelu":
        p = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * p, p + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    if KIND == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    s = tl.sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


@triton.jit
def _forward(gate, up, h, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    activated, _ = _activation(tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32), KIND)
    activated = activated.to(gate.dtype.element_ty).to(tl.float32)
    product = activated * tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + row * SIZE + column, product.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dh,
    gate,
    up,
    dgate,
    dup,
    h,
    dh_stride,
    gate_stride,
    up_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    WANT_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    g = tl.load(dh + row * dh_stride + column, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activation(tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32), KIND)
    activated = activated.to(gate.dtype.element_ty).to(tl.float32)
    other = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    dense = row * SIZE + column
    tl.store(dgate + dense, (g * other * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + dense, (g * activated).to(dup.dtype.element_ty), mask=mask)
    if WANT_H:
        tl.store(h + dense, (activated * other).to(h.dtype.element_ty), mask=mask)


def glu_forward(gate: torch.Tensor, up: torch.Tensor, kind: GluKind) -> torch.Tensor:
    """As `kernels.glu.glu_forward`."""
    gate, up = _rows(gate), _rows(up)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if h.numel():
        grid, block = _grid(gate)
        _forward[grid](gate, up, h, gate.stride(0), up.stride(0), SIZE=gate.shape[1], BLOCK=block, KIND=kind, num_warps=_warps(block))
    return h


def glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: GluKind, want_h: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `kernels.glu.glu_backward`."""
    dh, gate, up = _rows(dh), _rows(gate), _rows(up)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    h = torch.empty_like(dgate) if want_h else None
    if dgate.numel():
        grid, block = _grid(gate)
        _backward[grid](
            dh,
            gate,
            up,
            dgate,
            dup,
            dgate if h is None else h,
            dh.stride(0),
            gate.stride(0),
            up.stride(0),
            SIZE=gate.shape[1],
            BLOCK=block,
            KIND=kind,
            WANT_H=want_h,
            num_warps=_warps(block),
        )
    return dgate, dup, h


def _grid(x: torch.Tensor) -> tuple[tuple[int, int], int]:
    """(rows, pieces of a row), and a piece's size."""
    block = min(_LARGEST_BLOCK, max(128, triton.next_power_of_2(x.shape[1])))
    return (x.shape[0], triton.cdiv(x.shape[1], block)), block


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
