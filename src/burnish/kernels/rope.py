"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split form of transformers.

The first R numbers of a head (all, or fewer with partial rotary) are two halves x1, x2, and a token's angles are two tables of R numbers:

    y1 = x1 * cos1 - x2 * sin1
    y2 = x2 * cos2 + x1 * sin2

The tables come from the model's own rotary module, so every kind of scaling (linear, dynamic, YaRN, Llama 3, LongRoPE) and its attention
factor are in them already, and so are positions: a flat batch whose positions start again in each segment is no special case here.

The map is linear in x. Its backward pass is the transpose, which is the same map with sin1' = -sin2 and sin2' = -sin1; for tables whose
halves are equal, as all of transformers' are, that is a rotation by the opposite angle:

    dx1 = dy1 * cos1 + dy2 * sin2
    dx2 = dy2 * cos2 - dy1 * sin1

Saved: the tables alone. Bytes a number in half precision: 4, plus the tables once per token for several heads; FLOPs: 3.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from burnish.kernels.dispatch import Impl, choose

CASES: list[tuple[str, dict[str, Any]]] = [
    ("grouped", {"batch": 1, "heads": 4, "kv_heads": 2, "tokens": 7, "size": 16}),
    ("long", {"batch": 1, "heads": 3, "kv_heads": 1, "tokens": 37, "size": 64}),
    ("partial", {"batch": 1, "heads": 2, "kv_heads": 2, "tokens": 5, "size": 24, "rotary": 12}),
    ("batch, a table each", {"batch": 2, "heads": 2, "kv_heads": 1, "tokens": 3, "size": 12, "tables": 2}),
    ("batch, one table", {"batch": 2, "heads": 2, "kv_heads": 1, "tokens": 4, "size": 8}),
    ("one token", {"batch": 1, "heads": 9, "kv_heads": 3, "tokens": 1, "size": 10}),
    ("no token", {"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 0, "size": 8}),
]
"""Shapes for tests and benchmarks. rotary: how many numbers of a head are rotated (default all); tables: batch size of the tables."""

Tables = tuple[torch.Tensor, torch.Tensor]
Pair = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool, torch.Tensor, torch.Tensor], None]
"""(q, k, cos, sin, inverse, where to write q, where to write k)."""


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inplace: bool = False, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q and k by their tokens' positions.

    Args:
        q: [B, Hq, T, D], any strides: a projection's output [B, T, Hq, D] seen through a transpose is read where it lies.
        k: [B, Hkv, T, D], likewise.
        cos: [T, R], [1, T, R] or [B, T, R] with R <= D even.
        sin: As cos.
        inplace: Write into q and k. Only for a caller that owns them: nothing else may need their old values, neither later nor in its
            backward pass. Where a node of the graph has saved them, its backward pass raises torch's error about in-place changes.
            It is a permission: views whose heads do not lie in one piece are rotated elsewhere.
        impl: Who computes; types that a fast path does not know are left to torch.

    Returns:
        (q, k) rotated, in their own types, dense, in the memory order of the inputs (as plain torch gives them).

    Raises:
        ValueError: the tables do not fit q and k, `inplace` is asked of a leaf that requires gradients, or `impl` is unknown.
    """
    tables = _tables(q, k, cos, sin)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return rope_reference(q, k, cos, sin)  # learned angles: the kernels know no gradient of tables
    if inplace and any(x.is_leaf and x.requires_grad for x in (q, k)):
        raise ValueError("q and k are leaves that require gradients: they cannot be written in place")
    inplace = inplace and all(x.stride(-1) == 1 and 0 not in x.stride() for x in (q, k))
    pair = _kernel(impl, q, k, *tables)
    return cast("tuple[torch.Tensor, torch.Tensor]", _Rope.apply(q, k, *tables, inplace, pair))  # pyright: ignore[reportUnknownMemberType]


def rope_reference(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` written as the models write it, for autograd: the oracle of the tests and the baseline of the benchmarks."""
    cos, sin = (table.unsqueeze(-3) for table in (cos, sin))
    size = cos.shape[-1]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :size], x[..., size:]
        first, second = turned.chunk(2, dim=-1)
        y = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((y.to(x.dtype), rest), dim=-1)

    return rotated(q), rotated(k)


class _Rope(torch.autograd.Function):
    """Autograd around one implementation of `_torch_pair`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inplace: bool, pair: Pair
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.pair = pair
        ctx.save_for_backward(cos, sin)
        if not inplace:
            outputs = _dense_like(q), _dense_like(k)
            pair(q, k, cos, sin, False, *outputs)
            return outputs
        # Aliases rather than mark_dirty: autograd would rebuild the history of views, and copy their base's gradient. Aliases share
        # the version counter, so a node that saved q or k still notices; kernels outside torch do not count, so it is counted here.
        aliases = q.detach(), k.detach()
        pair(q, k, cos, sin, False, *aliases)
        increment_version([x for x in aliases if not x.is_inference()])
        return aliases

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dq: torch.Tensor | None, dk: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if dq is None or dk is None:  # only one of the two was used
            one = dq if dk is None else dk
            if one is not None:
                none = one.new_empty(one.shape[0], 0, *one.shape[2:])
                found = _dense_like(one)
                ctx.pair(one, none, cos, sin, True, found, none)
                one = found
            return (one, None, *(None,) * 4) if dk is None else (None, one, *(None,) * 4)
        outputs = _dense_like(dq), _dense_like(dk)
        ctx.pair(dq, dk, cos, sin, True, *outputs)
        return *outputs, None, None, None, None


def rope_apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rotates x, without autograd, in torch.

    In half precision each product is rounded, as the models do, so values equal theirs bit for bit.

    Args:
        x: [B, H, T, D], any strides.
        cos: [T, R], or [B, T, R].
        sin: As cos.
        inverse: The transpose instead: from a gradient of the result to that of x.
        out: Where to write, may be x itself; default a new contiguous tensor.

    Returns:
        [B, H, T, D] in x's type.
    """
    out = x.new_empty(x.shape) if out is None else out
    size, half = cos.shape[-1], cos.shape[-1] // 2
    cos, sin = (table.unsqueeze(-3) for table in (cos, sin))
    s1, s2 = sin[..., :half], sin[..., half:]
    if inverse:
        s1, s2 = -s2, -s1
    x1, x2 = x[..., :half], x[..., half:size]
    target = out[..., :size]
    if out.data_ptr() == x.data_ptr() or torch.promote_types(x.dtype, cos.dtype) is not out.dtype:
        y = x[..., :size] * cos
    else:
        y = torch.mul(x[..., :size], cos, out=target)
    if y.dtype in (torch.float32, torch.float64):
        y[..., :half].addcmul_(x2, s1, value=-1)
        y[..., half:].addcmul_(x1, s2)
    else:
        y[..., :half] -= x2 * s1
        y[..., half:] += x1 * s2
    if y is not target:
        target.copy_(y)
    if size < x.shape[-1] and out.data_ptr() != x.data_ptr():
        out[..., size:] = x[..., size:]
    return out


def _torch_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, q_out: torch.Tensor, k_out: torch.Tensor
) -> None:
    rope_apply(q, cos, sin, inverse, q_out)
    rope_apply(k, cos, sin, inverse, k_out)


def _native_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, q_out: torch.Tensor, k_out: torch.Tensor
) -> None:
    native: Any = importlib.import_module("burnish.kernels.native")
    for x, out in ((q, q_out), (k, k_out)):
        source = x if x.stride(-1) == 1 else x.contiguous()
        if cos.dim() == 2:
            native.rope_apply(source, cos, sin, inverse, out)
        else:
            for i in range(x.shape[0]):
                native.rope_apply(source[i : i + 1], cos[i], sin[i], inverse, out[i : i + 1])


def _kernel(impl: Impl, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    kind = choose(impl, q.device, frozenset({"native", "triton"}))
    types = {q.dtype, k.dtype, cos.dtype, sin.dtype}
    if kind == "native" and types <= {torch.float32, torch.bfloat16}:
        return _native_pair
    if kind == "triton" and types <= {torch.float32, torch.bfloat16, torch.float16}:
        from burnish.kernels.gpu import rope as gpu  # here: triton may not be installed

        return gpu.rope_pair
    return _torch_pair


def _dense_like(x: torch.Tensor) -> torch.Tensor:
    """A new tensor in x's memory order, but each head's numbers side by side."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else x.new_empty(x.shape)


def _tables(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tables:
    """The tables as [T, R] where all rows of the batch share them, else [B, T, R]; their last dimension contiguous.

    Raises:
        ValueError: as `rope`.
    """
    batch, _, tokens, size = q.shape
    fits = cos.shape == sin.shape and cos.dim() in (2, 3) and cos.shape[-2] == tokens and cos.shape[-1] % 2 == 0
    fits = fits and cos.shape[-1] <= size and (cos.dim() == 2 or cos.shape[0] in (1, batch))
    if not fits or (k.shape[0], k.shape[2], k.shape[3]) != (batch, tokens, size):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)))
        raise ValueError(f"expected q [B, Hq, T, D], k [B, Hkv, T, D] and tables [1 or B, T, R], R even and at most D, found {shapes}")
    if cos.dim() == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return cos.contiguous(), sin.contiguous()
