"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), as Llama and Gemma round it, with the residual addition in the same pass.

For a row x of H numbers, with a scale s = offset + weight:

    rstd = 1 / sqrt(mean(x^2) + eps)
    y    = s * x * rstd

Two families round differently, and a fast path keeps the order of the model it stands in for:

    Llama, Qwen, Mistral (gemma=False)     x * rstd is rounded to x's type, then multiplied by the weight
    Gemma (offset 1), OLMo 2 (offset 0)    everything in fp32, rounded once

With a residual, x is first replaced by x + residual, rounded to x's type, and returned too: it is the next residual. Without one, x itself
can be returned too (`through`), for a layer that norms x and adds x later: that is no copy, and x's two gradients meet in the backward pass
below instead of in an addition of their own.

Backward, with g = dy * s (rounding counts as the identity, as in autograd):

    dx      = rstd * (g - x * rstd^2 * mean(g * x))  [+ the gradient of the sum, or of the x, that was returned]
    dweight = sum over rows of dy * x * rstd

Saved: x (or the sum), the weight, and rstd, one number a row. The plain module keeps an fp32 copy of x and of the normed x as well.
Bytes a row in half precision: forward 4 H (8 H with a residual), backward 6 H (8 H with one, or with x through, where autograd's own
addition takes 6 H more); FLOPs: about 4 H and 8 H. So memory bandwidth is the only limit, and passes over it are what is saved.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.autograd.function import once_differentiable

from burnish.kernels.dispatch import Impl, choose

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rows": 7, "size": 576}),
    ("llama odd", {"rows": 5, "size": 33}),
    ("llama residual", {"rows": 6, "size": 64, "residual": True}),
    ("llama through", {"rows": 5, "size": 48, "through": True}),
    ("gemma", {"rows": 5, "size": 2050, "gemma": True, "offset": 1.0}),
    ("gemma residual", {"rows": 3, "size": 33, "gemma": True, "offset": 1.0, "residual": True}),
    ("gemma through", {"rows": 4, "size": 65, "gemma": True, "offset": 1.0, "through": True}),
    ("olmo heads", {"rows": 40, "size": 16, "gemma": True}),
    ("one row", {"rows": 1, "size": 128}),
    ("no rows", {"rows": 0, "size": 8, "residual": True}),
]
"""Shapes and flags for tests and benchmarks: rows and size of x, the rest as in `rms_norm` (residual: whether there is one)."""

Outputs = tuple[torch.Tensor, torch.Tensor | None]
Forward = Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Kernels(NamedTuple):
    """One implementation's raw functions, with the signatures of `rms_norm_forward` and `rms_norm_backward`."""

    forward: Forward
    backward: Backward


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    gemma: bool = False,
    residual: torch.Tensor | None = None,
    through: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The norm of x, or of x + residual.

    Args:
        x: [..., H], any strides.
        weight: [H], or None for a norm without a scale. It gets a gradient only where it is trained.
        eps: Added to the mean square.
        offset: Added to the weight (Gemma: 1); only with `gemma`.
        gemma: Round once, at the end; else round before the weight, as Llama does.
        residual: Added to x first, of x's shape. The sum is in the wider of the two types.
        through: Return x too, with no copy: use it wherever x is used beside this norm. With a residual the sum is returned anyway.
        out_dtype: Type of y. Default: what the plain module gives, so x's with `gemma` and the wider of x's and the weight's without.
        impl: Who computes. fp64, and on the fast paths whatever else they do not know, is always left to torch.

    Returns:
        y [..., H], or (y, x + residual) with a residual, or (y, x) with `through`.

    Raises:
        ValueError: shapes that do not fit, an offset without `gemma`, or an unknown `impl`.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"a norm over {x.shape[-1]} numbers needs a weight of that size, found {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} differ in shape")
    if offset and not gemma:
        raise ValueError("an offset goes with gemma=True: Llama's rounding knows none")
    if residual is not None and (wider := torch.promote_types(x.dtype, residual.dtype)) is not x.dtype:
        x, residual = residual.to(wider), x  # the sum is symmetric and has the type of the first
    if residual is not None and x.device.type == "cpu":
        residual = residual.to(x.dtype)  # exact: C takes one type for both
    out_dtype = out_dtype or _plain_dtype(x, weight, gemma)
    kernels = rms_norm_kernels(impl, x, weight, residual, out_dtype)
    settings = (eps, offset, gemma, through, out_dtype, kernels)
    y, summed = cast("Outputs", _RmsNorm.apply(x, weight, residual, *settings))  # pyright: ignore[reportUnknownMemberType]
    return y if summed is None else (y, summed)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    gemma: bool = False,
    residual: torch.Tensor | None = None,
    through: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` written as the models write it, for autograd: the oracle of the tests and the baseline of the benchmarks."""
    summed = x if residual is None else x + residual
    out_dtype = out_dtype or _plain_dtype(summed, weight, gemma)
    wide = summed.to(_wide_dtype(summed.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if gemma:
        y = normed if weight is None else normed * (offset + weight.to(wide.dtype))
    else:
        y = normed.to(summed.dtype) if weight is None else weight * normed.to(summed.dtype)
    return (y.to(out_dtype), summed) if through or residual is not None else y.to(out_dtype)


def rms_norm_kernels(
    impl: Impl, x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, out_dtype: torch.dtype
) -> Kernels:
    """The raw functions that compute a norm of these tensors.

    Raises:
        ValueError: `impl` is unknown.
    """
    kind = choose(impl, x.device, frozenset({"native", "triton"}))
    types = {x.dtype, out_dtype, *(t.dtype for t in (weight, residual) if t is not None)}
    alike = residual is None or residual.dtype is x.dtype
    if kind == "native" and alike and weight is not None and types <= {torch.float32, torch.bfloat16}:
        native: Any = importlib.import_module("burnish.kernels.native")
        return Kernels(native.rms_norm_forward, native.rms_norm_backward)
    if kind == "triton" and x.shape[-1] <= _LONGEST_TRITON_ROW and types <= {torch.float32, torch.bfloat16, torch.float16}:
        from burnish.kernels.gpu import rms_norm as gpu  # here: triton may not be installed

        return Kernels(gpu.rms_norm_forward, gpu.rms_norm_backward)
    return Kernels(rms_norm_forward, rms_norm_backward)


_LONGEST_TRITON_ROW = 16384  # a row is one block, so that it is read once


class _RmsNorm(torch.autograd.Function):
    """Autograd around one implementation's raw functions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        residual: torch.Tensor | None,
        eps: float,
        offset: float,
        gemma: bool,
        through: bool,
        out_dtype: torch.dtype,
        kernels: Kernels,
    ) -> Outputs:
        ctx.set_materialize_grads(False)
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(rows.shape)
        y, summed, rstd = kernels.forward(rows, weight, eps, offset, gemma, added, out_dtype)
        ctx.offset, ctx.gemma, ctx.kernels, ctx.shape = offset, gemma, kernels, x.shape
        ctx.residual_dtype = None if residual is None else residual.dtype
        whole = summed.view(x.shape) if summed is not None else x if through else None
        if whole is not None and not (ctx.needs_input_grad[0] or ctx.needs_input_grad[2]):
            ctx.mark_non_differentiable(whole)  # only the weight is trained
        ctx.save_for_backward(x if whole is None else whole, weight, rstd)
        return y.view(x.shape), whole

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        if dy is None:
            dx, dw = dsummed, torch.zeros_like(weight) if trained else None
        else:
            size = (-1, ctx.shape[-1])
            added = None if dsummed is None else dsummed.reshape(size)
            dx, dw = ctx.kernels.backward(dy.reshape(size), added, x.reshape(size), weight, rstd, ctx.offset, ctx.gemma, trained)
            dx = dx.view(ctx.shape)
        dresidual = None if ctx.residual_dtype is None or dx is None else dx.to(ctx.residual_dtype)
        return dx, dw.to(weight.dtype) if weight is not None and dw is not None else None, dresidual, *(None,) * 6


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    gemma: bool,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The norm of rows, without autograd, in torch.

    Args:
        x: [N, H].
        weight: [H] or None.
        eps: As in `rms_norm`, like offset and gemma.
        offset: Added to the weight.
        gemma: Which rounding.
        residual: [N, H] or None, of a type not wider than x's.
        out_dtype: Type of y.

    Returns:
        (y [N, H], x + residual [N, H] in x's type or None, rstd [N] in fp32; fp64 for fp64).
    """
    summed = None if residual is None else (x + residual).to(x.dtype)
    source = x if summed is None else summed
    wide = source.to(_wide_dtype(x.dtype))
    buffer = wide * wide
    rstd = buffer.mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = torch.mul(wide, rstd, out=buffer)  # over the squares, which have served
    if gemma:
        if weight is not None:
            y.mul_(weight.to(y.dtype) + offset)
    else:
        y = y.to(x.dtype)
        if weight is not None:
            y = y.mul_(weight) if torch.promote_types(y.dtype, weight.dtype) is y.dtype else y * weight
    return y.to(out_dtype), summed, rstd.squeeze(-1)


def rms_norm_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    gemma: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the rows and of the weight, without autograd, in torch. No argument is written to.

    The product dy * x serves twice: against the scale it gives every row's mean(g * x), against rstd the weight's gradient.

    Args:
        dy: [N, H], gradient of y.
        dsummed: [N, H], gradient of x + residual where that was used, or None.
        x: [N, H], what was normed: x, or x + residual.
        weight: [H] or None.
        rstd: [N], from the forward pass.
        offset: Added to the weight.
        gemma: Which rounding; gradients do not depend on it.
        need_dw: Whether the weight is trained.

    Returns:
        (dx [N, H] in x's type, with dsummed added: also the residual's gradient; dweight [H] in fp32 (fp64 for fp64) or None).
    """
    dtype = _wide_dtype(x.dtype)
    wide, g = x.to(dtype), dy.to(dtype)
    scale = None if weight is None else weight.to(dtype) + offset
    product = g * wide
    with torch.autocast(x.device.type, enabled=False):  # it would round the operands of mv
        dots = product.sum(-1) if scale is None else torch.mv(product, scale)
        dw = torch.mv(product.t(), rstd) if need_dw else None
    slope = dots.mul_(rstd).mul_(rstd).div_(-x.shape[-1])
    dx = product.copy_(g) if scale is None else torch.mul(g, scale, out=product)
    dx.addcmul_(wide, slope[:, None]).mul_(rstd[:, None])
    if dsummed is not None:
        dx += dsummed
    return dx.to(x.dtype), dw


def _plain_dtype(x: torch.Tensor, weight: torch.Tensor | None, gemma: bool) -> torch.dtype:
    """The type in which the plain module returns."""
    return x.dtype if gemma or weight is None else torch.promote_types(x.dtype, weight.dtype)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
