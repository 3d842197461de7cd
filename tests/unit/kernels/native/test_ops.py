"""The C kernels against plain torch in the same type, and both against float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from burnish.kernels import native
from burnish.kernels.forest import Forest

pytestmark = pytest.mark.skipif(not native.ready(), reason=native.why_not() or "")

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = [1, 3, 33, 576, 1536, 2050]
Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def error(x: Tensor, truth: Tensor) -> float:
    assert x.shape == truth.shape and torch.isfinite(x).all()
    return float((x.double() - truth.double()).abs().max())


def no_worse(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Our error is not above plain torch's, but for a millionth of the largest value."""
    slack = 1e-6 * float(truth.abs().max())
    assert ours.dtype is plain.dtype
    assert error(ours, truth) <= 1.05 * error(plain, truth) + slack


def same_bits(ours: Tensor, plain: Tensor, rare: float = 0.0) -> None:
    """Equal everywhere (NaN is NaN), but for a share of `rare`, which is within one unit in the last place of bf16."""
    assert ours.dtype is plain.dtype and torch.equal(ours.isnan(), plain.isnan())
    differs = (ours != plain) & ~plain.isnan()
    assert differs.sum() <= rare * plain.numel()
    assert ((ours - plain).abs() <= 2.0**-7 * plain.abs())[differs].all()


# ---- norm -------------------------------------------------------------------------------------------------------------------------


def plain_norm(x: Tensor, w: Tensor, rstd: Tensor, offset: float, gemma: bool, out: torch.dtype) -> Tensor:
    n = x.to(torch.promote_types(x.dtype, FP32)) * rstd[:, None]
    return (n * (offset + w.to(n.dtype)) if gemma else w * n.to(x.dtype)).to(out)


def plain_rstd(x: Tensor) -> Tensor:
    return torch.rsqrt(x.to(torch.promote_types(x.dtype, FP32)).pow(2).mean(-1) + 1e-5)


def test_norms_keep_numbers_below_the_smallest_normal_one() -> None:
    x, residual, w = (1e-39 * torch.randn(5, 100)).to(BF16), (1e-39 * torch.randn(5, 100)).to(BF16), torch.full((100,), 1e-3).to(BF16)
    y, summed, rstd = native.rms_norm_forward(x, w, 1e-5, 0.0, False, residual, BF16)
    assert summed is not None and torch.equal(summed, x + residual)
    assert torch.equal(y, plain_norm(summed, w, rstd, 0.0, False, BF16)) and 0 < y.abs().max() < torch.finfo(FP32).tiny


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("x_type", "w_type", "out"), [(a, b, c) for a in (BF16, FP32) for b in (BF16, FP32) for c in (BF16, FP32)])
def test_norm_forward(x_type: torch.dtype, w_type: torch.dtype, out: torch.dtype, gemma: bool) -> None:
    offset = 1.0 if gemma else 0.0
    for h in SIZES:
        x, residual, w = torch.randn(5, h).to(x_type), torch.randn(5, h).to(x_type), torch.randn(h).to(w_type)
        y, summed, rstd = native.rms_norm_forward(x, w, 1e-5, offset, gemma, residual, out)
        assert summed is not None and torch.equal(summed, x + residual)
        no_worse(rstd, plain_rstd(summed), plain_rstd(summed.double()))
        same_bits(y, plain_norm(summed, w, rstd, offset, gemma, out))  # every rounding where torch has it
        alone, nothing, again = native.rms_norm_forward(summed, w, 1e-5, offset, gemma, None, out)
        assert nothing is None and torch.equal(alone, y) and torch.equal(again, rstd)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("x_type", "w_type", "dy_type"), [(BF16, BF16, BF16), (FP32, FP32, FP32), (FP32, FP32, BF16), (BF16, FP32, FP32)])
def test_norm_backward(x_type: torch.dtype, w_type: torch.dtype, dy_type: torch.dtype, gemma: bool) -> None:
    offset = 1.0 if gemma else 0.0
    for h in SIZES:
        x, ds, dy = (torch.randn(67, h).to(t) for t in (x_type, x_type, dy_type))
        w = torch.randn(h).to(w_type)

        def gradients(wide: bool, x: Tensor = x, w: Tensor = w, ds: Tensor = ds, dy: Tensor = dy) -> tuple[Tensor, ...]:
            leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, w)]
            y = plain_norm(leaves[0], leaves[1], plain_rstd(leaves[0]), offset, gemma, torch.float64 if wide else dy_type)
            return torch.autograd.grad([y, leaves[0] * 1], leaves, [dy.to(y.dtype), ds.to(leaves[0].dtype)])

        dx, dw = native.rms_norm_backward(dy, ds, x, w, plain_rstd(x), offset, gemma, True)
        (plain_dx, _), (true_dx, true_dw) = gradients(False), gradients(True)
        assert dw is not None and dw.dtype is FP32
        no_worse(dx, plain_dx, true_dx)
        if x_type is BF16 and not gemma:  # what the weight was multiplied by was rounded, in the forward pass
            true_dw = (dy.double() * (x.float() * plain_rstd(x)[:, None]).to(BF16).double()).sum(0)
        torch.testing.assert_close(dw.double(), true_dw, rtol=1e-6, atol=1e-6 * float(true_dw.abs().max()))
        alone, nothing = native.rms_norm_backward(dy, None, x, w, plain_rstd(x), offset, gemma, False)
        assert nothing is None
        torch.testing.assert_close(alone.double() + ds.double(), dx.double(), rtol=2.0**-7, atol=2.0**-6 if x_type is BF16 else 1e-5)


def test_norm_keeps_nan_and_infinity() -> None:
    x = torch.ones(3, 40)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    y, _, rstd = native.rms_norm_forward(x, torch.ones(40), 1e-5, 0.0, False, None, FP32)
    same_bits(y, plain_norm(x, torch.ones(40), plain_rstd(x), 0.0, False, FP32))
    assert rstd[0].isnan() and rstd[1] == 0 and y[0].isnan().all() and y[1, 4].isnan() and y[1, 0] == 0


# ---- rope -------------------------------------------------------------------------------------------------------------------------


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d = cos.shape[-1]
    a, b, rest = x[..., : d // 2], x[..., d // 2 : d], x[..., d:]
    return torch.cat((x[..., :d] * cos + torch.cat((-b, a), -1) * sin, rest), -1)


@pytest.mark.parametrize(("x_type", "table_type"), [(BF16, BF16), (FP32, FP32), (BF16, FP32), (FP32, BF16)])
@pytest.mark.parametrize(("heads", "d", "rotated"), [(3, 64, 64), (1, 2, 2), (2, 34, 34), (2, 96, 40), (4, 128, 128), (2, 7, 0)])
def test_rope_is_torchs_bit_for_bit(heads: int, d: int, rotated: int, x_type: torch.dtype, table_type: torch.dtype) -> None:
    x = torch.randn(2, 5, heads * d + 3).to(x_type)[..., : heads * d].unflatten(-1, (heads, d)).transpose(1, 2)  # [B, H, T, D], strided
    cos, sin = torch.randn(5, rotated).to(table_type), torch.randn(5, rotated).to(table_type)  # halves unlike: the general case
    leaf = x.clone().requires_grad_()
    want = plain_rope(leaf, cos, sin).to(x_type)
    y = native.rope_apply(x, cos, sin, False)
    assert y.is_contiguous() and torch.equal(y, want)
    dy = torch.randn_like(want)
    (back,) = torch.autograd.grad(want, leaf, dy)
    ours = native.rope_apply(dy, cos, sin, True)
    if x_type is FP32 or table_type is BF16:
        assert torch.equal(ours, back)
    else:  # torch rounds each of the two products to x's type before it adds them, we round once
        truth = torch.autograd.grad(plain_rope(wide := x.double().requires_grad_(), cos.double(), sin.double()), wide, dy.double())[0]
        no_worse(ours, back, truth)
    into = native.rope_apply(x, cos, sin, False, out=x)
    assert into is x and torch.equal(x, want)


def test_rope_there_and_back() -> None:
    angle = torch.rand(9, 16).repeat(1, 2)
    x = torch.randn(1, 2, 9, 32)
    y = native.rope_apply(x, angle.cos(), angle.sin(), False)
    torch.testing.assert_close(native.rope_apply(y, angle.cos(), angle.sin(), True), x)
    assert not torch.allclose(x, y)


# ---- gated units ------------------------------------------------------------------------------------------------------------------

ACTS: dict[native.Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def test_silu_of_every_bf16_number() -> None:
    """Forward and backward: torch's bits, NaN and infinities included."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)[None]
    ones = torch.ones_like(gate)
    leaf = gate.clone().requires_grad_()
    want = F.silu(leaf)
    (slope,) = torch.autograd.grad(want, leaf, ones)
    rare = 1e-4  # the last bit of exp may be another one where torch has other instructions
    same_bits(native.glu_forward(gate, ones, "silu"), want, rare)
    dgate, dup, h = native.glu_backward(ones, gate, ones, "silu", True)
    assert h is not None
    same_bits(dgate, slope, rare)
    same_bits(dup, want, rare)
    same_bits(h, want, rare)


@pytest.mark.parametrize("kind", list(ACTS))
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("apart", [False, True])
def test_gated_units(kind: native.Activation, dtype: torch.dtype, apart: bool) -> None:
    for m in SIZES:
        both = (3 * torch.randn(7, 2 * m)).to(dtype)
        gate, up = both.chunk(2, dim=1)  # rows of one matrix
        if not apart:
            gate, up = gate.contiguous(), up.contiguous()
        dh = torch.randn(7, m).to(dtype)

        def run(wide: bool, parts: tuple[Tensor, ...] = (gate, up, dh)) -> tuple[Tensor, ...]:
            gate, up, dh = (t.double() if wide else t.clone() for t in parts)
            h = ACTS[kind](gate.requires_grad_()) * up.requires_grad_()
            return h.detach(), *torch.autograd.grad(h, [gate, up], dh)

        plain, truth = run(False), run(True)
        h = native.glu_forward(gate, up, kind)
        dgate, dup, again = native.glu_backward(dh, gate, up, kind, True)
        assert again is not None and torch.equal(again, h)
        for ours, theirs, exact in zip((h, dgate, dup), plain, truth, strict=True):
            no_worse(ours, theirs, exact)
            if kind == "silu" and dtype is BF16:
                same_bits(ours, theirs, 1e-3)
        first, second, nothing = native.glu_backward(dh, gate, up, kind, False)
        assert nothing is None and torch.equal(first, dgate) and torch.equal(second, dup)


@pytest.mark.parametrize("kind", list(ACTS))
def test_activations_far_out(kind: native.Activation) -> None:
    gate = torch.cat((torch.linspace(-110, 110, 100_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])))[None]
    truth = ACTS[kind](gate.double())
    ours = native.glu_forward(gate, torch.ones_like(gate), kind)
    assert ((ours.double() - truth).abs() <= 4e-7 * truth.abs() + 4e-7 * (truth.abs() < 8)).all()
    ends = torch.tensor([[float("inf"), float("nan")]])
    assert native.glu_forward(ends, torch.ones(1, 2), kind)[0, 0] == float("inf")
    assert native.glu_forward(ends, torch.ones(1, 2), kind)[0, 1].isnan()


# ---- head -------------------------------------------------------------------------------------------------------------------------


def plain_head(raw: Tensor, y: Tensor, scale: float, cap: float | None) -> tuple[Tensor, ...]:
    leaf = raw.detach().requires_grad_()
    z = leaf * scale if cap is None else cap * torch.tanh(leaf * scale / cap)
    logp = torch.log_softmax(z, -1)
    mine = logp.gather(-1, y[:, None])[:, 0]
    (dz,) = torch.autograd.grad(mine.sum(), leaf)
    return mine.detach(), z.logsumexp(-1).detach(), z.mean(-1).detach(), -(logp.exp() * logp).sum(-1).detach(), dz


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_head(dtype: torch.dtype, cap: float | None) -> None:
    for v in [*SIZES, 49157]:
        raw = (6 * torch.randn(4, v + 5)).to(dtype)[:, :v]  # rows lie apart
        y = torch.tensor([0, v - 1, v // 2, int(raw[3].argmax())])
        before = raw.clone()
        quiet = native.head_chunk(raw, y, 0.8, cap, False)
        assert torch.equal(raw, before)
        found = native.head_chunk(raw, y, 0.8, cap, True)
        assert all(torch.equal(a, b) for a, b in zip(quiet, found, strict=True))
        plain, truth = plain_head(before.float(), y, 0.8, cap), plain_head(before.double(), y, 0.8, cap)
        for ours, theirs, exact in zip(found[:4], plain, truth, strict=False):
            no_worse(ours, theirs, exact)
        no_worse(raw, plain[4].to(dtype), truth[4])
        assert found[4].dtype is torch.bool and torch.equal(found[4], before.float().argmax(-1) == y)


def test_head_counts_the_first_of_equals() -> None:
    z = torch.tensor([[1.0, 5.0, 5.0, 2.0]]).repeat(4, 1)
    correct = native.head_chunk(z, torch.arange(4), 1.0, None, False)[4]
    assert correct.tolist() == [False, True, False, False]


def test_head_with_large_infinite_and_undefined_logits() -> None:
    z = torch.full((3, 1500), -1e4)
    z[0, 700], z[1, :600], z[2, 5] = 1e4, float("-inf"), float("nan")
    y = torch.tensor([700, 1000, 7])
    logp, lse, _, _, correct = native.head_chunk(z, y, 1.0, None, True)
    assert logp[0] == 0 and lse[0] == 1e4 and correct[0] and (z[0] == 0).all()
    torch.testing.assert_close(logp[1], -torch.tensor(900.0).log())
    assert (z[1, :600] == 0).all() and torch.isfinite(z[1]).all()
    assert logp[2].isnan() and lse[2].isnan() and z[2].isnan().all() and not correct[2]


# ---- AdamW ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 33, 20_000])
def test_adamw(n: int) -> None:
    lr, b1, b2, eps, wd = 3e-3, 0.9, 0.95, 1e-8, 0.1
    start = torch.randn(n)
    ours, m, v = start.clone(), torch.zeros(n), torch.zeros(n)
    plain, exact = start.clone().requires_grad_(), start.double().requires_grad_()
    optimisers = [torch.optim.AdamW([x], lr=lr, betas=(b1, b2), eps=eps, weight_decay=wd) for x in (plain, exact)]
    for step in range(1, 6):
        grad = torch.randn(n)
        plain.grad, exact.grad = grad * 0.5, grad.double() * 0.5
        for optimiser in optimisers:
            optimiser.step()
        native.adamw_flat(ours, grad, m, v, lr, b1, b2, eps, wd, 1 - b1**step, 1 - b2**step, 0.5)
    no_worse(ours, plain.detach(), exact.detach())
    no_worse(m, optimisers[0].state[plain]["exp_avg"], optimisers[1].state[exact]["exp_avg"])
    no_worse(v, optimisers[0].state[plain]["exp_avg_sq"], optimisers[1].state[exact]["exp_avg_sq"])


def test_adamw_takes_bf16_gradients() -> None:
    grad = torch.randn(50).to(BF16)
    results = []
    for g in (grad, grad.float()):
        state = torch.ones(50), torch.zeros(50), torch.zeros(50)
        native.adamw_flat(state[0], g, state[1], state[2], 0.1, 0.9, 0.99, 1e-8, 0.0, 0.1, 0.01)
        results.append(torch.stack(state))
    assert torch.equal(*results)


# ---- threads, nothing, and what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def everything() -> list[Tensor]:
    torch.manual_seed(3)
    x, w, residual = torch.randn(200, 576).to(BF16), torch.randn(576).to(BF16), torch.randn(200, 576).to(BF16)
    y, summed, rstd = native.rms_norm_forward(x, w, 1e-5, 0.0, False, residual, BF16)
    assert summed is not None
    dx, dw = native.rms_norm_backward(y, residual, summed, w, rstd, 0.0, False, True)
    h = native.glu_forward(x, residual, "silu")
    grads = native.glu_backward(h, x, residual, "silu", True)
    table = torch.randn(200, 64).to(BF16)
    turned = native.rope_apply(x.view(1, 200, 9, 64).transpose(1, 2), table, table, False)
    logits = torch.randn(40, 3000)
    stats = native.head_chunk(logits, torch.arange(40), 1.0, 20.0, True)
    forest = Forest((700, 1200, 1230), (-1, 0, -1))  # a tree beyond one piece of work, and one within
    q, k, v = (torch.randn(1, 1230, heads, 24).to(BF16).transpose(1, 2) for heads in (6, 2, 2))
    attended, kept = native.attention_forward(q, k, v, None, native.AttentionOptions(forest, 0.2))
    attention = native.attention_backward(attended, q, k, v, attended, kept, native.AttentionOptions(forest, 0.2))
    flat = [torch.randn(40_000).abs() for _ in range(4)]
    native.adamw_flat(flat[0], flat[1], flat[2], flat[3], 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1)
    results = [y, summed, rstd, dx, dw, h, *grads, turned, logits, *stats, attended, kept, *attention, *flat]
    return [x for x in results if x is not None]


def test_two_threads_give_the_same_bits(two_threads: None) -> None:
    two = everything()
    torch.set_num_threads(1)
    one = everything()
    assert len(one) == len(two) > 20 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_torchs_threads_do_the_work(two_threads: None) -> None:
    """No second pool: torch's own two threads are all there are, before and after."""
    x = torch.randn(1 << 20)
    x.exp()  # torch makes its pool
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        native.glu_forward(x.view(1024, 1024), x.view(1024, 1024), "silu")
    assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_of_nothing_comes_nothing(dtype: torch.dtype) -> None:
    x, w = torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    y, summed, rstd = native.rms_norm_forward(x, w, 1e-5, 0.0, False, x, dtype)
    assert summed is not None and (y.shape, summed.shape, rstd.shape) == ((0, 8), (0, 8), (0,))
    dx, dw = native.rms_norm_backward(y, None, x, w, rstd, 0.0, False, True)
    assert dx.shape == (0, 8) and dw is not None and dw.tolist() == [0.0] * 8
    table = torch.empty(0, 8, dtype=dtype)
    assert native.rope_apply(torch.empty(1, 2, 0, 8, dtype=dtype), table, table, False).shape == (1, 2, 0, 8)
    assert native.glu_forward(x, x, "silu").shape == (0, 8)
    assert [g.shape for g in native.glu_backward(x, x, x, "gelu", True) if g is not None] == [(0, 8)] * 3
    assert [s.shape for s in native.head_chunk(x, torch.empty(0, dtype=torch.int64), 1.0, None, True)] == [(0,)] * 5
    q, options = torch.empty(1, 4, 0, 8, dtype=dtype), native.AttentionOptions(Forest((), ()), 1.0)
    attended, kept = native.attention_forward(q, q[:, :2], q[:, :2], None, options)
    assert attended.shape == (1, 4, 0, 8) and kept.shape == (2, 0, 2, 2)
    assert native.attention_backward(attended, q, q[:, :2], q[:, :2], attended, kept, options)[1].shape == (1, 2, 0, 8)
    flat = torch.empty(0)
    native.adamw_flat(flat, flat, flat, flat, 0.1, 0.9, 0.99, 1e-8, 0.0, 0.1, 0.1)


def test_what_they_cannot_take_is_refused() -> None:
    x, w = torch.randn(2, 8), torch.randn(8)
    assert native.takes(x, None, w.to(BF16)) and not native.takes(x, w.double()) and not native.takes(w.half())
    with pytest.raises(ValueError, match="take bf16 and fp32 on the CPU, found"):
        native.rms_norm_forward(x.double(), w, 1e-5, 0.0, False, None, FP32)
    with pytest.raises(ValueError, match="float16"):
        native.rms_norm_forward(x, w, 1e-5, 0.0, False, None, torch.float16)
    with pytest.raises(ValueError, match="no offset with Llama's cast"):
        native.rms_norm_forward(x, w, 1e-5, 1.0, False, None, FP32)
    with pytest.raises(ValueError, match=r"weight \[H\], found"):
        native.rms_norm_forward(x, w[:7], 1e-5, 0.0, False, None, FP32)
    with pytest.raises(ValueError, match="residual like x"):
        native.rms_norm_forward(x, w, 1e-5, 0.0, False, x.to(BF16), FP32)
    with pytest.raises(ValueError, match="rstd"):
        native.rms_norm_backward(x, None, x, w, torch.ones(3), 0.0, False, False)
    with pytest.raises(ValueError, match="even tables"):
        native.rope_apply(torch.randn(1, 1, 2, 8), torch.ones(2, 3), torch.ones(2, 3), False)
    with pytest.raises(ValueError, match="out like x"):
        native.rope_apply(torch.randn(1, 1, 2, 8), torch.ones(2, 8), torch.ones(2, 8), False, out=torch.ones(1, 1, 2, 6))
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        native.glu_forward(x, x, "relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="of one type"):
        native.glu_forward(x, x.to(BF16), "silu")
    with pytest.raises(ValueError, match=r"targets outside 0\.\.7"):
        native.head_chunk(x, torch.tensor([0, 8]), 1.0, None, False)
    with pytest.raises(ValueError, match="rows in one piece"):
        native.head_chunk(torch.randn(8, 2).t(), torch.tensor([0, 0]), 1.0, None, False)
    q, options = torch.randn(1, 3, 5, 8), native.AttentionOptions(Forest((2, 5), (-1, 0)), 1.0)
    with pytest.raises(ValueError, match="rows in one piece"):
        native.attention_forward(q, q, torch.randn(1, 3, 8, 5).transpose(2, 3), None, options)
    with pytest.raises(ValueError, match="of one type"):
        native.attention_forward(q, q.to(BF16), q, None, options)
    with pytest.raises(ValueError, match="key heads that divide the query heads"):
        native.attention_forward(q, q[:, :2], q[:, :2], None, options)
    with pytest.raises(ValueError, match="the 5 tokens of the segments"):
        native.attention_forward(q[:, :, :4], q[:, :, :4], q[:, :, :4], None, options)
    with pytest.raises(ValueError, match=r"sinks fp32 \[Hq\]"):
        native.attention_forward(q, q, q, torch.zeros(2), options)
    with pytest.raises(ValueError, match=r"fp32 \[Hkv, T, G, 2\]"):
        native.attention_backward(q, q, q, q, q, torch.zeros(3, 5), options)
    with pytest.raises(ValueError, match="fp32 buffers"):
        native.adamw_flat(w.to(BF16), w, w, w, 0.1, 0.9, 0.99, 1e-8, 0.0, 0.1, 0.1)
