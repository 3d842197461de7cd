"""Which implementation runs where. Every choice is a pure function of the device and the shapes, so a log line can state it."""

from __future__ import annotations

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
