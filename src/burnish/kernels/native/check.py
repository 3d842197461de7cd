"""What every C kernel must do right before it is used: a tiny input, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from burnish.kernels.forest import Forest
from burnish.kernels.native import ops

_BF16, _FP32 = torch.bfloat16, torch.float32
_Noise = Callable[..., torch.Tensor]
_SLACK = {_BF16: 2.0**-7, _FP32: 2.0**-18}
"""Largest error, relative to the largest value: two units in the last place of bf16, and for fp32 what a short sum may differ by."""


def faults() -> list[str]:
    """Names of the kernels that do not agree with torch; empty where all is well. Takes a few milliseconds."""
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(0))  # no one else's random numbers are drawn
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return [name for name, agrees in _CHECKS.items() if not all(agrees(dtype, noise) for dtype in (_FP32, _BF16))]


def _close(ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> bool:
    """Whether they agree; `roundings` where values between are rounded, too."""
    bound = roundings * _SLACK[dtype] * truth.double().abs().max() + 1e-30
    return ours.shape == truth.shape and bool((ours.double() - truth.double()).abs().max() <= bound)


def _norm(dtype: torch.dtype, noise: _Noise) -> bool:
    x, residual, dy, ds = (noise(3, 37).to(dtype) for _ in range(4))
    weight = noise(37).to(dtype)
    y, summed, rstd = ops.rms_norm_forward(x, weight, 1e-5, 0.0, False, residual, dtype)
    s = (x + residual).float()
    r = torch.rsqrt(s.square().mean(-1) + 1e-5)
    n = s * r[:, None]
    dx, dw = ops.rms_norm_backward(dy, ds, x + residual, weight, r, 0.0, False, True)
    g = dy.float() * weight.float()
    want = r[:, None] * (g - n * (g * n).mean(-1, keepdim=True)) + ds.float()
    assert summed is not None and dw is not None
    return (
        torch.equal(summed, x + residual)
        and _close(rstd, r, _FP32)
        and _close(y, weight * n.to(dtype), dtype)
        and _close(dx, want, dtype)
        and _close(dw, (dy.float() * n.to(dtype)).sum(0), _FP32)
    )


def _rope(dtype: torch.dtype, noise: _Noise) -> bool:
    x, cos, sin = noise(1, 5, 2, 20).to(dtype), noise(5, 16).to(dtype), noise(5, 16).to(dtype)
    x = x.transpose(1, 2)
    a, b = x[..., :8], x[..., 8:16]
    turned = torch.cat((x[..., :16] * cos + torch.cat((-b, a), -1) * sin, x[..., 16:]), -1)
    dy = x
    back = dy[..., :16] * sin
    back = torch.cat((dy[..., :16] * cos + torch.cat((back[..., 8:], -back[..., :8]), -1), dy[..., 16:]), -1)
    return _close(ops.rope_apply(x, cos, sin, False), turned, dtype) and _close(ops.rope_apply(dy, cos, sin, True), back, dtype)


def _glu(dtype: torch.dtype, noise: _Noise) -> bool:
    acts: dict[ops.Activation, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    }
    good = True
    for kind, act in acts.items():
        gate, up, dh = (3 * noise(2, 37).to(dtype) for _ in range(3))
        with torch.enable_grad():
            leaves = [gate.float().requires_grad_(), up.float().requires_grad_()]
            h = act(leaves[0]) * leaves[1]
            want = torch.autograd.grad((h * dh.float()).sum(), leaves)  # of a scalar: anything else makes torch import sympy
        dgate, dup, again = ops.glu_backward(dh, gate, up, kind, True)
        assert again is not None
        good &= _close(ops.glu_forward(gate, up, kind), h, dtype) and _close(again, h, dtype)
        good &= _close(dgate, want[0], dtype) and _close(dup, want[1], dtype)
    return good


def _head(dtype: torch.dtype, noise: _Noise) -> bool:
    good = True
    for cap in (None, 5.0):
        raw, y = (4 * noise(3, 601)).to(dtype), torch.tensor([0, 600, 77])
        with torch.enable_grad():
            leaf = raw.double().requires_grad_()
            z = leaf * 0.7 if cap is None else cap * torch.tanh(leaf * 0.7 / cap)
            logp = torch.log_softmax(z, -1)
            (dz,) = torch.autograd.grad(logp.gather(-1, y[:, None]).sum(), leaf)
        p = logp.exp()
        wanted = (logp.gather(-1, y[:, None])[:, 0], z.logsumexp(-1), z.mean(-1), -(p * logp).sum(-1))
        found = ops.head_chunk(raw, y, 0.7, cap, True)
        good &= all(_close(ours, truth, _FP32) for ours, truth in zip(found[:4], wanted, strict=True))
        good &= torch.equal(found[4], z.argmax(-1) == y) and _close(raw, dz, dtype)
    return good


def _attention(dtype: torch.dtype, noise: _Noise) -> bool:
    good, forest = True, Forest((41, 70, 81), (-1, 0, 0))
    for window, cap in ((None, None), (33, 2.0)):
        q, k, v = (noise(1, 81, heads, 20).to(dtype).transpose(1, 2) for heads in (6, 2, 2))
        sinks, above = noise(6), noise(1, 81, 6, 20).to(dtype).transpose(1, 2)
        with torch.enable_grad():
            leaves = [x.double().requires_grad_() for x in (q, k, v)]
            z: torch.Tensor = leaves[0].reshape(1, 2, 3, 81, 20) @ leaves[1].transpose(-1, -2)[:, :, None] * 0.3
            z = z if cap is None else cap * torch.tanh(z / cap)
            z = z.masked_fill(~forest.visible(window), float("-inf"))
            z = torch.cat((z, sinks.double().view(1, 2, 3, 1, 1).expand(-1, -1, -1, 81, -1)), -1)
            truth = (z.softmax(-1)[..., :-1] @ leaves[2][:, :, None]).flatten(1, 2)
            want = torch.autograd.grad((truth * above).sum(), leaves)
        options = ops.AttentionOptions(forest, 0.3, window, cap)
        output, kept = ops.attention_forward(q, k, v, sinks, options)
        *found, delta = ops.attention_backward(above, q, k, v, output, kept, options)
        good &= _close(output, truth, dtype, 2) and _close(kept[..., 0] + kept[..., 1].log(), z.logsumexp(-1)[0].transpose(1, 2), _FP32)
        good &= all(_close(ours, exact, dtype, 2) for ours, exact in zip(found, want, strict=True))
        good &= _close(delta, (output.double() * above.double()).sum(-1).view(2, 3, 81).transpose(1, 2), _FP32)
    return good


def _adamw(dtype: torch.dtype, noise: _Noise) -> bool:
    p, grad, m = noise(37), noise(37).to(dtype), noise(37)
    v = noise(37).square()
    g = grad.double() * 0.5
    want_m, want_v = 0.9 * m.double() + 0.1 * g, 0.99 * v.double() + 0.01 * g * g
    want = p.double() * (1 - 0.1 * 0.01) - 0.1 * (want_m / 0.5) / ((want_v / 0.3).sqrt() + 1e-8)
    ops.adamw_flat(p, grad, m, v, 0.1, 0.9, 0.99, 1e-8, 0.01, 0.5, 0.3, 0.5)
    return _close(p, want, _FP32) and _close(m, want_m, _FP32) and _close(v, want_v, _FP32)


_CHECKS: dict[str, Callable[[torch.dtype, _Noise], bool]] = {
    "rms_norm": _norm,
    "rope": _rope,
    "glu": _glu,
    "head": _head,
    "attention": _attention,
    "adamw": _adamw,
}
