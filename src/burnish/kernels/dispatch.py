"""Which implementation runs where. Every choice is a pure function of the device and the shapes, so a log line can state it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch

AttentionKind = Literal["auto", "native", "gemm", "varlen", "cascade", "sdpa", "eager"]
"""`native`: C kernels (CPU). `gemm`: tiles of matrix products (CPU). `varlen`: one flash-attention call over all segments (CUDA).
`cascade`: the same for trees and sinks, merged from several calls. `sdpa`: one fused call per segment. `eager`: plain torch."""

_GEMM_FROM = {True: 48, False: 96}
"""Without C kernels: mean tokens of a segment from which `gemm` is faster than `sdpa` on a CPU: with bf16 products, and without."""

_GEMM_UP_TO = {True: 4096, False: 1536}
"""The longest segment up to which it is faster, without a window."""


def attention_kind(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    tree: bool,
    softcap: bool,
    sinks: bool,
    dropout: bool,
    window: int | None = None,
    lengths: Sequence[int] = (),
) -> AttentionKind:
    """How `auto` attention is computed for one call.

    Only `eager` and `sdpa` know dropout; only `eager`, `native` and `gemm` know soft caps; flash attention (`varlen`, `cascade`) knows
    only the half precision types, with the head sizes that its kernels are built for.

    Args:
        device: Where the tensors are.
        dtype: Their type.
        head_dim: Of q and v; 0 where they differ.
        tree: Whether segments share beginnings.
        softcap: Whether scores are capped.
        sinks: Whether there are sinks.
        dropout: Whether probabilities are dropped.
        window: Tokens that a token sees.
        lengths: Tokens of each segment.
    """
    if dropout:
        return "eager" if softcap or sinks else "sdpa"
    if device.type == "cpu":
        if dtype in (torch.bfloat16, torch.float32) and available("native"):
            return "native"
        return "gemm" if softcap or sinks or _gemm_pays(dtype, tree, window, lengths) else "sdpa"
    if flash_takes(device, dtype, head_dim) and not softcap:
        if not (tree or sinks) and _equal(lengths) and (window is None or window >= lengths[0]):
            return "sdpa"
        return "cascade" if tree or sinks else "varlen"
    return "eager" if softcap or sinks else "sdpa"


_ALIGNED = 64
"""Equal lengths are computed as a batch where they are multiples of this: full tiles, and few shapes to prepare kernels for."""


def _equal(lengths: Sequence[int]) -> bool:
    """Whether segments make an ordinary batch. On Hopper torch then has cuDNN's kernels: 1.4 times as fast as varlen's (H200)."""
    return len(set(lengths)) == 1 and lengths[0] % _ALIGNED == 0


def flash_takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a flash-attention kernel for such tensors."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and 0 < head_dim <= 256


def _gemm_pays(dtype: torch.dtype, tree: bool, window: int | None, lengths: Sequence[int]) -> bool:
    """Measured on one core of a Zen 5 at 9 query heads, 3 key heads, 64 dimensions (benchmarks/kernels.py)."""
    if not lengths:
        return False
    fast = dtype is torch.bfloat16 and cpu_has_fast_bf16()
    if max(lengths) > _GEMM_UP_TO[fast] and (window is None or window > _GEMM_UP_TO[fast]):
        return False
    # Without a mask of its own for trees, the fused kernel gets a dense one, and is slow.
    return tree or sum(lengths) >= _GEMM_FROM[fast] * len(lengths)


def cpu_has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices with instructions of its own (AVX-512 BF16, AMX), faster than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:  # torch < 2.13
        return False
    found: dict[str, object] = capabilities()
    return bool(found.get("avx512_bf16")) or bool(found.get("amx_bf16"))


Impl = Literal["auto", "torch", "native", "triton"]
"""Who computes a kernel. `torch`: the plain reference, everywhere. `native`: C for CPUs, compiled once. `triton`: NVIDIA and AMD GPUs."""


def choose(impl: Impl, device: torch.device, has: frozenset[str]) -> Literal["torch", "native", "triton"]:
    """The implementation that runs: the one asked for, or the device's own where this kernel has it and it is there.

    Args:
        impl: What the caller asks for.
        device: Where the tensors are.
        has: Which implementations the kernel is written in, besides `torch`.

    Raises:
        ValueError: `impl` is unknown, or this kernel is not written in it.
    """
    if impl == "auto":
        fast = "triton" if device.type == "cuda" else "native" if device.type == "cpu" else "torch"
        return fast if fast in has and available(fast) else "torch"
    if impl != "torch" and impl not in has:
        raise ValueError(f"no '{impl}' implementation, expected one of auto, torch, {', '.join(sorted(has))}")
    return impl


@cache
def available(impl: Literal["native", "triton"]) -> bool:
    """Whether an implementation can run here: Triton is installed, or the C kernels are compiled (see `kernels.native`)."""
    if impl == "triton":
        return importlib.util.find_spec("triton") is not None
    from burnish.kernels import native  # not at the top: native needs this module's neighbours

    return native.ready()
