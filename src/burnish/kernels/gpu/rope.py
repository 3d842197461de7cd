"""Rotary embedding in Triton: `kernels.rope` for GPUs, q and k in one launch. Formulas stand there.

A program rotates a block of tokens of a few heads and reads their angles once. It holds both halves of a head before it writes, so it may
write where it read. Arithmetic is in fp32, rounded once: in half precision that is nearer to the truth than the plain module, which rounds
each product.
"""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

# pyright: reportGeneralTypeIssues=false
# Triton's loops are typed as nothing that can be iterated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # pairs of numbers a program holds at once
_HEADS = 4  # heads of a program


@triton.jit
def _rotate(
    x,
    out,
    x_head,
    x_token,
    out_head,
    out_token,
    cos,
    sin,
    first,
    heads,
    tokens,
    table_token,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
    INPLACE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    there = (token < tokens)[:, None]
    mask = there & (column < HALF)[None, :]
    angle = token[:, None] * table_token + column[None, :]
    c1 = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(HEADS):
        if first + i < heads:
            head = (first + i).to(tl.int64)
            source = x + head * x_head + token[:, None] * x_token
            target = out + head * out_head + token[:, None] * out_token
            x1 = tl.load(source + column[None, :], mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(source + column[None, :] + HALF, mask=mask, other=0.0).to(tl.float32)
            if INVERSE:
                y1 = x1 * c1 + x2 * s2
                y2 = x2 * c2 - x1 * s1
            else:
                y1 = x1 * c1 - x2 * s1
                y2 = x2 * c2 + x1 * s2
            tl.store(target + column[None, :], y1.to(out.dtype.element_ty), mask=mask)
            tl.store(target + column[None, :] + HALF, y2.to(out.dtype.element_ty), mask=mask)
            if REST > 0 and not INPLACE:
                beyond = 2 * HALF + tl.arange(0, REST)[None, :]
                rest = there & (beyond < SIZE)
                tl.store(target + beyond, tl.load(source + beyond, mask=rest), mask=rest)


@triton.jit
def _pair(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_heads,
    k_heads,
    tokens,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    table_batch,
    table_token,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
    INPLACE: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    cos += batch * table_batch
    sin += batch * table_batch
    first = tl.program_id(1) * HEADS
    q_last = tl.cdiv(q_heads, HEADS) * HEADS
    if first < q_last:
        q += batch * q_batch
        q_out += batch * q_out_batch
        _rotate(
            q, q_out, q_head, q_token, q_out_head, q_out_token, cos, sin, first, q_heads, tokens, table_token,
            SIZE, HALF, TOKENS, BLOCK, REST, HEADS, INVERSE, INPLACE,
        )  # fmt: skip
    else:
        k += batch * k_batch
        k_out += batch * k_out_batch
        _rotate(
            k, k_out, k_head, k_token, k_out_head, k_out_token, cos, sin, first - q_last, k_heads, tokens, table_token,
            SIZE, HALF, TOKENS, BLOCK, REST, HEADS, INVERSE, INPLACE,
        )  # fmt: skip


def rope_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, q_out: torch.Tensor, k_out: torch.Tensor
) -> None:
    """Writes q and k, rotated, into q_out and k_out, which may be q and k themselves.

    Args:
        q: [B, Hq, T, D], any strides.
        k: [B, Hkv, T, D], any strides; Hkv may be 0.
        cos: [T, R] or [B, T, R], contiguous.
        sin: As cos.
        inverse: The transpose instead.
        q_out: As q, in its type, the last dimension contiguous.
        k_out: As k, likewise.
    """
    batch, q_heads, tokens, size = q.shape
    half = cos.shape[-1] // 2
    if batch * tokens == 0:
        return
    inplace = q_out.data_ptr() == q.data_ptr()
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    block = triton.next_power_of_2(half)
    together = max(1, min(_BLOCK // block, triton.next_power_of_2(tokens)))
    grid = (triton.cdiv(tokens, together), triton.cdiv(q_heads, _HEADS) + triton.cdiv(k.shape[1], _HEADS), batch)
    _pair[grid](
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        q_heads,
        k.shape[1],
        tokens,
        *q.stride()[:3],
        *k.stride()[:3],
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        0 if cos.dim() == 2 else cos.stride(0),
        cos.stride(-2),
        SIZE=size,
        HALF=half,
        TOKENS=together,
        BLOCK=block,
        REST=triton.next_power_of_2(size - 2 * half) if size > 2 * half else 0,
        HEADS=_HEADS,
        INVERSE=inverse,
        INPLACE=inplace,
        num_warps=4,
    )


def rope_apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """As `kernels.rope.rope_apply`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rope_pair(x, x[:, :0], cos.contiguous(), sin.contiguous(), inverse, out, out[:, :0])
    return out
