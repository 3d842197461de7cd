"""What stands between the products of experts in Triton, under its interpreter: no further from the truth than torch's."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels.experts import combine, expert_mlp, expert_mlp_reference, gate_backward
from burnish.kernels.glu import KINDS, glu_kernels
from burnish.kernels.gpu import experts as gpu

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; sigmoid(-inf) = 0 is meant


def drawn(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def assert_no_worse(found, plain, truth):
    for mine, theirs, right in zip(found, plain, truth, strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == right.shape
        error, allowed = ((t.double() - right).norm().item() for t in (mine, theirs))
        sampling = right.numel() ** -0.5 if right.numel() else 0.0  # what two samples of so many roundings differ by
        assert error <= (1.05 + sampling) * allowed + 1e-6 * right.norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "rows", "size"), [*((kind, 100, 33) for kind in KINDS), ("silu", 30, 2050)])
def test_gate_backward(kind, rows, size, dtype):
    u, p, w = drawn((rows, size), (rows, 2 * size), (rows,), dtype=dtype)
    options = {"want_h": True, "want_dots": True}
    found = gpu.gate_backward(u, p, w.float(), kind, **options)
    plain = gate_backward(glu_kernels("torch", u), u, p, w.float(), kind, **options)
    truth = gate_backward(glu_kernels("torch", u.double()), u.double(), p.double(), w.double(), kind, **options)
    assert_no_worse(found, plain, truth)


@pytest.mark.parametrize(("want_h", "want_dots"), list(product([True, False], repeat=2)))
def test_only_what_is_wanted(want_h, want_dots):
    u, p, w = drawn((3, 20), (3, 40), (3,))
    before = [t.clone() for t in (u, p, w)]
    found = gpu.gate_backward(u, p, w, "silu", want_h=want_h, want_dots=want_dots)
    plain = gate_backward(glu_kernels("torch", u), u, p, w, "silu", want_h=want_h, want_dots=want_dots)
    torch.testing.assert_close(found, plain)
    assert all(torch.equal(a, b) for a, b in zip((u, p, w), before, strict=True)), "an argument was written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "top", "hidden"), [(7, 3, 40), (2, 1, 2100), (0, 2, 8)])
@pytest.mark.parametrize("weighted", [True, False])
def test_combine(tokens, top, hidden, weighted, dtype):
    y, weights = drawn((tokens * top, hidden), (tokens, top), dtype=dtype)
    place = torch.randperm(tokens * top, generator=torch.Generator().manual_seed(1)).view(tokens, top)
    weights = weights.float() if weighted else None
    truth = combine(y.double(), place, weights.double() if weighted else None, torch.float64)
    assert_no_worse([gpu.combine(y, place, weights, dtype)], [combine(y, place, weights, dtype)], [truth])
    wide = gpu.combine(y, place, weights, torch.float32)
    torch.testing.assert_close(wide, truth.float(), rtol=1e-5, atol=1e-5)


def test_bf16_runs():
    u, p, w = drawn((3, 40), (3, 80), (3,))
    truth = gate_backward(glu_kernels("torch", u), u, p, w, "silu", want_h=True, want_dots=True)
    for mine, right in zip(gpu.gate_backward(u.bfloat16(), p.bfloat16(), w, "silu", want_h=True, want_dots=True), truth, strict=True):
        assert (mine - right).norm() <= 0.02 * right.norm()  # the interpreter cuts off where a GPU rounds
    rows, place = drawn((6, 20))[0], torch.tensor([[4, 0], [2, 1], [5, 3]])
    found, right = (
        gpu.combine(rows.bfloat16(), place, w[:, None].expand(3, 2), torch.bfloat16),
        combine(rows, place, w[:, None].expand(3, 2), w.dtype),
    )
    assert (found - right).norm() <= 0.02 * right.norm()


@pytest.mark.parametrize("tokens", [11, 0])
def test_the_whole_node(tokens):
    x, weights, gate_up, down = drawn((tokens, 12), (tokens, 2), (4, 20, 12), (4, 12, 10))
    index = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(2)).topk(2, dim=-1).indices
    outcomes = []
    for function, options in ((expert_mlp, {"impl": "triton"}), (expert_mlp_reference, {})):
        given = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
        out = function(given[0], index, *given[1:], "gelu_tanh", **options)
        outcomes.append([out.detach(), *torch.autograd.grad((out * drawn(out.shape)[0]).sum(), given)])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)
