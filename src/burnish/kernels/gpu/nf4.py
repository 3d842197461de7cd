"""NF4 weights made dense in Triton. The format stands in `kernels.nf4`."""

# A kernel's parameters are the compiler's, not Python's: the type checker cannot follow them.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BYTES = 1024
"""Bytes that one program reads: 2048 elements, 4 KiB of bf16."""


@triton.jit
def _dequantize(packed, absmax, code, out, bytes_in, size, BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    byte = tl.load(packed + at, mask=at < bytes_in, other=0).to(tl.int32)
    # A block is even, so both elements of a byte belong to the same one.
    magnitude = tl.load(absmax + (2 * at) // BLOCKSIZE, mask=at < bytes_in, other=0.0)
    # Joined so that neighbouring threads store neighbouring elements.
    value = tl.join(tl.load(code + (byte >> 4)) * magnitude, tl.load(code + (byte & 15)) * magnitude)
    element = tl.join(2 * at, 2 * at + 1)
    tl.store(out + element, value.to(out.dtype.element_ty), mask=element < size)


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, out: torch.Tensor) -> None:
    """Writes the n elements into `out` [n]; fp32 magnitudes and code, n / 2 packed bytes."""
    if out.numel():
        grid = (triton.cdiv(packed.numel(), _BYTES),)
        _dequantize[grid](packed, absmax, code.float(), out, packed.numel(), out.numel(), BLOCKSIZE=blocksize, BYTES=_BYTES)
