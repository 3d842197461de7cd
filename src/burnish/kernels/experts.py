"""The feed-forward of a mixture of experts, with adapters on every expert, as one autograd node.

Token t goes to the experts e = index[t, j], j < k, and the router says how much each counts, w = weights[t, j]. For one pair (t, j):

    p = x W_e^T + s (x A_e^T) B_e^T        [2 I]: gate and up side by side        W: gate_up
    h = act(gate) * up                     [I]
    y = h V_e^T + s (h C_e^T) D_e^T        [H]                                     V: down
    out[t] = sum over j of w y

The adapters stay two thin products. PEFT adds s B A to the weights of all experts instead, in every forward pass, and autograd makes
gradients of that size on the way back: for 128 experts of [1536, 2048] that is 800 MB in bf16, read and written several times a layer.

The pairs are sorted by expert once (S = T k rows), so each product is one product per expert over neighbouring rows: grouped. bf16 on
CUDA has one kernel for all experts (`torch.nn.functional.grouped_mm`) that reads the row counts on the device, so nothing waits for
the host. Elsewhere it is a loop over the experts that have rows. Sums over j run in order, in fp32: no atomics, same bits every time.

Backward, from d = dout[t] of each pair, not yet weighted:

    u  = d (V_e + s D_e C_e)               what dh would be for w = 1
    dw = u . h                             the router's gradient. It equals d . y, so y need not be kept
    dp = w (du/dp through h)               the gated unit is linear in its gradient, so w comes in here, in the pass that joins its halves
    dx[t] = sum over j of dp (W_e + s B_e A_e)
    dA = (s dp B_e)^T x     dB = s dp^T (x A_e^T)     dW = dp^T x
    dC = (w s d D_e)^T h    dD = s d^T (w h C_e^T)    dV = d^T (w h)

Kept for the backward pass: x once (T H numbers; its rows are gathered again), p (2 I a pair), the thin x A^T and h C^T (r a pair each), and
where each pair stands. Autograd over the plain module keeps k copies of x, act(gate), h and y as well. Adapters are cast again, not kept.

FLOPs a pair: 6 H I forward and 6 H I backward (12 H I if base weights are trained); the adapters add r (4 H + 6 I) forward, twice that
backward. Bytes: each expert that has rows is read once in each direction; what is between the products is read and written a few times.

The layout is the one of Qwen3-MoE, Mixtral, OLMoE and most others (weights [E, out, in], gate above up, no bias); transposed and
interleaved layouts (gpt-oss) are not computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from burnish.kernels.dispatch import Impl, choose
from burnish.kernels.glu import KINDS, GluKind, Kernels, glu_kernels, glu_reference
from burnish.kernels.lora import compute_dtype
from burnish.kernels.matmul import add_mm_, mm, mm_wide


class ExpertLora(NamedTuple):
    """The adapters of all experts on one weight [E, out, in]: a [E, r, in], b [E, out, r], any strides, and the factor of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"tokens": 24, "experts": 4, "top": 2, "hidden": 16, "inner": 24, "rank": 8}),
    ("one choice", {"tokens": 9, "experts": 3, "top": 1, "hidden": 8, "inner": 8, "rank": 8}),
    ("many choices, odd sizes", {"tokens": 7, "experts": 5, "top": 4, "hidden": 5, "inner": 7, "rank": 3}),
    ("most experts idle", {"tokens": 3, "experts": 16, "top": 2, "hidden": 8, "inner": 16, "rank": 8}),
    ("one expert has all", {"tokens": 11, "experts": 4, "top": 1, "hidden": 8, "inner": 16, "rank": 8, "routing": "one"}),
    ("one token", {"tokens": 1, "experts": 4, "top": 3, "hidden": 8, "inner": 8, "rank": 8}),
    ("no tokens", {"tokens": 0, "experts": 4, "top": 2, "hidden": 8, "inner": 8, "rank": 8}),
    ("strided weights", {"tokens": 13, "experts": 4, "top": 2, "hidden": 8, "inner": 16, "rank": 8, "strided": True}),
]
"""Shapes for tests and benchmarks. routing "one": all tokens go to one expert. strided: no weight and no input is contiguous."""


def expert_mlp(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: GluKind,
    lora_gate_up: ExpertLora | None = None,
    lora_down: ExpertLora | None = None,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Each token through its experts, weighted and summed.

    Args:
        x: [T, H].
        index: [T, k], integers: the experts of each token. On a CPU they are checked; on a GPU that would wait for the device.
        weights: [T, k], how much each counts; any floating type.
        gate_up: [E, 2 I, H], gate above up, any strides.
        down: [E, H, I], any strides.
        kind: The activation.
        lora_gate_up: Adapters on gate_up: a [E, r, H], b [E, 2 I, r].
        lora_down: Adapters on down: a [E, r, I], b [E, H, r].
        impl: Who computes what is not a matrix product; types that a fast path does not know are left to torch.

    Returns:
        [T, H] in x's type. Inside autocast the products are in autocast's type.

    Raises:
        ValueError: shapes do not fit, an index is out of range, or `impl` or `kind` is unknown.
    """
    _check(x, index, weights, gate_up, down, lora_gate_up, lora_down)
    if kind not in KINDS:
        raise ValueError(f"no activation '{kind}', expected one of {', '.join(KINDS)}")
    dtype, loras = compute_dtype(x), (lora_gate_up, lora_down)
    plan = Plan(
        kind,
        dtype,
        _between(impl, x.new_empty(0, dtype=dtype)),
        takes_grouped_mm(x, dtype, down.shape[1:]),
        tuple(lora.scaling if lora is not None else 0.0 for lora in loras),
    )
    adapters = [t for lora in loras for t in (lora[:2] if lora is not None else (None, None))]
    return cast("torch.Tensor", _ExpertMLP.apply(x, index, weights, plan, gate_up, down, *adapters))  # pyright: ignore[reportUnknownMemberType]


def expert_mlp_reference(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: GluKind,
    lora_gate_up: ExpertLora | None = None,
    lora_down: ExpertLora | None = None,
) -> torch.Tensor:
    """`expert_mlp` in plain differentiable torch, expert by expert: the oracle of the tests."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        tokens, choices = torch.where(index == e)
        gate, up = _reference_linear(x[tokens], gate_up[e], lora_gate_up, e).chunk(2, dim=-1)
        y = _reference_linear(glu_reference(gate, up, kind), down[e], lora_down, e)
        out = out.index_add(0, tokens, (y * weights[tokens, choices, None]).to(x.dtype))
    return out


def _reference_linear(x: torch.Tensor, weight: torch.Tensor, lora: ExpertLora | None, e: int) -> torch.Tensor:
    y = F.linear(x, weight.to(x.dtype))
    return y if lora is None else y + F.linear(F.linear(x, lora.a[e].to(x.dtype)), lora.b[e].to(x.dtype)) * lora.scaling


def takes_grouped_mm(x: torch.Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> bool:
    """Whether the products of all experts go through one kernel, which wants bf16, and rows of multiples of 16 bytes."""
    if x.device.type != "cuda" or dtype is not torch.bfloat16 or x.shape[0] == 0 or any(size % _MULTIPLE for size in sizes):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


_MULTIPLE = 8
"""Numbers of bf16 in 16 bytes."""


class Between(NamedTuple):
    """One implementation of what stands between the products."""

    glu: Callable[..., torch.Tensor]
    """As `glu.glu_forward`."""
    gate_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    """As `gate_backward`, without its first argument."""
    combine: Callable[..., torch.Tensor]
    """As `combine`."""


def _between(impl: Impl, x: torch.Tensor) -> Between:
    gated = glu_kernels(impl, x)
    if choose(impl, x.device, frozenset({"native", "triton"})) == "triton" and x.dtype is not torch.float64:
        from burnish.kernels.gpu import experts as gpu  # here: triton may not be installed

        return Between(gated.forward, gpu.gate_backward, gpu.combine)
    return Between(gated.forward, partial(gate_backward, gated), combine)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the node does, without its tensors."""

    kind: GluKind
    compute: torch.dtype
    between: Between
    grouped: bool
    scalings: tuple[float, ...]


class Route(NamedTuple):
    """Where pairs (token, choice) stand once they are sorted by expert; equal experts keep the order of tokens.

    Attributes:
        order: [S], the pair t k + j that stands in each row.
        place: [T, k], the row in which each pair stands.
        offs: [E] int32, the row after each expert's last.
        groups: (expert, first row, row after the last) of those that have rows; None where `offs` is enough.
    """

    order: torch.Tensor
    place: torch.Tensor
    offs: torch.Tensor
    groups: list[tuple[int, int, int]] | None

    @property
    def token(self) -> torch.Tensor:
        """[S], the token that each row is of."""
        return self.order.div(self.place.shape[1], rounding_mode="floor")


def route(index: torch.Tensor, experts: int, *, grouped: bool) -> Route:
    """Sorts the pairs of index [T, k] by expert. On the device alone where products are `grouped`, else the counts are read once."""
    sorted_experts, order = index.reshape(-1).sort(stable=True)
    # Not bincount: on CUDA it waits for the largest value.
    offs = torch.searchsorted(sorted_experts, torch.arange(experts, device=index.device, dtype=index.dtype), right=True, out_int32=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=index.device)).view(index.shape)
    if grouped:
        return Route(order, place, offs, None)
    ends = [0, *cast("list[int]", offs.tolist())]  # pyright: ignore[reportUnknownMemberType]
    return Route(order, place, offs, [(e, ends[e], ends[e + 1]) for e in range(experts) if ends[e] < ends[e + 1]])


class _Needs(NamedTuple):
    """`needs_input_grad`, in the order of the node's arguments."""

    x: bool
    choices: bool
    weights: bool
    plan: bool
    gate_up: bool
    down: bool
    a: bool
    b: bool
    c: bool
    d: bool

    @property
    def dp(self) -> bool:
        """Whether anything before the activation is trained."""
        return self.x or self.gate_up or self.a or self.b

    @property
    def rows(self) -> bool:
        """Whether the inputs of the first product are needed again."""
        return self.gate_up or self.a

    @property
    def h(self) -> bool:
        """Whether the inputs of the second product are."""
        return self.down or self.c


class _ExpertMLP(torch.autograd.Function):
    """Autograd around the raw products. a, b are gate_up's adapters, c, d down's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        plan: Plan,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        a, b, c, d = adapters
        needs, way = _Needs(*ctx.needs_input_grad), route(index, gate_up.shape[0], grouped=plan.grouped)
        ctx.plan, ctx.groups, ctx.dtype = plan, way.groups, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(plan.compute)
            p, xa = _project(x.index_select(0, way.token), gate_up, _cast(a, b, plan, 0), way)
            y, hc = _project(plan.between.glu(*p.chunk(2, dim=-1), plan.kind), down, _cast(c, d, plan, 1), way)
            out = plan.between.combine(y, way.place, weights.to(_wide(plan.compute)), ctx.dtype)
        kept = (x if needs.rows else None, p, xa if needs.b else None, hc if needs.d else None)
        ctx.save_for_backward(weights, gate_up, down, *adapters, *kept, way.order, way.place, way.offs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs, plan = _Needs(*ctx.needs_input_grad), cast("Plan", ctx.plan)
        if dout is None:
            return (None,) * len(needs)
        weights, gate_up, down, a, b, c, d, x, p, xa, hc, order, place, offs = ctx.saved_tensors
        way = Route(order, place, offs, ctx.groups)
        w = weights.to(_wide(plan.compute)).reshape(-1)[order]
        with torch.autocast(dout.device.type, enabled=False):
            rows = dout.to(plan.compute).index_select(0, way.token)
            lora = _cast(c, d, plan, 1)
            u, g = _back(rows, down, lora, way, needs_dx=needs.dp or needs.weights, needs_g=needs.c)
            dp, dots, h = None, None, None
            if u is not None:
                dp, dots, h = plan.between.gate_backward(u, p, w, plan.kind, want_h=needs.h, want_dots=needs.weights)
            elif needs.h:
                h = plan.between.glu(*p.chunk(2, dim=-1), plan.kind)
            del u, p
            ddown = _outer(rows, _scaled(h, w), way, down.dtype) if needs.down and h is not None else None
            dc = _outer(_scaled(g, w), h, way, c.dtype, c.shape[1]) if needs.c and g is not None and h is not None else None
            dd = _outer(_scaled(hc, w), rows, way, d.dtype, d.shape[2]).mul_(plan.scalings[1]).mT if needs.d else None
            del rows, h
            dx, dgate_up, da, db = None, None, None, None
            if dp is not None and needs.dp:
                dx, g = _back(dp, gate_up, _cast(a, b, plan, 0), way, needs_dx=needs.x, needs_g=needs.a)
                dx = plan.between.combine(dx, place, None, ctx.dtype) if dx is not None else None
                rows = x.index_select(0, way.token) if needs.rows else None
                dgate_up = _outer(dp, rows, way, gate_up.dtype) if needs.gate_up and rows is not None else None
                da = _outer(g, rows, way, a.dtype, a.shape[1]) if needs.a and g is not None and rows is not None else None
                db = _outer(xa, dp, way, b.dtype, b.shape[2]).mul_(plan.scalings[0]).mT if needs.b else None
        dweights = dots[place].to(weights.dtype) if dots is not None else None
        return dx, None, dweights, None, dgate_up, ddown, da, db, dc, dd


def gate_backward(
    gated: Kernels, u: torch.Tensor, p: torch.Tensor, w: torch.Tensor, kind: GluKind, *, want_h: bool, want_dots: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Back through h = act(gate) * up, where h counts w. No argument is written to.

    Args:
        gated: Who computes the gated unit.
        u: [S, I], the gradient of h for w = 1.
        p: [S, 2 I], gate and up side by side.
        w: [S], fp32 (fp64 for fp64).
        kind: The activation.
        want_h: Whether to compute h once more.
        want_dots: Whether to compute w's gradient.

    Returns:
        (dp [S, 2 I], u . h of each row [S] or None, h [S, I] or None).
    """
    *halves, h = gated.backward(u, *p.chunk(2, dim=-1), kind, want_h or want_dots)
    dots = (u.to(w.dtype) * h).sum(dim=-1) if want_dots and h is not None else None
    dp = torch.empty_like(p)
    for half, place in zip(halves, dp.chunk(2, dim=-1), strict=True):
        torch.mul(half, w[:, None], out=place)  # w is wider: rounded as it is written
    return dp, dots, h if want_h else None


def combine(y: torch.Tensor, place: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[T, H] in `dtype`: the sum over j, in order and in fp32, of the rows place[t, j] of y [S, H], times weights[t, j] where given."""
    total = y.new_zeros(place.shape[0], y.shape[1], dtype=_wide(y.dtype))
    for j in range(place.shape[1]):
        part = y.index_select(0, place[:, j]).to(total.dtype)
        if weights is None:
            total.add_(part)
        else:
            total.addcmul_(part, weights[:, j, None])
    return total.to(dtype)


Adapters = tuple[torch.Tensor, torch.Tensor]
"""(A [E, r, in], s B [E, out, r]) in the compute type, contiguous; r may have been filled up."""


def _project(x: torch.Tensor, weight: torch.Tensor, lora: Adapters | None, way: Route) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each row of x [S, in] times its expert's weight [E, out, in], and the adapter's thin part x A^T [S, r]."""
    y = _rows(x, weight.mT, way)
    if lora is None:
        return y, None
    a, b = lora
    xa = _rows(x, a.mT, way)
    return _rows(xa, b.mT, way, out=y), xa


def _back(
    dy: torch.Tensor, weight: torch.Tensor, lora: Adapters | None, way: Route, *, needs_dx: bool, needs_g: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx [S, in], g = s dy B [S, r]), each where it is needed."""
    dx = _rows(dy, weight, way) if needs_dx else None
    if lora is None or not (needs_dx or needs_g):
        return dx, None
    a, b = lora
    g = _rows(dy, b, way)
    return (_rows(g, a, way, out=dx) if dx is not None else None), g


def _rows(x: torch.Tensor, weight: torch.Tensor, way: Route, out: torch.Tensor | None = None) -> torch.Tensor:
    """Each row of x [S, K] times its expert's weight [E, K, N]; added to `out` [S, N] in place where that is given."""
    if way.groups is None:
        y = _grouped_mm(x, weight.to(x.dtype), way.offs)
        return y if out is None else out.add_(y)
    made = x.new_empty(x.shape[0], weight.shape[2]) if out is None else out
    for e, start, end in way.groups:
        w = weight[e].to(x.dtype)  # here: one expert's copy at a time
        if out is None:
            made[start:end] = mm(x[start:end], w)
        else:
            add_mm_(made[start:end], x[start:end], w)
    return made


def _outer(a: torch.Tensor, b: torch.Tensor, way: Route, dtype: torch.dtype, rank: int | None = None) -> torch.Tensor:
    """The sum over each expert's rows of a [S, M] and b [S, N], row by row a^T b: [E, M, N] in `dtype`; zero where it has no rows.

    M is cut to `rank` where that is given: a thin product may have been filled up.
    """
    if way.groups is None:
        made = _grouped_mm(a.t(), b, way.offs)[:, :rank]
        # Some devices leave what was in memory before where an expert has no rows (pytorch/pytorch#172439).
        rows = way.offs.diff(prepend=way.offs.new_zeros(1))
        return made.masked_fill_((rows == 0)[:, None, None], 0).to(dtype)
    made = a.new_zeros(way.offs.shape[0], a.shape[1], b.shape[1], dtype=dtype)
    for e, start, end in way.groups:
        made[e] = mm_wide(a[start:end].t(), b[start:end])
    return made


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    function = cast("Any", F).grouped_mm
    return function(_aligned(a), _aligned(b), offs=offs)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its rows or columns lie together and begin at multiples of 16 bytes, which the kernel asks for; else a copy."""
    strides, step = x.stride(), 16 // x.element_size()
    fits = 1 in strides[-2:] and all(stride == 1 or stride % step == 0 for stride in strides) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _cast(a: torch.Tensor | None, b: torch.Tensor | None, plan: Plan, which: int) -> Adapters | None:
    """The factor goes in before the rounding, so it costs no accuracy. Zeros fill up a rank that grouped products do not take."""
    if a is None or b is None:
        return None
    missing = -a.shape[1] % _MULTIPLE if plan.grouped else 0
    a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b * plan.scalings[which], (0, missing))
    return a.to(plan.compute).contiguous(), b.to(plan.compute).contiguous()


def _scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Each row of x [S, N] times its w [S], rounded once."""
    return (x * w[:, None]).to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _check(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    lora_gate_up: ExpertLora | None,
    lora_down: ExpertLora | None,
) -> None:
    if x.dim() != 2 or index.dim() != 2 or gate_up.dim() != 3:
        found = [list(t.shape) for t in (x, index, gate_up)]
        raise ValueError(f"expected x [T, H], index [T, k], gate_up [E, 2 I, H], found {found[0]}, {found[1]}, {found[2]}")
    experts, double, hidden = gate_up.shape
    expected = [
        ("x", x, (index.shape[0], hidden)),
        ("weights", weights, index.shape),
        ("gate_up", gate_up, (experts, double // 2 * 2, hidden)),
        ("down", down, (experts, hidden, double // 2)),
    ]
    for name, lora, out, inputs in (("lora_gate_up", lora_gate_up, double, hidden), ("lora_down", lora_down, hidden, double // 2)):
        if lora is not None:
            rank = lora.a.shape[1] if lora.a.dim() == 3 else 0
            expected += [(f"{name}.a", lora.a, (experts, rank, inputs)), (f"{name}.b", lora.b, (experts, out, rank))]
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    if index.device.type == "cpu" and index.numel() and not (0 <= int(index.min()) and int(index.max()) < experts):
        raise ValueError(f"index runs from {int(index.min())} to {int(index.max())}, but there are {experts} experts")
