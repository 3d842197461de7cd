"""Gated linear units in Triton whose inputs lack their adapters' parts: those are multiplied and added in registers.

An adapter's part of a projection is a product of rank r: as a call of its own it costs a read and a write of all of [N, I], a hundred times
what its FLOPs cost. Here it costs what its two thin factors weigh. The sum is not rounded before the activation. Formulas stand in
`kernels.glu`, the plain twin in `kernels.lora_mlp`.

In the backward pass the tiles of dgate, dup and h meet the adapters' other factors while they are in registers:

    dB of gate and of up     [I, r]  s dgate^T (x A^T), s dup^T (x A^T)
    dA of down               [r, I]  g^T h, g = s dy B                   so h is written only where its weight is trained

As calls of their own these products would read each of [N, I] again. A program walks down one stripe of rows in one block of columns. Its
partial sums are fp32 and added in a fixed order, without atomics, so the result is the same bits each time. (The products of dgate and dup
with B are sums over columns, which would cross the programs: tried, slower than calls of their own.) Bytes per number of [N, I] in half
precision: forward 6, backward 10.
"""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from burnish.kernels.glu import GluKind, Thin
from burnish.kernels.gpu.glu import _activation

_FORWARD = (32, 64, 4)  # rows and columns of a tile, warps
_BACKWARD = (16, 64, 4, 4)  # the same, and how many tiles are under way at once
_PROGRAMS = 512
"""Programs of the backward pass wanted at least: about four for each multiprocessor of a large GPU."""


@triton.jit
def _left(factor, rows, seen, stride, RANK: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a left factor [N, r]: [rows, PADDED]."""
    ranks = tl.arange(0, PADDED)
    tile = tl.load(factor + rows[:, None] * stride + ranks[None, :], mask=seen[:, None] & (ranks < RANK)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _right(factor, columns, inside, row, column, RANK: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a right factor [I, r], transposed: [PADDED, columns]."""
    ranks = tl.arange(0, PADDED)
    at = columns[None, :] * row + ranks[:, None] * column
    tile = tl.load(factor + at, mask=inside[None, :] & (ranks < RANK)[:, None], other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _whole(tile, left, right):
    """A tile in fp32 with what it lacks."""
    return tl.dot(left, right, tile.to(tl.float32), input_precision="ieee")


@triton.jit
def _forward(
    gate, up, h, gate_left, gate_right, up_left, up_right, tokens, size,
    gate_left_stride, up_left_stride, gate_row, gate_column, up_row, up_column,
    GATE_RANK: tl.constexpr, GATE_PADDED: tl.constexpr, UP_RANK: tl.constexpr, UP_PADDED: tl.constexpr,
    KIND: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    seen, inside = rows < tokens, columns < size
    mask = seen[:, None] & inside[None, :]
    at = rows[:, None] * size + columns[None, :]
    a = tl.load(gate + at, mask=mask, other=0.0)  # all reads before the first product, so that they are under way together
    b = tl.load(up + at, mask=mask, other=0.0)
    gate_xa = _left(gate_left, rows, seen, gate_left_stride, GATE_RANK, GATE_PADDED, WIDE)
    gate_b = _right(gate_right, columns, inside, gate_row, gate_column, GATE_RANK, GATE_PADDED, WIDE)
    up_xa = _left(up_left, rows, seen, up_left_stride, UP_RANK, UP_PADDED, WIDE)
    up_b = _right(up_right, columns, inside, up_row, up_column, UP_RANK, UP_PADDED, WIDE)
    activated, _ = _activation(_whole(a, gate_xa, gate_b), KIND)
    tl.store(h + at, (activated * _whole(b, up_xa, up_b)).to(h.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dh, gate, up, dgate, dup, h, dh_left, dh_right, gate_left, gate_right, up_left, up_right,
    down_a, gate_db, up_db, tokens, size, stripe,
    dh_left_stride, gate_left_stride, up_left_stride, dh_row, dh_column, gate_row, gate_column, up_row, up_column,
    DH_RANK: tl.constexpr, DH_PADDED: tl.constexpr, GATE_RANK: tl.constexpr, GATE_PADDED: tl.constexpr, UP_RANK: tl.constexpr,
    UP_PADDED: tl.constexpr, KIND: tl.constexpr, WANT_H: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < size
    dh_a = _right(dh_right, columns, inside, dh_row, dh_column, DH_RANK, DH_PADDED, WIDE)
    gate_b = _right(gate_right, columns, inside, gate_row, gate_column, GATE_RANK, GATE_PADDED, WIDE)
    up_b = _right(up_right, columns, inside, up_row, up_column, UP_RANK, UP_PADDED, WIDE)
    sum_a = tl.zeros((COLUMNS, DH_PADDED), dtype=tl.float32)
    sum_gate = tl.zeros((COLUMNS, GATE_PADDED), dtype=tl.float32)
    sum_up = tl.zeros((COLUMNS, UP_PADDED), dtype=tl.float32)
    first = tl.program_id(1).to(tl.int64) * stripe
    for start in tl.range(0, stripe, ROWS, num_stages=STAGES):
        rows = first + start + tl.arange(0, ROWS)
        seen = rows < tokens
        mask = seen[:, None] & inside[None, :]
        at = rows[:, None] * size + columns[None, :]
        gate_tile = tl.load(gate + at, mask=mask, other=0.0)  # all reads before the first product, so that they are under way together
        up_tile = tl.load(up + at, mask=mask, other=0.0)
        dh_tile = tl.load(dh + at, mask=mask, other=0.0)
        gate_xa = _left(gate_left, rows, seen, gate_left_stride, GATE_RANK, GATE_PADDED, WIDE)
        up_xa = _left(up_left, rows, seen, up_left_stride, UP_RANK, UP_PADDED, WIDE)
        dh_g = _left(dh_left, rows, seen, dh_left_stride, DH_RANK, DH_PADDED, WIDE)
        activated, slope = _activation(_whole(gate_tile, gate_xa, gate_b), KIND)
        other = _whole(up_tile, up_xa, up_b)
        upstream = _whole(dh_tile, dh_g, dh_a)
        made_gate = (upstream * other * slope).to(dgate.dtype.element_ty)
        tl.store(dgate + at, made_gate, mask=mask)
        made_up = (upstream * activated).to(dup.dtype.element_ty)
        tl.store(dup + at, made_up, mask=mask)
        made_h = (activated * other).to(dh.dtype.element_ty)
        if WANT_H:
            tl.store(h + at, made_h, mask=mask)
        if WIDE:
            made_gate, made_up, made_h = made_gate.to(tl.float32), made_up.to(tl.float32), made_h.to(tl.float32)
        sum_gate = tl.dot(tl.trans(made_gate), gate_xa, sum_gate, input_precision="ieee")
        sum_up = tl.dot(tl.trans(made_up), up_xa, sum_up, input_precision="ieee")
        sum_a = tl.dot(tl.trans(made_h), dh_g, sum_a, input_precision="ieee")
    _keep(sum_gate, gate_db, columns, inside, size, GATE_RANK, GATE_PADDED)
    _keep(sum_up, up_db, columns, inside, size, UP_RANK, UP_PADDED)
    _keep(sum_a, down_a, columns, inside, size, DH_RANK, DH_PADDED)


@triton.jit
def _keep(total, partial, columns, inside, size, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Writes this stripe's sum [columns, r]."""
    ranks = tl.arange(0, PADDED)
    at = (tl.program_id(1).to(tl.int64) * size + columns)[:, None] * RANK + ranks[None, :]
    tl.store(partial + at, total, mask=inside[:, None] & (ranks < RANK)[None, :])


class ThinGradients(NamedTuple):
    """What the backward pass gives: dgate, dup and h (or None) [N, I]; dB / s of gate and up [I, r] and dA of down [r, I] in fp32."""

    dgate: torch.Tensor
    dup: torch.Tensor
    h: torch.Tensor | None
    gate_db: torch.Tensor
    up_db: torch.Tensor
    down_da: torch.Tensor


def thin_forward(gate: torch.Tensor, up: torch.Tensor, kind: GluKind, thin: tuple[Thin, Thin]) -> torch.Tensor:
    """The product h [N, I] of gate and up [N, I], contiguous, to which `thin` is still to be added."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    if h.numel():
        # Columns go first: programs that run together share the thin left factors and neighbouring memory.
        rows, columns, warps = _FORWARD
        grid = triton.cdiv(gate.shape[1], columns), triton.cdiv(gate.shape[0], rows)
        _forward[grid](
            gate, up, h, *_tensors(thin), *gate.shape, *_strides(thin), **_ranks(("gate", "up"), thin),
            KIND=kind, WIDE=_is_wide(gate), ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    return h


def thin_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: GluKind, want_h: bool, thin: tuple[Thin, Thin, Thin]
) -> ThinGradients:
    """All that comes of dh, gate and up [N, I], to which `thin` is still to be added, in the order gate, up, dh."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    h = torch.empty_like(gate) if want_h else None
    (tokens, size), ranks = gate.shape, [part.left.shape[1] for part in thin]
    rows, columns, warps, stages = _BACKWARD
    blocks = triton.cdiv(size, columns)
    stripe = max(1, triton.cdiv(tokens, max(1, _PROGRAMS // max(1, blocks)) * rows)) * rows
    stripes = triton.cdiv(tokens, stripe)
    sums = [dh.new_empty((stripes, size, rank), dtype=torch.float32) for rank in ranks]
    if dgate.numel():
        ordered = (thin[2], thin[0], thin[1])
        _backward[(blocks, stripes)](
            dh, gate, up, dgate, dup, dgate if h is None else h, *_tensors(ordered), sums[2], sums[0], sums[1],
            tokens, size, stripe, *_strides(ordered),
            **_ranks(("dh", "gate", "up"), ordered), KIND=kind, WANT_H=want_h, WIDE=_is_wide(gate), ROWS=rows, COLUMNS=columns,
            STAGES=stages, num_warps=warps,
        )  # fmt: skip
    gate_db, up_db, down_a = (part.sum(dim=0) for part in sums)
    return ThinGradients(dgate, dup, h, gate_db, up_db, down_a.t())


def _tensors(thin: tuple[Thin, ...]) -> list[torch.Tensor]:
    return [tensor for part in thin for tensor in part]


def _strides(thin: tuple[Thin, ...]) -> list[int]:
    if any(part.left.stride(1) != 1 and part.left.shape[1] > 1 for part in thin):
        raise ValueError("the left factor of a thin product must have its rows contiguous")
    return [*(part.left.stride(0) for part in thin), *(step for part in thin for step in part.right.stride())]


def _ranks(names: tuple[str, ...], thin: tuple[Thin, ...]) -> dict[str, int]:
    ranks = {name.upper(): part.left.shape[1] for name, part in zip(names, thin, strict=True)}
    padded = {f"{name}_PADDED": max(16, triton.next_power_of_2(rank)) for name, rank in ranks.items()}
    return {**{f"{name}_RANK": rank for name, rank in ranks.items()}, **padded}


def _is_wide(x: torch.Tensor) -> bool:
    """Whether products are of fp32: the interpreter multiplies bf16 as bit patterns."""
    return x.dtype is torch.float32 or not x.is_cuda
