"""NF4 weights as bitsandbytes stores them (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), made dense again.

A weight of n elements in rows is cut into blocks of 64 in order. An element is a 4-bit index into `code`, 16 quantiles of a normal
distribution scaled to [-1, 1], times the largest magnitude of its block:

    w[2 i]     = code[packed[i] >> 4] * absmax[2 i // 64]
    w[2 i + 1] = code[packed[i] & 15] * absmax[(2 i + 1) // 64]

The product is made in fp32 and rounded once to the type asked for, so the result is bitsandbytes' own to the last bit. The magnitudes
may be quantised themselves ("double quantisation"): 8-bit indices into a table of 256 numbers, times a magnitude per 256 of them, plus an
offset.

Half a byte per element, and 4 / 64 for the magnitudes (1.02 / 64 when nested). Making it dense reads that and writes two bytes for bf16.
This module takes raw tensors and does not need bitsandbytes.
"""

from __future__ import annotations

from math import prod

import torch

from burnish.kernels.dispatch import Impl, choose

CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NF4's 16 values, appendix E of the paper."""

_CHUNK = 1 << 22
"""Elements made dense at once in plain torch: its temporaries are six times as large as the weight in bf16."""


def dense_absmax(
    indices: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor, blocksize: int = 256
) -> torch.Tensor:
    """The blocks' magnitudes [n] in fp32 from doubly quantised ones.

    Args:
        indices: uint8 [n] into `code`.
        code: fp32 [256].
        absmax: fp32 [ceil(n / blocksize)].
        offset: The mean that was taken off before quantising; one element.
        blocksize: Magnitudes per element of `absmax`.
    """
    values = code[indices.flatten().long()]
    return values * absmax.float().repeat_interleave(blocksize)[: values.numel()] + offset


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    code: torch.Tensor | None = None,
    blocksize: int = 64,
    out: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """The dense weight.

    Args:
        packed: uint8, ceil(prod(shape) / 2) elements in any shape, two to a byte, the first in the high half.
        absmax: fp32 [ceil(prod(shape) / blocksize)]; see `dense_absmax` for nested ones.
        shape: Of the weight.
        dtype: Of the result.
        code: fp32 [16]; default NF4's.
        blocksize: Elements per magnitude; even.
        out: Where to write, contiguous, of this shape and type.
        impl: `torch`, or `triton`.

    Returns:
        `out`, or a new tensor.

    Raises:
        ValueError: sizes or types do not fit, or `impl` is not available.
    """
    n = prod(shape)
    if packed.dtype is not torch.uint8 or packed.numel() != (n + 1) // 2:
        raise ValueError(f"expected {(n + 1) // 2} bytes for a weight of {list(shape)}, found {packed.numel()} of {packed.dtype}")
    if absmax.numel() != -(-n // blocksize):
        raise ValueError(f"expected {-(-n // blocksize)} magnitudes for a weight of {list(shape)}, found {absmax.numel()}")
    if blocksize % 2:
        raise ValueError(f"blocks of {blocksize} elements share a byte")
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    if tuple(out.shape) != tuple(shape) or out.dtype is not dtype or not out.is_contiguous():
        raise ValueError(f"cannot write a {dtype} weight of {list(shape)} into {out.dtype} {list(out.shape)}")
    code = torch.tensor(CODE, dtype=torch.float32, device=packed.device) if code is None else code.float()
    flat, absmax = packed.reshape(-1), absmax.reshape(-1).float()
    if choose(impl, packed.device, frozenset({"triton"})) == "triton" and dtype is not torch.float64:
        from burnish.kernels.gpu.nf4 import dequantize  # here: triton may not be installed

        dequantize(flat, absmax, code, blocksize, out.view(-1))
    else:
        dequantize_nf4_reference(flat, absmax, code, blocksize, out.view(-1))
    return out


def dequantize_nf4_reference(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, out: torch.Tensor) -> None:
    """Writes the n elements into `out` [n], in plain torch: a table of both elements of a byte, then the blocks' magnitudes."""
    byte = torch.arange(256, device=packed.device)
    # Two fp32 numbers looked up as one of 64 bits: ten times faster on a CPU than rows of a [256, 2] table.
    pairs = torch.stack((code[byte >> 4], code[byte & 15]), dim=1).view(torch.int64).view(-1)
    chunk = max(1, _CHUNK // blocksize) * blocksize
    for start in range(0, out.numel(), chunk):
        part = out[start : start + chunk]
        magnitudes = absmax[start // blocksize : -(-(start + chunk) // blocksize)]
        values = pairs.index_select(0, packed[start // 2 : (start + chunk + 1) // 2].int()).view(torch.float32)
        whole = part.numel() // blocksize * blocksize
        blocks = values[:whole].view(-1, blocksize)
        part[:whole].view(-1, blocksize).copy_(blocks.mul_(magnitudes[: blocks.shape[0], None]))
        if whole < part.numel():
            part[whole:] = values[whole : part.numel()] * magnitudes[-1]


class NF4Weight:
    """A frozen [out, in] weight in NF4: a `kernels.matmul.DenseWeight`."""

    def __init__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        shape: tuple[int, int],
        *,
        code: torch.Tensor | None = None,
        blocksize: int = 64,
        impl: Impl = "auto",
    ) -> None:
        """Holds the tensors; see `dequantize_nf4`. Nested magnitudes are better given dense: they are 1 / 64 of the weight."""
        self.packed, self.absmax, self.blocksize = packed, absmax, blocksize
        self.impl: Impl = impl
        self.shape = torch.Size(shape)
        self.code = torch.tensor(CODE, dtype=torch.float32, device=packed.device) if code is None else code

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        return self.packed.device

    def dense(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [out, in] in `dtype`, in `out` where given."""
        shape = (self.shape[0], self.shape[1])
        return dequantize_nf4(self.packed, self.absmax, shape, dtype, code=self.code, blocksize=self.blocksize, out=out, impl=self.impl)
