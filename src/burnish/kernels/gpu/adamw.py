"""AdamW over flat buffers in Triton: one launch for all segments. Formulas and codes are those of `kernels.adamw`.

A launch has a program for every BLOCK elements of every segment. Each program finds its segment from the number of programs before it,
so segments of any length and number share one launch. What differs between segments comes in a small table; a new learning rate
recompiles nothing. Divisions and roots are rounded correctly, as torch's are.
"""
# Triton kernels are no Python: their arguments have no types.
# pyright: basic, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from burnish.kernels.adamw import BLOCK as QUANTUM
from burnish.kernels.adamw import Quantised, Segment

__all__ = ["adamw", "adamw_8bit"]

_ELEMENTS = 1024  # of one program; in the 8-bit kernel, 4 blocks of 256


@triton.jit
def _segment(places, table, segments: tl.constexpr):
    """The program's segment: its first element, the end of the segment, and the segment's row of the table."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, segments)
    before = tl.load(places + index)  # programs before each segment; rows that fill up the power of two are out of reach
    segment = tl.sum((before <= program).to(tl.int32), axis=0) - 1
    inside = program - tl.load(places + segment)
    return inside, tl.load(places + segments + segment), tl.load(places + 2 * segments + segment), table + segment * 8


@triton.jit
def _moments(g, m, v, row):
    m = tl.load(row + 1) * m + tl.load(row + 2) * g
    v = tl.load(row + 3) * v + tl.load(row + 4) * g * g
    return m, v


@triton.jit
def _moved(p, m, v, row):
    p = p - tl.load(row) * p
    return p - tl.div_rn(tl.load(row + 5) * m, tl.div_rn(tl.sqrt_rn(v), tl.load(row + 6)) + tl.load(row + 7))


@triton.jit
def _adamw_kernel(
    param, grad, exp_avg, exp_avg_sq, shadow, places, table, grad_scale,
    segments: tl.constexpr, block: tl.constexpr, has_shadow: tl.constexpr,
):  # fmt: skip
    inside, start, stop, row = _segment(places, table, segments)
    at = start + inside * block + tl.arange(0, block)
    mask = at < stop
    p = tl.load(param + at, mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(exp_avg + at, mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask, other=0.0).to(tl.float32)
    m, v = _moments(g, m, v, row)
    p = _moved(p, m, v, row)
    tl.store(param + at, p.to(param.dtype.element_ty), mask)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask)
    if has_shadow:
        tl.store(shadow + at, p.to(shadow.dtype.element_ty), mask)


@triton.jit
def _adamw_8bit_kernel(
    param, grad, first, first_scale, second, second_scale, shadow, places, table, grad_scale,
    segments: tl.constexpr, rows: tl.constexpr, quantum: tl.constexpr, has_shadow: tl.constexpr,
):  # fmt: skip
    inside, start, stop, row = _segment(places, table, segments)
    block = start // quantum + inside * rows + tl.arange(0, rows)
    there = block < stop // quantum
    at = block[:, None] * quantum + tl.arange(0, quantum)[None, :]
    mask = there[:, None] & (tl.arange(0, quantum)[None, :] >= 0)
    p = tl.load(param + at, mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask, other=0.0).to(tl.float32) * grad_scale

    q = tl.load(first + at, mask, other=0).to(tl.float32) * (1 / 127)
    m = tl.load(first_scale + block, there, other=0.0)[:, None] * (q * tl.abs(q))
    r = (tl.load(second + at, mask, other=0).to(tl.float32) + 1) * (1 / 256)
    v = tl.load(second_scale + block, there, other=0.0)[:, None] * ((r * r) * (r * r))

    m, v = _moments(g, m, v, row)
    p = _moved(p, m, v, row)
    tl.store(param + at, p.to(param.dtype.element_ty), mask)
    if has_shadow:
        tl.store(shadow + at, p.to(shadow.dtype.element_ty), mask)

    tiny = 1.1754943508222875e-38
    size = tl.abs(m)
    scale = tl.max(size, axis=1)
    code = tl.floor(127 * tl.sqrt_rn(tl.div_rn(size, tl.maximum(scale, tiny)[:, None])) + 0.5)
    tl.store(first + at, tl.where(m < 0, -code, code).to(tl.int8), mask)
    tl.store(first_scale + block, scale, there)
    scale = tl.max(v, axis=1)
    code = tl.floor(256 * tl.sqrt_rn(tl.sqrt_rn(tl.div_rn(v, tl.maximum(scale, tiny)[:, None]))) + 0.5) - 1
    tl.store(second + at, tl.minimum(tl.maximum(code, 0.0), 255.0).to(tl.uint8), mask)
    tl.store(second_scale + block, scale, there)


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Sequence[Segment],
    grad_scale: float,
    shadow: torch.Tensor | None,
) -> None:
    """See `kernels.adamw.adamw`."""
    programs, places, table = _plan(segments, param.device)
    _adamw_kernel[(programs,)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        param if shadow is None else shadow,
        places,
        table,
        float(grad_scale),
        segments=places.shape[1],
        block=_ELEMENTS,
        has_shadow=shadow is not None,
    )


def adamw_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: Quantised,
    segments: Sequence[Segment],
    grad_scale: float,
    shadow: torch.Tensor | None,
) -> None:
    """See `kernels.adamw.adamw_8bit`."""
    programs, places, table = _plan(segments, param.device)
    _adamw_8bit_kernel[(programs,)](
        param,
        grad,
        moments.first,
        moments.first_scale,
        moments.second,
        moments.second_scale,
        param if shadow is None else shadow,
        places,
        table,
        float(grad_scale),
        segments=places.shape[1],
        rows=_ELEMENTS // QUANTUM,
        quantum=QUANTUM,
        has_shadow=shadow is not None,
    )


def _plan(segments: Sequence[Segment], device: torch.device) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many programs, where they work (int64 [3, S]: programs before, start, stop) and with which factors (fp32 [S, 8])."""
    size = triton.next_power_of_2(len(segments))
    before, places = 0, [[2**62] * size, [0] * size, [0] * size]
    for i, segment in enumerate(segments):
        places[0][i], places[1][i], places[2][i] = before, segment.start, segment.stop
        before += triton.cdiv(segment.stop - segment.start, _ELEMENTS)
    table = torch.tensor([segment.factors() for segment in segments], dtype=torch.float32)
    return before, torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True), table.to(device, non_blocking=True)
