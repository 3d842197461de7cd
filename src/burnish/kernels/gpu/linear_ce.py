"""The head's chunk of logits in Triton: statistics and gradient of the logits, one program a row, in place.

For a row z of V raw logits, with s = scale and c = softcap, u = c tanh(s z / c) (u = s z without a cap):

    pass 1    top = max u, total = sum exp(u - top), sum u, sum exp(u - top) (u - top): online, each lane for its own columns,
              one exp a logit; the lanes meet once, at the end of the row
    pass 2    dz_v = ((v = y) g_logp + p_v (g_lse - g_logp - g_entropy (log p_v + entropy)) + g_mean / V) du/dz     over z

Pass 2 goes backwards: it starts with what pass 1 read last, which is nearest. At best a row stays in the L2 in between, and memory sees
each logit read once and written once: with the products before and after, 8 bytes a bf16 logit. FLOPs do not count: about 20 a logit,
against 4 H in the two products.

Sums are in fp32, for logits in bf16, fp16 or fp32. Columns are counted in 32 bits, rows in 64: a chunk may be larger than 2^31.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# (Triton's language has no types: it is Python in looks only.)

# pyright: reportGeneralTypeIssues=false
# Triton's loops are typed as nothing that can be iterated.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from burnish.kernels.logit_rows import Fields

_BLOCK, _STAGES = 4096, tl.constexpr(3)
"""Columns at a time, 16 a thread, and blocks on their way. Measured on an H200 over 128k bf16 logits, with 2048 to 16384 columns, 4 to 32
warps, 1 and 3 stages: 2.1 to 2.5 TB/s of one read and one write, this the fastest."""


def head_chunk(z: torch.Tensor, y: torch.Tensor, scale: float, softcap: float | None, gradient: bool, want: frozenset[str]) -> Fields:
    """Statistics of a chunk.

    Args:
        z: [C, V] raw logits, rows contiguous. Replaced by the gradient of logprobs where `gradient`.
        y: int64 [C], contiguous.
        scale: Multiplier of z.
        softcap: Cap after the scale, or None.
        gradient: Whether to write it.
        want: As in `linear_ce.head_stats`.
    """
    rows, vocabulary = z.shape
    logp, lse = (z.new_empty(rows, dtype=torch.float32) for _ in range(2))
    mean, entropy = (z.new_empty(rows, dtype=torch.float32) if name in want else None for name in ("mean_logit", "entropy"))
    correct = z.new_empty(rows, dtype=torch.bool) if "correct" in want else None
    with torch.cuda.device_of(z):
        _forward[(rows,)](
            z, y, logp, lse, mean, entropy, correct, z.stride(0), vocabulary, scale, softcap, gradient, **_blocks(vocabulary)
        )  # fmt: skip
    return logp, lse, mean, entropy, correct, None


def head_chunk_backward(
    z: torch.Tensor, y: torch.Tensor, upstream: tuple[torch.Tensor | None, ...], scale: float, softcap: float | None
) -> torch.Tensor:
    """Replaces raw logits z [C, V] by their gradient, from fp32 gradients [C] of (logprobs, logsumexp, mean_logit, entropy); returns z."""
    rows, vocabulary = z.shape
    with torch.cuda.device_of(z):
        _backward[(rows,)](z, y, *upstream, z.stride(0), vocabulary, scale, softcap, **_blocks(vocabulary))
    return z


def _blocks(vocabulary: int) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) loses the small ones, which the series knows to 1e-8.
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    q = x * x
    small = x * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def _shaped(z, scale, softcap):
    z = z.to(tl.float32) * scale
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _survey(
    z_ptr, y, z_y, vocabulary, scale, softcap, ENTROPY: tl.constexpr, MEAN: tl.constexpr, CORRECT: tl.constexpr, BLOCK: tl.constexpr
):
    """Pass 1: (top, log_total, entropy, mean, beaten) of a row, the last three only where asked."""
    lanes = tl.arange(0, BLOCK)
    # A lane that has seen no logit has a top lower than any, and no mass.
    tops = tl.full((BLOCK,), -1e38, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)  # sum exp(u - top) (u - top)
    sums = tl.zeros((BLOCK,), tl.float32)
    beaten = tl.zeros((BLOCK,), tl.int32)  # there is a larger logit, or an equal one before the target: the argmax is the first
    for start in tl.range(0, vocabulary, BLOCK, num_stages=_STAGES):
        columns = start + lanes
        inside = columns < vocabulary
        u = _shaped(tl.load(z_ptr + columns, mask=inside, other=0.0), scale, softcap)
        distance = tl.where(inside, u - tops, 0.0)
        e = tl.exp(-tl.abs(distance))  # of the smaller of u and top to the larger one
        rises = distance > 0
        if ENTROPY:
            spread = tl.where(rises, (spread - mass * distance) * e, spread + e * distance)
        mass = tl.where(rises, mass * e + 1.0, mass + tl.where(inside, e, 0.0))
        tops = tl.where(rises, u, tops)
        if MEAN:
            sums += tl.where(inside, u, 0.0)
        if CORRECT:
            beaten |= (inside & (columns != y) & ((u > z_y) | ((u == z_y) & (columns < y)))).to(tl.int32)
    top = tl.max(tops, 0)
    fall = tl.exp(tops - top)
    total = tl.sum(mass * fall, 0)
    log_total = tl.log(total)
    lower = tl.where(mass > 0, tops - top, 0.0)
    entropy = log_total - tl.sum(fall * (spread + mass * lower), 0) / total
    return top, log_total, entropy, tl.sum(sums, 0) / vocabulary, tl.max(beaten, 0)


@triton.jit
def _descend(z_ptr, y, top, log_total, entropy, on_target, on_p, everywhere, g_entropy, vocabulary, scale, softcap, BLOCK: tl.constexpr):
    """Pass 2: the gradient over the logits, `(v = y) on_target + p_v (on_p - g_entropy (log p_v + entropy)) + everywhere`."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    for i in tl.range(0, blocks, num_stages=_STAGES):
        columns = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        u = _shaped(tl.load(z_ptr + columns, mask=inside, other=0.0), scale, softcap)
        logp = u - top - log_total
        factor = on_p
        if g_entropy is not None:
            factor = on_p - g_entropy * (logp + entropy)
        dz = tl.exp(logp) * factor + tl.where(columns == y, on_target, 0.0) + everywhere
        if softcap is not None:
            t = u / softcap
            dz *= 1.0 - t * t
        tl.store(z_ptr + columns, (dz * scale).to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _or_zero(pointer, row):
    value = 0.0
    if pointer is not None:
        value = tl.load(pointer + row)
    return value


@triton.jit
def _forward(
    z_ptr, y_ptr, logp_ptr, lse_ptr, mean_ptr, entropy_ptr, correct_ptr, row_stride, vocabulary, scale, softcap,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * row_stride
    y = tl.load(y_ptr + row)
    z_y = _shaped(tl.load(z_ptr + y), scale, softcap)
    top, log_total, entropy, mean, beaten = _survey(
        z_ptr, y, z_y, vocabulary, scale, softcap, entropy_ptr is not None, mean_ptr is not None, correct_ptr is not None, BLOCK
    )
    tl.store(logp_ptr + row, z_y - top - log_total)
    tl.store(lse_ptr + row, top + log_total)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)
    if correct_ptr is not None:
        tl.store(correct_ptr + row, beaten == 0)
    if GRADIENT:
        _descend(z_ptr, y, top, log_total, entropy, 1.0, -1.0, 0.0, None, vocabulary, scale, softcap, BLOCK)


@triton.jit
def _backward(
    z_ptr, y_ptr, g_logp_ptr, g_lse_ptr, g_mean_ptr, g_entropy_ptr, row_stride, vocabulary, scale, softcap, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * row_stride
    y = tl.load(y_ptr + row)
    top, log_total, entropy, _, _ = _survey(z_ptr, y, 0.0, vocabulary, scale, softcap, g_entropy_ptr is not None, False, False, BLOCK)
    g_logp = _or_zero(g_logp_ptr, row)
    on_p = _or_zero(g_lse_ptr, row) - g_logp
    everywhere = _or_zero(g_mean_ptr, row) / vocabulary
    g_entropy = None
    if g_entropy_ptr is not None:
        g_entropy = tl.load(g_entropy_ptr + row)
    _descend(z_ptr, y, top, log_total, entropy, g_logp, on_p, everywhere, g_entropy, vocabulary, scale, softcap, BLOCK)
