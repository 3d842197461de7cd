"""RMSNorm in Triton: `kernels.rms_norm`'s raw functions for GPUs. Formulas and arguments stand there.

A row is one block, so it is read once; short rows (the heads of a query norm) share a program. Arithmetic is in fp32 throughout.

The weight's gradient is a sum over all rows. Each program of a fixed grid walks over its own blocks of rows, in order, and keeps one
partial sum; torch adds the partial sums. So there are no atomics, and the same device gives the same bits in every run.
"""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # numbers a program holds at once, where rows are short
_MOST_ROWS = 16
_PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def _forward(
    x,
    weight,
    residual,
    y,
    summed,
    rstd,
    rows,
    x_stride,
    residual_stride,
    eps,
    offset,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < SIZE)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    dense = row[:, None] * SIZE + column[None, :]
    if RESIDUAL:
        value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + dense, rounded, mask=mask)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + eps)
    tl.store(rstd + row, inverse, mask=row < rows)
    value = value * inverse[:, None]
    if not GEMMA:
        value = value.to(x.dtype.element_ty).to(tl.float32)
    if WEIGHT:
        value = value * (tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32) + offset)[None, :]
    tl.store(y + dense, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy,
    dsummed,
    x,
    weight,
    rstd,
    dx,
    partial,
    rows,
    dy_stride,
    dsummed_stride,
    x_stride,
    offset,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUMMED: tl.constexpr,
    TRAINED: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    present = column < SIZE
    if WEIGHT:
        scale = tl.load(weight + column, mask=present, other=0.0).to(tl.float32) + offset
    if TRAINED:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
    block = tl.program_id(0)
    while block < tl.cdiv(rows, ROWS):  # not a range: the interpreter of older versions cannot count with tensors
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & present[None, :]
        g = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32) * inverse
        if TRAINED:
            total += tl.sum(g * normed, axis=0)
        if WEIGHT:
            g = g * scale[None, :]
        gradient = inverse * (g - normed * (tl.sum(g * normed, axis=1) / SIZE)[:, None])
        if SUMMED:
            gradient += tl.load(dsummed + row[:, None] * dsummed_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * SIZE + column[None, :], gradient.to(dx.dtype.element_ty), mask=mask)
        block += tl.num_programs(0)
    if TRAINED:
        tl.store(partial + tl.program_id(0) * SIZE + column, total, mask=present)


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    gemma: bool,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """As `kernels.rms_norm.rms_norm_forward`."""
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    rows, size = x.shape
    y = torch.empty((rows, size), dtype=out_dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(y, dtype=x.dtype)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return y, summed, rstd
    shape = _shape(rows, size)
    _forward[(triton.cdiv(rows, shape["ROWS"]),)](
        x,
        x if weight is None else weight.contiguous(),
        x if residual is None else residual,
        y,
        y if summed is None else summed,
        rstd,
        rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        offset,
        GEMMA=gemma,
        WEIGHT=weight is not None,
        RESIDUAL=residual is not None,
        **shape,
    )
    return y, summed, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    gemma: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `kernels.rms_norm.rms_norm_backward`."""
    dy, x = _rows(dy), _rows(x)
    dsummed = None if dsummed is None else _rows(dsummed)
    rows, size = x.shape
    dx = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows == 0:
        return dx, torch.zeros(size, dtype=torch.float32, device=x.device) if need_dw else None
    shape = _shape(rows, size)
    programs = triton.cdiv(rows, shape["ROWS"])
    if need_dw:
        programs = min(programs, _processors(x.device) * _PROGRAMS_PER_PROCESSOR)
    partial = torch.empty((programs, size), dtype=torch.float32, device=x.device) if need_dw else None
    _backward[(programs,)](
        dy,
        dy if dsummed is None else dsummed,
        x,
        x if weight is None else weight.contiguous(),
        rstd,
        dx,
        dx if partial is None else partial,
        rows,
        dy.stride(0),
        0 if dsummed is None else dsummed.stride(0),
        x.stride(0),
        offset,
        WEIGHT=weight is not None,
        SUMMED=dsummed is not None,
        TRAINED=need_dw,
        **shape,
    )
    return dx, None if partial is None else partial.sum(0)


def _shape(rows: int, size: int) -> dict[str, Any]:
    """Block sizes and warps: a whole row, and as many rows as fill a block."""
    block = triton.next_power_of_2(size)
    together = max(1, min(_MOST_ROWS, _BLOCK // block, triton.next_power_of_2(rows)))
    warps = min(16, max(4, block * together // 512))
    return {"SIZE": size, "ROWS": together, "BLOCK": block, "num_warps": warps}


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; one under the interpreter, so that its programs walk over several blocks too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
