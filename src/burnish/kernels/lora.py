"""Linear layers with a low-rank adapter: one autograd node for all projections of one input, with hand-derived gradients.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of x [T, in], with W [out, in] frozen, A [r, in], B [out, r], scale s:

    y  = x W^T + bias + s (x A^T) B^T
    g  = s dy B            one product of width r, then used twice
    dx = dy W + g A        dA = g^T x        dB = s dy^T (x A^T)        dbias = sum over rows of dy        (dW = dy^T x)

Autograd over plain modules adds three tensors as large as y and one as large as x per projection, reads dy three times, and keeps xA^T,
x and (with dropout) the dropped x of each. The node keeps x once for all projections of it, x A^T (T r numbers), and no product: a frozen
projection without an adapter keeps nothing. The A of all projections are stacked, so x A^T, dA and the adapter's part of dx are one
product each, and dx is summed in one buffer. Per projection the least number of FLOPs: 2 T in out forward, 2 T in out for dx, and
2 T r (in + out) forward, twice that backward.

Dropout is on the adapter's input, as in PEFT, and drawn for each projection anew: y = x W^T + s (x * mask / (1 - p)) A^T B^T. Its mask
(one byte per element) is kept, the dropped input is not; 1 / (1 - p) goes into s. Masked inputs differ, so nothing is stacked then.

DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) scales each output by gain = magnitude / ||W + s B A||_row, with the norm outside
the gradient (section 4.3), so the node sees gain [out] as one more input:

    z  = x W^T + s (x A^T) B^T        y = gain * z + bias        dz = gain * dy, then as above        dgain = sum over rows of dy * z

x W^T is kept for dgain, the other part of z is made again. With dropout PEFT drops the input of both parts of z, and adds what DoRA changes
to the plain layer: with d = x * mask / (1 - p), y = x W^T + bias + (gain - 1) * d W^T + gain * s (d A^T) B^T, a second large product.

Products run in autocast's type, else in x's; adapters are usually fp32 and are cast (`kernels.casts`), with the scale multiplied in before
the rounding. Gradients of adapters, bias and gain are summed in fp32. The weight may be a `DenseWeight` (NF4, FP8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from burnish.kernels.casts import cast as cast_once
from burnish.kernels.casts import joined
from burnish.kernels.dispatch import Impl, choose
from burnish.kernels.matmul import Weight, add_mm_, dense, linear, mm, mm_wide, sum_mm

CASES: list[tuple[str, dict[str, Any]]] = [
    ("o", {"tokens": 1024, "inputs": 576, "outputs": (576,), "rank": 16}),
    ("down", {"tokens": 1024, "inputs": 1536, "outputs": (576,), "rank": 16}),
    ("qkv", {"tokens": 1024, "inputs": 576, "outputs": (576, 192, 192), "rank": 16}),
    ("gate_up", {"tokens": 1024, "inputs": 576, "outputs": (1536, 1536), "rank": 16}),
]
"""Shapes of SmolLM2-135M's layers, for tests and benchmarks."""

_HAS = frozenset({"triton"})


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """An adapter of one projection.

    Attributes:
        a: [r, in].
        b: [out, r].
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: On the adapter's input; 0 outside training.
        magnitude: [out], DoRA's; None for LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A linear layer: weight [out, in] or a holder of it, bias [out], and an adapter where it has one."""

    weight: Weight
    bias: torch.Tensor | None = None
    lora: LoraWeights | None = None


def lora_stack(x: torch.Tensor, projections: Sequence[Projection], *, impl: Impl = "auto") -> tuple[torch.Tensor, ...]:
    """All projections of one input (q, k and v; gate and up), each with its adapter, as one node.

    Args:
        x: [T, in]. T may be 0.
        projections: Each [out_i, in]; any may lack an adapter or a bias.
        impl: Who computes the backward pass's skinny products: `torch`, or `triton` in one pass over dy.

    Returns:
        [T, out_i] for each, in autocast's type where that is on, else in x's.

    Raises:
        ValueError: shapes do not fit, or `impl` is not available.
    """
    check(x, projections)
    plan = Plan(compute_dtype(x), tuple(Static.of(p) for p in projections), choose(impl, x.device, _HAS))
    tensors = [tensor for p in projections for tensor in operand_tensors(p)]
    return cast("tuple[torch.Tensor, ...]", _LoraStack.apply(x, plan, *tensors))  # pyright: ignore[reportUnknownMemberType]


def lora_reference(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """`lora_stack` in plain differentiable torch, one module's arithmetic after another as PEFT does it: the oracle of the tests."""
    dtype = compute_dtype(x)
    outputs: list[torch.Tensor] = []
    for p in projections:
        w = p.weight.to(dtype) if isinstance(p.weight, torch.Tensor) else p.weight.dense(dtype)
        bias = p.bias.to(dtype) if p.bias is not None else None
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x.to(dtype), w, bias)
            if p.lora is not None:
                dropped = x.to(dtype) * _draw(x, p.lora.dropout) / (1 - p.lora.dropout) if p.lora.dropout > 0 else x.to(dtype)
                update = F.linear(F.linear(dropped, p.lora.a.to(dtype)), p.lora.b.to(dtype)) * p.lora.scaling
                gain = dora_gain(p)
                if gain is not None:
                    update = ((gain - 1) * F.linear(dropped, w) + gain * update).to(dtype)
                y = y + update
        outputs.append(y)
    return tuple(outputs)


def dora_gain(p: Projection) -> torch.Tensor | None:
    """Magnitude / ||W + s B A||_row [out] of a DoRA projection, differentiable in the magnitude only; None for others."""
    if p.lora is None or p.lora.magnitude is None:
        return None
    with torch.no_grad(), torch.autocast(p.lora.a.device.type, enabled=False):
        wide = torch.promote_types(p.lora.magnitude.dtype, torch.float32)
        a, b, w = p.lora.a.to(wide), p.lora.b.to(wide), dense(p.weight, wide)
        rows = max(1, _NORM_ELEMENTS // w.shape[1])
        parts = [torch.addmm(w[i : i + rows], b[i : i + rows], a, alpha=p.lora.scaling) for i in range(0, w.shape[0], rows)]
        norm = torch.cat([part.square_().sum(dim=1) for part in parts]).sqrt_()
    return p.lora.magnitude / norm


_NORM_ELEMENTS = 1 << 24
"""Elements of W + s B A held at once for DoRA's norm."""


def check(x: torch.Tensor, projections: Sequence[Projection]) -> None:
    """Raises ValueError where shapes do not fit: a product would otherwise fail inside the node, or broadcast."""
    if x.dim() != 2:
        raise ValueError(f"expected x of shape [T, in], found {list(x.shape)}")
    for i, p in enumerate(projections):
        outputs, inputs = p.weight.shape
        rank = p.lora.a.shape[0] if p.lora is not None else 0
        expected = {"x": (x.shape[1], inputs), "bias": (p.bias.shape if p.bias is not None else (outputs,), (outputs,))}
        if p.lora is not None:
            expected |= {"a": (p.lora.a.shape, (rank, inputs)), "b": (p.lora.b.shape, (outputs, rank))}
            if p.lora.magnitude is not None:
                expected["magnitude"] = (p.lora.magnitude.shape, (outputs,))
            if not 0 <= p.lora.dropout < 1:
                raise ValueError(f"projection {i}: dropout {p.lora.dropout} is not in [0, 1)")
        for name, (found, wanted) in expected.items():
            if found != wanted:
                raise ValueError(f"projection {i} of weight [{outputs}, {inputs}]: {name} is {found}, expected {wanted}")


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type of the products: autocast's inside autocast (but for fp64, which it leaves alone), else x's own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


@dataclass(frozen=True, slots=True)
class Static:
    """What a projection is, without its differentiable tensors."""

    holder: Any  # a DenseWeight, or None where the weight is a plain tensor
    scaling: float
    dropout: float

    @staticmethod
    def of(p: Projection) -> Static:
        """The static part of `p`."""
        holder = None if isinstance(p.weight, torch.Tensor) else p.weight
        return Static(holder, p.lora.scaling, p.lora.dropout) if p.lora is not None else Static(holder, 0.0, 0.0)

    @property
    def keep(self) -> float:
        """1 / (1 - p): what dropout scales the kept elements by."""
        return 1 / (1 - self.dropout)

    @property
    def factor(self) -> float:
        """S / (1 - p): what B is multiplied with."""
        return self.scaling * self.keep


@dataclass(frozen=True, slots=True)
class Plan:
    """How a node computes."""

    compute: torch.dtype
    statics: tuple[Static, ...]
    impl: str


class Operands(NamedTuple):
    """A projection's tensors as autograd passes them, and in the same order its gradients."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    gain: torch.Tensor | None


class Kept(NamedTuple):
    """What the backward pass needs of a projection."""

    weight: torch.Tensor | None
    a: torch.Tensor | None  # [r, in] in the compute type
    b: torch.Tensor | None  # [out, r] times s / (1 - p), in the compute type
    gain: torch.Tensor | None
    mask: torch.Tensor | None  # bool [T, in]
    xa: torch.Tensor | None  # [T, r]
    base: torch.Tensor | None  # [T, out]: (x * mask) W^T, DoRA only


def operand_tensors(p: Projection) -> Operands:
    """The tensors of a projection that may get gradients."""
    a, b = (p.lora.a, p.lora.b) if p.lora is not None else (None, None)
    return Operands(p.weight if isinstance(p.weight, torch.Tensor) else None, p.bias, a, b, dora_gain(p))


def grouped(flat: Sequence[Any], width: int) -> list[Any]:
    """A flat sequence in tuples of `width`."""
    return [flat[i : i + width] for i in range(0, len(flat), width)]


class _LoraStack(torch.autograd.Function):
    """Autograd around `stack_forward`, `stack_dx` and `stack_gradients`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan, *flat: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.dtype, ctx.device_type = plan, x.dtype, x.device.type
        operands = [Operands(*group) for group in grouped(flat, len(Operands._fields))]
        needs = [Operands(*group) for group in grouped(ctx.needs_input_grad[2:], len(Operands._fields))]
        x = x.to(plan.compute)
        with torch.autocast(ctx.device_type, enabled=False):
            outputs, kept = stack_forward(x, operands, plan, needs)
        x_is_needed = any(need.weight or need.a for need in needs)
        ctx.save_for_backward(x if x_is_needed else None, *(tensor for k in kept for tensor in k))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *flat = ctx.saved_tensors
        kept = [Kept(*group) for group in grouped(flat, len(Kept._fields))]
        needs = [Operands(*group) for group in grouped(ctx.needs_input_grad[2:], len(Operands._fields))]
        with torch.autocast(ctx.device_type, enabled=False):
            dx, flows = stack_dx(upstream, kept, ctx.plan, needs, ctx.dtype if ctx.needs_input_grad[0] else None)
            gradients = stack_gradients(flows, x, kept, ctx.plan, needs)
        return dx, None, *(gradient for group in gradients for gradient in group)


def stack_forward(
    x: torch.Tensor, operands: Sequence[Operands], plan: Plan, needs: Sequence[Any], *, apart: bool = False
) -> tuple[list[torch.Tensor], list[Kept]]:
    """The outputs of all projections of x (in the compute type), and what their gradients need.

    `apart`: outputs lack their adapters' parts, which are kept.xa kept.b^T; for adapters without dropout and magnitude.
    """
    adapters = _cast_adapters(operands, plan)
    shared = [i for i, (a, _) in enumerate(adapters) if a is not None and plan.statics[i].dropout == 0]
    xas = dict(zip(shared, _stacked(x, [a for i in shared if (a := adapters[i][0]) is not None]), strict=True))
    outputs: list[torch.Tensor] = []
    kept: list[Kept] = []
    for i, (operand, static, (a, b)) in enumerate(zip(operands, plan.statics, adapters, strict=True)):
        mask = _draw(x, static.dropout) if static.dropout > 0 else None
        dropped = x * mask if mask is not None else x
        xa = xas[i] if i in xas else mm(dropped, a.t()) if a is not None else None
        y, base = _project(x, dropped, None if apart else xa, b, operand, static, plan.compute)
        outputs.append(y)
        keeps_xa = needs[i].b or needs[i].gain or apart
        kept.append(Kept(operand.weight, a, b, operand.gain, mask, xa if keeps_xa else None, base if needs[i].gain else None))
    return outputs, kept


def _project(
    x: torch.Tensor,
    dropped: torch.Tensor,
    xa: torch.Tensor | None,
    b: torch.Tensor | None,
    operand: Operands,
    static: Static,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Y [T, out] of one projection, and z without the adapter's part where there is a gain. `dropped` is x * mask."""
    w = dense(static.holder if operand.weight is None else operand.weight, dtype)
    bias = operand.bias.to(dtype) if operand.bias is not None else None
    if operand.gain is None and (xa is None or b is None):
        return linear(x, w, bias), None
    assert xa is not None and b is not None
    if operand.gain is None:
        return sum_mm([(x, w.t())], (xa, b.t()), dtype) if bias is None else add_mm_(linear(x, w, bias), xa, b.t()), None
    base, update = linear(dropped, w), mm(xa, b.t())
    # Sums in the gain's type (fp32): the two parts, the gain and the bias are rounded once, together.
    y = update.to(operand.gain.dtype)
    if static.dropout == 0:
        y = y.add_(base).mul_(operand.gain)
        y = y.add_(bias) if bias is not None else y
    else:
        y = y.mul_(operand.gain).addcmul_(base, (operand.gain - 1) * static.keep).add_(linear(x, w, bias))
    return y.to(dtype), base


class Flow(NamedTuple):
    """What comes back to one projection: dy, dz (= dy, or gain * dy), g = s dz B, and dB, which is made while dz is at hand."""

    dy: torch.Tensor
    dz: torch.Tensor
    g: torch.Tensor | None
    db: torch.Tensor | None


def stack_dx(
    upstream: Sequence[torch.Tensor | None],
    kept: Sequence[Kept],
    plan: Plan,
    needs: Sequence[Any],
    dx_dtype: torch.dtype | None,
    *,
    apart: bool = False,
    dbs: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor | None, list[Flow | None]]:
    """The gradient of x (which itself is not needed for it), and what `stack_gradients` goes on from.

    Args:
        upstream: dy of each projection. One that nothing came back for (None) costs nothing.
        kept: From `stack_forward`.
        plan: The node's.
        needs: Which operands get gradients.
        dx_dtype: The type dx is summed in: x's own, or the compute type where that is wider. None: no dx.
        apart: Dx lacks the adapters' parts, which are flow.g kept.a.
        dbs: dz^T (x A^T) [out, r] in fp32 of each projection, where they came with dy.
    """
    flows: list[Flow | None] = []
    for i, (dy, k, static, need) in enumerate(zip(upstream, kept, plan.statics, needs, strict=True)):
        if dy is None:
            flows.append(None)
            continue
        dy = dy.to(plan.compute)
        dz = dy if k.gain is None else (dy * k.gain).to(plan.compute)
        g, db = _skinny(dz, k, plan.impl, needs_g=need.a or dx_dtype is not None, needs_b=need.b and not dbs)
        db = dbs[i] if dbs and need.b else db
        flows.append(Flow(dy, dz, g, db.mul_(static.factor) if db is not None else None))
    return _summed_dx(flows, kept, plan, dx_dtype, apart=apart) if dx_dtype is not None else None, flows


def _summed_dx(flows: Sequence[Flow | None], kept: Sequence[Kept], plan: Plan, dtype: torch.dtype, *, apart: bool) -> torch.Tensor | None:
    """What comes back to x, in one buffer; None where nothing comes back."""
    parts = [(flow, k, static) for flow, k, static in zip(flows, kept, plan.statics, strict=True) if flow is not None]
    # One weight after another: where they are stored small, the next one that is made dense overwrites the last.
    products = ((flow.dz if k.mask is None else flow.dy, _weight(k, static, plan)) for flow, k, static in parts)
    stacked = [(flow.g, k.a) for flow, k, _ in parts if k.mask is None and flow.g is not None and k.a is not None]
    thin = (_side_by_side([g for g, _ in stacked]), joined([a for _, a in stacked])) if stacked and not apart else None
    dx = sum_mm(products, thin, dtype) if parts else None
    for flow, k, static in parts:
        if dx is not None and k.mask is not None:
            dx += _through_dropout(flow, k, static, plan, dtype)
    return dx


def _weight(k: Kept, static: Static, plan: Plan) -> torch.Tensor:
    return dense(static.holder if k.weight is None else k.weight, plan.compute)


def stack_gradients(
    flows: Sequence[Flow | None], x: torch.Tensor | None, kept: Sequence[Kept], plan: Plan, needs: Sequence[Any]
) -> list[Operands]:
    """Gradients of every projection's operands. x (in the compute type) is needed where A or W is trained."""
    gradients: list[Operands] = []
    for flow, k, static, need in zip(flows, kept, plan.statics, needs, strict=True):
        if flow is None:
            gradients.append(Operands(None, None, None, None, None))
            continue
        dy, wide = flow.dy, _wide(flow.dy.dtype)
        gradients.append(
            Operands(
                weight=_weight_gradient(flow, x, k, static) if need.weight and x is not None else None,
                bias=dy.sum(dim=0, dtype=wide) if need.bias else None,
                a=mm_wide(flow.g.t(), x * k.mask) if need.a and flow.g is not None and x is not None and k.mask is not None else None,
                b=flow.db,
                gain=_gain_gradient(dy.to(wide), k, static) if need.gain else None,
            )
        )
    # Adapters that saw x itself: one product for the dA of all.
    stacked = [(i, f.g) for i, f in enumerate(flows) if f is not None and f.g is not None and kept[i].mask is None and needs[i].a]
    if stacked and x is not None:
        da = mm_wide(_side_by_side([g for _, g in stacked]).t(), x)
        for (i, _), part in zip(stacked, da.split_with_sizes([g.shape[1] for _, g in stacked]), strict=True):
            gradients[i] = gradients[i]._replace(a=part)
    return gradients


def _skinny(dz: torch.Tensor, k: Kept, impl: str, *, needs_g: bool, needs_b: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(g = dz (s B) [T, r], dz^T (x A^T) [out, r] in fp32), each where it is needed."""
    if k.b is None:
        return None, None
    if impl == "triton" and needs_g and needs_b and k.xa is not None and dz.dtype is not torch.float64:
        from burnish.kernels.gpu.lora import adapter_products  # here: triton may not be installed

        return adapter_products(dz, k.b, k.xa)
    return adapter_products_reference(dz, k.b if needs_g else None, k.xa if needs_b else None)


def adapter_products_reference(
    dz: torch.Tensor, b: torch.Tensor | None, xa: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The two products that read dz [T, out]: dz b [T, r] in its type, and dz^T xa [out, r] in fp32. The twin of the Triton kernel."""
    # The transpose of dz^T xa is computed: a short, wide product is up to three times faster than a tall, narrow one on a CPU.
    db = mm_wide(xa.t(), dz).t().contiguous() if xa is not None else None
    return mm(dz, b) if b is not None else None, db


def _through_dropout(flow: Flow, k: Kept, static: Static, plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """The part of dx that comes through the dropped input: mask * (g A + (gain - 1) dy W / (1 - p)), the second term for DoRA only."""
    assert flow.g is not None and k.a is not None and k.mask is not None
    part = mm(flow.g, k.a).to(dtype)
    if k.gain is not None:
        add_mm_(part, _beyond_plain(flow.dy, k.gain, static), _weight(k, static, plan))
    return part.mul_(k.mask)


def _weight_gradient(flow: Flow, x: torch.Tensor, k: Kept, static: Static) -> torch.Tensor:
    """DW [out, in] of a weight that is trained too."""
    if k.gain is None or k.mask is None:
        return mm_wide(flow.dz.t(), x)
    return mm_wide(flow.dy.t(), x).add_(mm_wide(_beyond_plain(flow.dy, k.gain, static).t(), x * k.mask))


def _beyond_plain(dy: torch.Tensor, gain: torch.Tensor, static: Static) -> torch.Tensor:
    """(gain - 1) dy / (1 - p): what comes back through DoRA's dropped copy of the plain layer."""
    return (dy * ((gain - 1) * static.keep)).to(dy.dtype)


def _gain_gradient(dy: torch.Tensor, k: Kept, static: Static) -> torch.Tensor:
    """Dgain [out]: the sum of dy * z, in dy's type. z's parts are rounded one by one, not their sum."""
    assert k.base is not None and k.xa is not None and k.b is not None
    return mm(k.xa, k.b.t()).to(dy.dtype).add_(k.base, alpha=static.keep).mul_(dy).sum(dim=0)


def _cast_adapters(operands: Sequence[Operands], plan: Plan) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """(A, s / (1 - p) B) of each in the compute type; all A first, so that they can lie together."""
    all_a = [None if o.a is None else cast_once(o.a, plan.compute) for o in operands]
    all_b = [None if o.b is None else cast_once(o.b, plan.compute, s.factor) for o, s in zip(operands, plan.statics, strict=True)]
    return list(zip(all_a, all_b, strict=True))


def _stacked(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """X [T, in] times each [r_i, in] transposed, as one product: [T, r_i]."""
    return mm(x, joined(list(weights)).t()).split_with_sizes([w.shape[0] for w in weights], dim=1) if weights else ()


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _draw(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Bool mask like x, true with probability 1 - dropout; on a CPU the one that torch's dropout would draw."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
