"""Gated linear units (Shazeer 2020, arXiv 2002.05202): the product in the middle of a transformer's MLP.

    h = act(gate) * up         act: SiLU (SwiGLU), GELU with tanh (Gemma's GeGLU) or with erf

act(gate) is rounded to the input's type before the product, as transformers does, so values equal the plain module's. Backward:

    dup   = dh * act(gate)
    dgate = dh * up * act'(gate)
    silu'(x) = s (1 + x (1 - s)), s = sigmoid(x)
    gelu'(x) = P + x p                                     P, p: the normal distribution and density at x
    gelu_tanh'(x) = s + x s (1 - s) 2 u'(x), s = sigmoid(2 u(x)), u(x) = sqrt(2 / pi) (x + 0.044715 x^3)

since 0.5 (1 + tanh(u)) = sigmoid(2 u). Saved: gate and up. Neither act(gate) nor h is kept: whoever needs h again in the backward pass
(the next projection's weight or adapter) has it from `glu_backward` for one more write, from what was read anyway.

Bytes a number in half precision: forward 6, backward 10 (12 with h).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from burnish.kernels.dispatch import Impl, choose

GluKind = Literal["silu", "gelu_tanh", "gelu"]
"""The activation: `silu`, `gelu_tanh` (the approximation by tanh), or `gelu` (exact, by erf)."""

KINDS: tuple[GluKind, ...] = ("silu", "gelu_tanh", "gelu")

CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"rows": 6, "size": 1536}),
    ("odd", {"rows": 5, "size": 33}),
    ("halves of one tensor", {"rows": 4, "size": 50, "halves": True}),
    ("one row", {"rows": 1, "size": 2050}),
    ("no rows", {"rows": 0, "size": 8}),
]
"""Shapes for tests and benchmarks. halves: gate and up are the two halves of one projection's output, so rows are strided."""


class Thin(NamedTuple):
    """The product left [N, r] right [I, r]^T, which is still to be added to an [N, I]: an adapter's part of an output or a gradient."""

    left: torch.Tensor
    right: torch.Tensor


class Kernels(NamedTuple):
    """One implementation's raw functions, with the signatures of `glu_forward` and `glu_backward`."""

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def glu(gate: torch.Tensor, up: torch.Tensor, kind: GluKind = "silu", *, impl: Impl = "auto") -> torch.Tensor:
    """act(gate) * up.

    Args:
        gate: [..., I], any strides.
        up: [..., I], of the same type.
        kind: Which activation.
        impl: Who computes; types that a fast path does not know are left to torch.

    Returns:
        [..., I], contiguous.

    Raises:
        ValueError: gate and up differ in shape or type, or `kind` or `impl` is unknown.
    """
    if gate.shape != up.shape or gate.dtype is not up.dtype:
        raise ValueError(f"gate ({gate.dtype} {tuple(gate.shape)}) and up ({up.dtype} {tuple(up.shape)}) differ")
    if kind not in KINDS:
        raise ValueError(f"no activation '{kind}', expected one of {', '.join(KINDS)}")
    return cast("torch.Tensor", _Glu.apply(gate, up, kind, glu_kernels(impl, gate)))  # pyright: ignore[reportUnknownMemberType]


def glu_reference(gate: torch.Tensor, up: torch.Tensor, kind: GluKind = "silu") -> torch.Tensor:
    """`glu` in plain torch, for autograd: the oracle of the tests and the baseline of the benchmarks."""
    return _activate(gate, kind) * up


def glu_kernels(impl: Impl, gate: torch.Tensor) -> Kernels:
    """The raw functions that compute a product with this gate.

    Raises:
        ValueError: `impl` is unknown.
    """
    kind = choose(impl, gate.device, frozenset({"native", "triton"}))
    if kind == "native" and gate.dtype in (torch.float32, torch.bfloat16):
        native: Any = importlib.import_module("burnish.kernels.native")
        return Kernels(native.glu_forward, native.glu_backward)
    if kind == "triton" and gate.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from burnish.kernels.gpu import glu as gpu  # here: triton may not be installed

        return Kernels(gpu.glu_forward, gpu.glu_backward)
    return Kernels(glu_forward, glu_backward)


class _Glu(torch.autograd.Function):
    """Autograd around one implementation's raw functions."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: GluKind, kernels: Kernels) -> torch.Tensor:
        ctx.kind, ctx.kernels = kind, kernels
        ctx.save_for_backward(gate, up)
        return kernels.forward(_rows(gate), _rows(up), kind).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        dgate, dup, _ = ctx.kernels.backward(_rows(dh), _rows(gate), _rows(up), ctx.kind, False)
        return dgate.view(gate.shape), dup.view(gate.shape), None, None


def glu_forward(gate: torch.Tensor, up: torch.Tensor, kind: GluKind) -> torch.Tensor:
    """The product h [N, I] of gate and up [N, I], without autograd, in torch."""
    return _activate(gate, kind).mul_(up).contiguous()


def glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: GluKind, want_h: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of gate and up, without autograd, in torch. No argument is written to.

    Args:
        dh: [N, I], gradient of h.
        gate: [N, I].
        up: [N, I].
        kind: Which activation.
        want_h: Whether to compute h once more.

    Returns:
        (dgate, dup, h or None), each [N, I] and contiguous.
    """
    activated = _activate(gate, kind)
    if want_h:
        dup, h = dh * activated, activated.mul_(up).contiguous()
    else:
        dup, h = activated.mul_(dh), None
    product = dh * up
    if kind == "silu":
        dgate = torch.ops.aten.silu_backward(product, gate)
    else:
        dgate = torch.ops.aten.gelu_backward(product, gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return dgate.contiguous(), dup.contiguous(), h


def _activate(gate: torch.Tensor, kind: GluKind) -> torch.Tensor:
    """A new tensor, rounded to the gate's type."""
    if kind == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, I]; a view wherever rows lie evenly apart."""
    return x.reshape(-1, x.shape[-1])
