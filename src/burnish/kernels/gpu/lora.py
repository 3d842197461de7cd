"""The two skinny products of an adapter's backward pass in Triton, with one read of dz. What they are for stands in `kernels.lora`.

    g  = dz B       [T, r], summed over the outputs        dB = dz^T (x A^T)       [out, r], summed over the tokens

Each needs all of dz [T, out], which is far larger than what comes out: as two products it is read twice. Here a program holds one block of
columns of dz, walks down one stripe of rows, and adds to both: to dB's block in registers, and to a partial g per block of columns. The
partial sums are added afterwards in a fixed order, without atomics, so the result is the same bits each time. Bytes: T out of dz once,
and r / 128 of that for the partial g (fp32, written and read).
"""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS = 64, 128
_PROGRAMS = 256
"""Programs wanted at least: about two for each multiprocessor of a large GPU."""

LARGEST_RANK = 128


@triton.jit
def _products(
    dz,
    b,
    xa,
    g_parts,
    db_parts,
    tokens,
    outputs,
    dz_stride,
    b_stride,
    xa_stride,
    stripe,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    block = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * stripe
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, PADDED)
    inside = (columns < outputs)[:, None] & (ranks < RANK)[None, :]
    b_tile = tl.load(b + columns[:, None] * b_stride + ranks[None, :], mask=inside, other=0.0)
    b_tile = b_tile.to(tl.float32) if WIDE else b_tile
    db = tl.zeros((COLUMNS, PADDED), dtype=tl.float32)
    for start in range(0, stripe, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        seen = (rows < tokens)[:, None]
        tile = tl.load(dz + rows[:, None] * dz_stride + columns[None, :], mask=seen & (columns < outputs)[None, :], other=0.0)
        x_tile = tl.load(xa + rows[:, None] * xa_stride + ranks[None, :], mask=seen & (ranks < RANK)[None, :], other=0.0)
        tile = tile.to(tl.float32) if WIDE else tile
        x_tile = x_tile.to(tl.float32) if WIDE else x_tile
        db += tl.dot(tl.trans(tile), x_tile, input_precision="ieee")
        g = tl.dot(tile, b_tile, input_precision="ieee")
        at = (block.to(tl.int64) * tokens + rows)[:, None] * RANK + ranks[None, :]
        tl.store(g_parts + at, g, mask=seen & (ranks < RANK)[None, :])
    at = (tl.program_id(0).to(tl.int64) * outputs + columns)[:, None] * RANK + ranks[None, :]
    tl.store(db_parts + at, db, mask=inside)


def adapter_products(dz: torch.Tensor, b: torch.Tensor, xa: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dz b in dz's type, dz^T xa in fp32) with one read of dz.

    Args:
        dz: [T, out], fp32, fp16 or bf16.
        b: [out, r] of the same type.
        xa: [T, r] of the same type.
    """
    dz, b, xa = (x if x.stride(1) == 1 else x.contiguous() for x in (dz, b, xa))
    (tokens, outputs), rank = dz.shape, b.shape[1]
    blocks = triton.cdiv(outputs, _COLUMNS)
    stripes = min(max(1, triton.cdiv(_PROGRAMS, blocks)), triton.cdiv(tokens, _ROWS))
    stripe = triton.cdiv(triton.cdiv(tokens, max(stripes, 1)), _ROWS) * _ROWS
    g_parts = dz.new_empty((blocks, tokens, rank), dtype=torch.float32)
    db_parts = dz.new_empty((stripes, outputs, rank), dtype=torch.float32)
    if tokens:
        _products[(stripes, blocks)](
            dz,
            b,
            xa,
            g_parts,
            db_parts,
            tokens,
            outputs,
            dz.stride(0),
            b.stride(0),
            xa.stride(0),
            stripe,
            RANK=rank,
            PADDED=max(16, triton.next_power_of_2(rank)),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            WIDE=dz.dtype is torch.float32 or not dz.is_cuda,  # the interpreter multiplies bf16 as bit patterns
        )
    return g_parts.sum(dim=0).to(dz.dtype), db_parts.sum(dim=0)
