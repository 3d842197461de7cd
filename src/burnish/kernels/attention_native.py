"""Forest attention by the C kernels of `native/attention_*.c`: flash attention for a CPU, in bf16 and fp32.

Kept for the backward pass are q, k, v (the caller's own), the output and two numbers of each row's softmax; probabilities are computed
again. Scores, softmax and sums are fp32. Where the processor multiplies bf16, probabilities and their gradients are rounded to it for their
products, as flash attention does on a GPU; elsewhere nothing is rounded before the results. In bf16 the error is below that of
`gemm_attention`, the twin in torch; in fp32 it is that of torch's own fused kernel, or less.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from burnish.kernels import native
from burnish.kernels.forest import Forest


def native_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forest: Forest,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a forest; arguments as those of `attention.forest_attention`, on the CPU, bf16 or fp32.

    Returns:
        [1, Hq, T, D'], laid out so that `.transpose(1, 2)` is contiguous.

    Raises:
        ValueError: Tensors that the kernels cannot take.
        BuildError: There are no kernels here.
    """
    options = native.AttentionOptions(forest, q.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        return cast("torch.Tensor", _NativeAttention.apply(q, k, v, sinks, options))  # pyright: ignore[reportUnknownMemberType]
    return native.attention_forward(q, k, v, _wide(sinks), options)[0]


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, options: native.AttentionOptions
    ) -> torch.Tensor:
        output, kept = native.attention_forward(q, k, v, _wide(sinks), options)
        ctx.save_for_backward(q, k, v, sinks, output, kept)
        ctx.options = options
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, output, kept = ctx.saved_tensors
        dq, dk, dv, delta = native.attention_backward(grads[0], q, k, v, output, kept, ctx.options)
        dsinks = None
        if sinks is not None:
            top, total = kept.unbind(-1)
            share = (sinks.float().view(k.shape[1], 1, -1) - top).exp_().div_(total)
            dsinks = share.mul_(delta).sum(1).neg_().view_as(sinks).to(sinks.dtype)
        return dq, dk, dv, dsinks, None


def _wide(sinks: torch.Tensor | None) -> torch.Tensor | None:
    return None if sinks is None else sinks.float()
