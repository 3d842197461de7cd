"""A gated MLP with adapters on its three projections, as one autograd node.

    gate = G(x)        up = U(x)        h = act(gate) * up        y = D(h)        G, U, D as in `kernels.lora`

Kept for the backward pass: x, gate and up (in + 2 I numbers per token), and the adapters' T r each. Autograd over plain modules keeps
act(gate) and h as well, and x A^T, h A^T. The product h is made again while its gradient goes back, in the same pass over gate and up:

    dh          = dy through D            needs no h but for dA of D, so h is made from gate and up then
    dgate, dup  = dh up act'(gate), dh act(gate)
    dx          = dgate through G + dup through U, in one buffer

On a GPU the adapters' parts of gate, up and dh are not added to them in memory, which would read and write each once more: the kernels of
the gated product add them as they read (kernels/gpu/glu_thin.py), here and again in the backward pass, from the same thin factors. And
what the adapters' gradients need of dgate, dup and h is taken while those are made: h is written again only where down's weight is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.autograd.function import once_differentiable

from burnish.kernels.dispatch import Impl, choose
from burnish.kernels.glu import GluKind, Kernels, Thin, glu_kernels, glu_reference
from burnish.kernels.lora import (
    Flow,
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
    apart = chosen == "triton" and dtype is not torch.float64 and all(_is_thin(p) for p in projections)
    between = Between(glu_kernels(impl, x.new_empty(0, dtype=dtype)), kind, apart)
    tensors = [tensor for p in projections for tensor in operand_tensors(p)]
    return cast("torch.Tensor", _LoraMLP.apply(x, first, last, between, *tensors))  # pyright: ignore[reportUnknownMemberType]


def lora_mlp_reference(x: torch.Tensor, gate: Projection, up: Projection, down: Projection, kind: GluKind) -> torch.Tensor:
    """`lora_mlp` in plain differentiable torch: the oracle of the tests."""
    a, b = lora_reference(x, [gate, up])
    return lora_reference(glu_reference(a, b, kind), [down])[0]


LARGEST_THIN_RANK = 64
"""Above, the thin factors of a tile would crowd out the tile."""


def _is_thin(p: Projection) -> bool:
    """Whether a projection is a product plus a thin product: an adapter without dropout and magnitude."""
    return p.lora is not None and p.lora.dropout == 0 and p.lora.magnitude is None and p.lora.a.shape[0] <= LARGEST_THIN_RANK


class Want(NamedTuple):
    """Which of down's gradients are wanted that h is needed for."""

    a: bool
    weight: bool


class Back(NamedTuple):
    """What comes back through the gated product: dgate, dup, h where it is needed, and what the kernel took from them on the way."""

    dgate: torch.Tensor
    dup: torch.Tensor
    h: torch.Tensor | None
    dbs: tuple[torch.Tensor, ...] = ()  # dB / s of gate and up, for `stack_dx`
    da: torch.Tensor | None = None  # dA of down


@dataclass(frozen=True, slots=True)
class Between:
    """The gated product between the stacks. `apart`: gate, up and dh lack their adapters' parts until here."""

    kernels: Kernels
    kind: GluKind
    apart: bool

    def forward(self, gate: torch.Tensor, up: torch.Tensor, kept: Sequence[Kept]) -> torch.Tensor:
        """H of gate and up, as `stack_forward` left them."""
        if not self.apart:
            return self.kernels.forward(gate, up, self.kind)
        from burnish.kernels.gpu.glu_thin import thin_forward  # here: triton may not be installed

        return thin_forward(gate, up, self.kind, _parts(kept))

    def backward(self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kept: Sequence[Kept], flow: Flow | None, want: Want) -> Back:
        """What comes of dh, as `stack_dx` left it with `flow`. `kept` is of all three projections."""
        if not self.apart:
            return Back(*self.kernels.backward(dh, gate, up, self.kind, want.a or want.weight))
        from burnish.kernels.gpu.glu_thin import thin_backward  # here: triton may not be installed

        down = kept[2]
        assert flow is not None and flow.g is not None and down.a is not None
        made = thin_backward(dh, gate, up, self.kind, want.weight, (*_parts(kept[:2]), Thin(flow.g, down.a.t())))
        return Back(made.dgate, made.dup, made.h, (made.gate_db, made.up_db), made.down_da if want.a else None)


def _parts(kept: Sequence[Kept]) -> tuple[Thin, Thin]:
    """What gate and up lack."""
    gate, up = (Thin(k.xa, k.b) for k in kept if k.xa is not None and k.b is not None)
    return gate, up


class _LoraMLP(torch.autograd.Function):
    """Autograd around two stacks with the gated product between them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: Plan, last: Plan, between: Between, *flat: torch.Tensor | None) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.plans, ctx.between, ctx.dtype, ctx.device_type = (first, last), between, x.dtype, x.device.type
        operands = [Operands(*group) for group in grouped(flat, len(Operands._fields))]
        needs = [Operands(*group) for group in grouped(ctx.needs_input_grad[4:], len(Operands._fields))]
        x = x.to(first.compute)
        with torch.autocast(ctx.device_type, enabled=False):
            (gate, up), kept = stack_forward(x, operands[:2], first, needs[:2], apart=between.apart)
            (y,), kept_down = stack_forward(between.forward(gate, up, kept), operands[2:], last, needs[2:])
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
        needs = [Operands(*group) for group in grouped(ctx.needs_input_grad[4:], len(Operands._fields))]
        needs_x = ctx.needs_input_grad[0]
        needs_dh = needs_x or any(any(need) for need in needs[:2])
        want = Want(bool(needs[2].a), bool(needs[2].weight))
        back, h = None, None
        with torch.autocast(ctx.device_type, enabled=False):
            dh, flow_down = stack_dx([upstream], kept[2:], last, needs[2:], last.compute if needs_dh else None, apart=ctx.between.apart)
            if dh is not None:
                back = ctx.between.backward(dh, gate, up, kept, flow_down[0], want)
                h = back.h
            elif any(want):
                h = ctx.between.forward(gate, up, kept[:2])
            (gradients_down,) = stack_gradients(flow_down, h, kept[2:], last, needs[2:])
            if back is not None and back.da is not None:
                gradients_down = gradients_down._replace(a=back.da)
            upstreams, dbs = ((back.dgate, back.dup), back.dbs) if back is not None else ((None, None), ())
            dx, flows = stack_dx(upstreams, kept[:2], first, needs[:2], ctx.dtype if needs_x else None, dbs=dbs)
            gradients = stack_gradients(flows, x, kept[:2], first, needs[:2])
        return dx, None, None, None, *(gradient for group in (*gradients, gradients_down) for gradient in group)
