"""Gated linear units in Triton whose inputs lack their adapters' parts: those are multiplied and added in registers.

An adapter's part of a projection is a product of rank r: as a call of its own it costs a read and a write of all of [N, I], a hundred times
what its FLOPs cost. Here it costs what its two thin factors weigh. The sum is not rounded before the activation. Formulas stand in
`kernels.glu`, the plain twin in `kernels.lora_mlp`.

One program computes a tile of rows and columns, in fp32.
"""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from burnish.kernels.glu import GluKind, Thin
from burnish.kernels.gpu.glu import _activation

_ROWS, _COLUMNS = 32, 128


@triton.jit
def _part(left, right, rows, columns, seen, inside, left_stride, right_row, right_column, RANK: tl.constexpr, PADDED: tl.constexpr, WIDE):
    """A tile of left [N, r] right [I, r]^T."""
    ranks = tl.arange(0, PADDED)
    a = tl.load(left + rows[:, None] * left_stride + ranks[None, :], mask=seen[:, None] & (ranks < RANK)[None, :], other=0.0)
    at = columns[None, :] * right_row + ranks[:, None] * right_column
    b = tl.load(right + at, mask=inside[None, :] & (ranks < RANK)[:, None], other=0.0)
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


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
    a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    a += _part(gate_left, gate_right, rows, columns, seen, inside, gate_left_stride, gate_row, gate_column, GATE_RANK, GATE_PADDED, WIDE)
    b = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    b += _part(up_left, up_right, rows, columns, seen, inside, up_left_stride, up_row, up_column, UP_RANK, UP_PADDED, WIDE)
    activated, _ = _activation(a, KIND)
    tl.store(h + at, (activated * b).to(h.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dh, gate, up, dgate, dup, h, dh_left, dh_right, gate_left, gate_right, up_left, up_right, tokens, size,
    dh_left_stride, gate_left_stride, up_left_stride, dh_row, dh_column, gate_row, gate_column, up_row, up_column,
    DH_RANK: tl.constexpr, DH_PADDED: tl.constexpr, GATE_RANK: tl.constexpr, GATE_PADDED: tl.constexpr, UP_RANK: tl.constexpr,
    UP_PADDED: tl.constexpr, KIND: tl.constexpr, WANT_H: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    seen, inside = rows < tokens, columns < size
    mask = seen[:, None] & inside[None, :]
    at = rows[:, None] * size + columns[None, :]
    a = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    a += _part(gate_left, gate_right, rows, columns, seen, inside, gate_left_stride, gate_row, gate_column, GATE_RANK, GATE_PADDED, WIDE)
    b = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    b += _part(up_left, up_right, rows, columns, seen, inside, up_left_stride, up_row, up_column, UP_RANK, UP_PADDED, WIDE)
    g = tl.load(dh + at, mask=mask, other=0.0).to(tl.float32)
    g += _part(dh_left, dh_right, rows, columns, seen, inside, dh_left_stride, dh_row, dh_column, DH_RANK, DH_PADDED, WIDE)
    activated, slope = _activation(a, KIND)
    tl.store(dgate + at, (g * b * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + at, (g * activated).to(dup.dtype.element_ty), mask=mask)
    if WANT_H:
        tl.store(h + at, (activated * b).to(h.dtype.element_ty), mask=mask)


def thin_forward(gate: torch.Tensor, up: torch.Tensor, kind: GluKind, thin: tuple[Thin, Thin]) -> torch.Tensor:
    """The product h [N, I] of gate and up [N, I], contiguous, to which `thin` is still to be added."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    if h.numel():
        names = ("gate", "up")
        _forward[_grid(gate)](
            gate, up, h, *_tensors(thin), *gate.shape, *_strides(thin), **_ranks(names, thin), **_common(gate), KIND=kind, num_warps=4
        )  # fmt: skip
    return h


def thin_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: GluKind, want_h: bool, thin: tuple[Thin, Thin, Thin]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dgate, dup, h or None), where `thin` is still to be added to gate, up and dh, in this order."""
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    h = torch.empty_like(gate) if want_h else None
    if dgate.numel():
        ordered = (thin[2], thin[0], thin[1])
        _backward[_grid(gate)](
            dh, gate, up, dgate, dup, dgate if h is None else h, *_tensors(ordered), *gate.shape, *_strides(ordered),
            **_ranks(("dh", "gate", "up"), ordered), **_common(gate), KIND=kind, WANT_H=want_h, num_warps=8,
        )  # fmt: skip
    return dgate, dup, h


def _grid(x: torch.Tensor) -> tuple[int, int]:
    """Columns go first: programs that run together share the thin left factor and neighbouring memory."""
    return triton.cdiv(x.shape[1], _COLUMNS), triton.cdiv(x.shape[0], _ROWS)


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


def _common(x: torch.Tensor) -> dict[str, int | bool]:
    # The interpreter multiplies bf16 as bit patterns.
    return {"WIDE": x.dtype is torch.float32 or not x.is_cuda, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
