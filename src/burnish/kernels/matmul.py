"""Products of 2-D matrices for hand-written autograd nodes, and weights that may be stored small.

The products are raw: no autograd, no autocast, both operands of one type. They exist because the obvious call is not the fastest one
everywhere, and a node should not have to know:

    fp32 on AMD processors with AVX-512: MKL, which torch.mm calls, keeps to AVX2 there; oneDNN uses the whole width. Measured on a
        Zen 5 core, [1024, 576] x [576, 1536] and its like: 2.1 to 2.3 times faster, and the skinny products of an adapter too. It sums
        an element's products in another order: the error against float64 is 1.5 to 2.2 times MKL's, 4e-7 to 6e-7 relative (fp32 as
        usual, not a reduced precision).
    bf16 and fp16 on CUDA where the result is wanted in fp32: the product's own accumulator is returned, not its rounded copy.

A frozen weight may be any `DenseWeight`: NF4 (`kernels.nf4`), FP8 (`kernels.fp8`). It is made dense into scratch memory right before its
product, and the next one overwrites it: one dense weight exists at a time, the largest.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterable
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F


@runtime_checkable
class DenseWeight(Protocol):
    """A frozen [out, in] weight that is stored in another form."""

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is stored, and made dense."""
        ...

    def dense(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight as [out, in] in `dtype`, written into `out` where that is given (contiguous, of this shape and type)."""
        ...


Weight = torch.Tensor | DenseWeight
"""A weight of a product: a plain tensor, or one that is made dense for each product."""


def dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`. A stored-small one is valid only until this thread's next call: use it at once."""
    if isinstance(weight, torch.Tensor):
        return weight.to(dtype)
    return weight.dense(dtype, out=_SCRATCH.take(weight.shape, dtype, weight.device))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """X [M, K] @ weight [N, K]^T + bias [N], as F.linear."""
    if _by_onednn(x, prod(weight.shape)):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A [M, K] @ b [K, N]."""
    if _by_onednn(a, prod(b.shape)):
        return _onednn(a, b.t(), None)
    return torch.mm(a, b)


def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A [M, K] @ b [K, N] in fp32 (fp64 for fp64). CUDA keeps its fp32 accumulator; a CPU rounds to the operands' type first."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    product = mm(a, b)
    return product if product.dtype is torch.float64 else product.float()


def add_mm_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Out [M, N] += a [M, K] @ b [K, N], in place; returns `out`. Its type may be wider than the operands'."""
    if out.dtype is not a.dtype:
        return out.add_(mm_wide(a, b) if out.device.type == "cuda" else mm(a, b))
    # A long sum is worth oneDNN and an addition; a short one (an adapter's rank) is bound by `out`, which addmm_ passes over once.
    if a.shape[1] >= 64 and _by_onednn(a, prod(b.shape)):
        return out.add_(_onednn(a, b.t(), None))
    return out.addmm_(a, b)


def sum_mm(
    products: Iterable[tuple[torch.Tensor, torch.Tensor]], thin: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype
) -> torch.Tensor:
    """The sum of a [M, K] @ b [K, N] over `products`, and of `thin`, whose K is an adapter's rank: [M, N] in `dtype`.

    The thin one costs a pass over the result. On CUDA it comes first, where that pass is one of writing, and the others add to it (1.09
    times as fast on an H200 at K = N = 2048); on a CPU last, since there a product that adds to something may take two calls.

    Args:
        products: At least one, each made when its turn has come.
        thin: May be None.
        dtype: The operands' type or a wider one.
    """
    first = thin is not None and thin[0].device.type == "cuda"
    terms = chain([thin] if first else [], products, [] if first else [thin])
    out: torch.Tensor | None = None
    for term in terms:
        if term is not None:
            out = mm(*term).to(dtype) if out is None else add_mm_(out, *term)
    assert out is not None, "nothing to sum"
    return out


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products on this CPU go through oneDNN: an AMD processor with AVX-512, and a torch that has both libraries."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.13
    return capabilities is not None and bool(capabilities().get("avx512_f")) and "AuthenticAMD" in _processor()


def _processor() -> str:
    """What the system says about its processor, the vendor's name among it."""
    listing = Path("/proc/cpuinfo")
    return platform.processor() + (listing.read_text(errors="replace")[:4096] if listing.exists() else "")


_SMALL = 1 << 20
"""Multiplications below which a product is not worth oneDNN's preparation."""


def _by_onednn(a: torch.Tensor, others: int) -> bool:
    """Whether the product of `a` [M, K] and a matrix of `others` elements goes through oneDNN."""
    return a.dtype is torch.float32 and a.device.type == "cpu" and a.shape[0] * others >= _SMALL and onednn_is_faster()


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    operator = cast("Any", torch.ops.mkldnn)._linear_pointwise
    return operator(_ordinary(x), _ordinary(weight), bias, "none", [], "")


def _ordinary(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its rows or its columns lie together, else a copy (an expanded gradient, a strided view)."""
    rows, columns = x.stride()
    return x if (columns == 1 and rows >= x.shape[1]) or (rows == 1 and columns >= x.shape[0]) else x.contiguous()


class _Scratch(threading.local):
    """One reusable buffer per thread, device, type and stream, as large as the largest weight asked for."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised memory of this shape; the same as last time."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key, size = (device, dtype, stream), prod(shape)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers.pop(key, None)  # given back before the larger one is asked for
            self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self.buffers[key][:size].view(shape)


_SCRATCH = _Scratch()
