"""Which implementation runs where. Every choice is a pure function of the device and the shapes, so a log line can state it."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

import torch

AttentionKind = Literal["auto", "varlen", "sdpa", "eager"]
"""`varlen`: one flash-attention call over all segments (CUDA). `sdpa`: one fused call per segment. `eager`: dense, plain torch."""


def attention_kind(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, tree: bool, softcap: bool, sinks: bool, dropout: bool
) -> AttentionKind:
    """How `auto` attention is computed for one call.

    The fused kernels know neither soft caps nor sinks; varlen attention knows no dropout, no shared prefixes, and only the half
    precision types with head sizes that its kernels are built for.
    """
    if softcap or sinks:
        return "eager"
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256 and not tree and not dropout:
        return "varlen"
    return "sdpa"


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
