"""A gated MLP with adapters on its three projections, as one autograd node.

    gate = G(x)        up = U(x)        h = act(gate) * up        y = D(h)        G, U, D as in `kernels.lora`

Kept for the backward pass: x, gate and up (in + 2 I numbers per token), and the adapters' T r each. Autograd over plain modules keeps
act(gate) and h as well, and x A^T, h A^T. The product h is made again while its gradient goes back, in the same pass over gate and up:

    dh          = dy through D            needs no h but for dA of D, so h is made from gate and up then
    dgate, dup  = dh up act'(gate), dh act(gate)
    dx          = dgate through G + dup through U, in one buffer
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from burnish.kernels.dispatch import Impl, choose
from burnish.kernels.glu import GluKind, Kernels, glu_kernels, glu_reference
from burnish.kernels.lora import (
    Kept,
    Operands,
    Plan,
    Projection,
    Static,
    check,
    compute_dtype,
    grouped,
    lora_reference,
    operand_tensors,
    stack_dx,
    stack_forward,
    stack_gradients,
)


def lora_mlp(x: torch.Tensor, gate: Projection, up: Projection, down: Projection, kind: GluKind, *, impl: Impl = "auto") -> torch.Tensor:
    """down(act(gate(x)) * up(x)), each projection with its adapter.

    Args:
        x: [T, in].
        gate: [I, in].
        up: [I, in].
        down: [out, I].
        kind: The activation.
        impl: Who computes the gated product (see `glu.glu`) and the backward pass's skinny products (see `lora.lora_stack`).

    Returns:
        [T, out], in autocast's type where that is on, else in x's.

    Raises:
        ValueError: shapes do not fit, or `impl` is not available.
    """
    check(x, [gate, up])
    check(x.new_empty(0, gate.weight.shape[0]), [down])
    if gate.weight.shape != up.weight.shape:
        raise ValueError(f"gate is {list(gate.weight.shape)} but up is {list(up.weight.shape)}")
    projections, dtype = (gate, up, down), compute_dtype(x)
    # There is no C code for the adapter's products; `native` means the gated product then.
    chosen = choose("torch" if impl == "native" else impl, x.device, frozenset({"triton"}))
    first = Plan(dtype, (Static.of(gate), Static.of(up)), chosen)
    last = Plan(dtype, (Static.of(down),), chosen)
    between = glu_kernels(impl, x.new_empty(0, dtype=dtype))
    tensors = [tensor for p in projections for tensor in operand_tensors(p)]
    return cast("torch.Tensor", _LoraMLP.apply(x, first, last, kind, between, *tensors))  # pyright: ignore[reportUnknownMemberType]


def lora_mlp_reference(x: torch.Tensor, gate: Projection, up: Projection, down: Projection, kind: GluKind) -> torch.Tensor:
    """`lora_mlp` in plain differentiable torch: the oracle of the tests."""
    a, b = lora_reference(x, [gate, up])
    return lora_reference(glu_reference(a, b, kind), [down])[0]


class _LoraMLP(torch.autograd.Function):
    """Autograd around two stacks with the gated product between them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, first: Plan, last: Plan, kind: GluKind, between: Kernels, *flat: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.plans, ctx.kind, ctx.between, ctx.dtype, ctx.device_type = (first, last), kind, between, x.dtype, x.device.type
        operands = [Operands(*group) for group in grouped(flat, len(Operands._fields))]
        needs = [Operands(*group) for group in grouped(ctx.needs_input_grad[5:], len(Operands._fields))]
        x = x.to(first.compute)
        with torch.autocast(ctx.device_type, enabled=False):
            (gate, up), kept = stack_forward(x, operands[:2], first, needs[:2])
            (y,), kept_down = stack_forward(between.forward(gate, up, kind), operands[2:], last, needs[2:])
        x_is_needed = any(need.weight or need.a for need in needs[:2])
        ctx.save_for_backward(x if x_is_needed else None, gate, up, *(tensor for k in (*kept, *kept_down) for tensor in k))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        x, gate, up, *flat = ctx.saved_tensors
        first, last = ctx.plans
        kept = [Kept(*group) for group in grouped(flat, len(Kept._fields))]
        needs = [Operands(*group) for group in grouped(ctx.needs_input_grad[5:], len(Operands._fields))]
        needs_x = ctx.needs_input_grad[0]
        needs_dh = needs_x or any(any(need) for need in needs[:2])
        needs_h = bool(needs[2].a or needs[2].weight)
        dgate, dup, h = None, None, None
        with torch.autocast(ctx.device_type, enabled=False):
            dh, flow_down = stack_dx([upstream], kept[2:], last, needs[2:], last.compute if needs_dh else None)
            if dh is not None:
                dgate, dup, h = ctx.between.backward(dh, gate, up, ctx.kind, needs_h)
            elif needs_h:
                h = ctx.between.forward(gate, up, ctx.kind)
            gradients_down = stack_gradients(flow_down, h, kept[2:], last, needs[2:])
            dx, flows = stack_dx([dgate, dup], kept[:2], first, needs[:2], ctx.dtype if needs_x else None)
            gradients = stack_gradients(flows, x, kept[:2], first, needs[:2])
        return dx, None, None, None, None, *(gradient for group in (*gradients, *gradients_down) for gradient in group)
