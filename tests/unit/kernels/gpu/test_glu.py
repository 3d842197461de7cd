"""Gated linear units in Triton, under its interpreter: the same numbers as torch's, no further from the truth."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels.glu import CASES, KINDS, glu, glu_forward, glu_kernels, glu_reference
from burnish.kernels.gpu import glu as gpu

LARGE = [("several pieces", {"rows": 2, "size": 4100})]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; sigmoid(-inf) = 0 is meant
kinds = pytest.mark.parametrize("kind", KINDS)


def inputs(case, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    both = (torch.randn(case["rows"], 2 * case["size"], generator=generator) * 3).bfloat16().to(dtype)
    gate, up = both.chunk(2, dim=-1) if case.get("halves") else (half.contiguous() for half in both.chunk(2, dim=-1))
    return gate.requires_grad_(), up.requires_grad_()


def run(product, parts, kind, **options):
    h = product(*parts, kind, **options)
    upstream = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(h.dtype)
    return [h.detach(), *torch.autograd.grad(h, parts, upstream)]


@pytest.mark.parametrize("case", [case for _, case in (*CASES, *LARGE)], ids=[name for name, _ in (*CASES, *LARGE)])
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_is_not_above_the_plain_one(case, kind, dtype):
    truth = run(glu_reference, inputs(case, torch.float64), kind)
    found, plain = run(glu, inputs(case, dtype), kind, impl="triton"), run(glu_reference, inputs(case, dtype), kind)
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == true.shape
        if true.numel():
            error, allowed = ((t.double() - true).abs().max().item() for t in (mine, theirs))
            assert error <= 1.05 * allowed + 1e-6 * true.abs().max().item()


@kinds
def test_bf16_runs(kind):
    case = {"rows": 3, "size": 40}
    truth = run(glu_reference, inputs(case, torch.float64), kind)
    for mine, true in zip(run(glu, inputs(case, torch.bfloat16), kind, impl="triton"), truth, strict=True):
        assert mine.dtype is torch.bfloat16
        assert (mine.double() - true).abs().max() <= 0.02 * true.abs().max()  # the interpreter cuts off where a GPU rounds


@kinds
def test_far_tails(kind):
    gate = torch.tensor([[-200.0, -30.0, -10.0, 0.0, 10.0, 30.0, 200.0]]).requires_grad_()
    up = torch.ones(1, 7, requires_grad=True)
    for mine, theirs in zip(run(glu, (gate, up), kind, impl="triton"), run(glu_reference, (gate, up), kind), strict=True):
        torch.testing.assert_close(mine, theirs)


@kinds
def test_the_product_can_be_had_again(kind):
    gate, up = (part.detach() for part in inputs({"rows": 4, "size": 17}, torch.float16))
    dh = torch.randn(1, 1, generator=torch.Generator().manual_seed(2)).half().expand(4, 17)
    before = [t.clone() for t in (dh, gate, up)]
    *gradients, h = gpu.glu_backward(dh, gate, up, kind, True)
    *others, nothing = gpu.glu_backward(dh, gate, up, kind, False)
    assert nothing is None
    assert torch.equal(h, gpu.glu_forward(gate, up, kind))
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((dh, gate, up), before, strict=True)), "an argument was written to"


def test_any_strides():
    wide = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for gate, up in ((wide[..., ::2], wide[..., 1::2]), (wide.t(), wide.t()), (wide[:1].expand(3, 20), wide)):
        torch.testing.assert_close(glu(gate, up, impl="triton"), glu_reference(gate, up))


def test_what_triton_does_not_know_is_left_to_torch():
    assert glu_kernels("triton", torch.zeros(1, 2, dtype=torch.float64)).forward is glu_forward
    assert glu_kernels("triton", torch.zeros(1, 2)).forward is gpu.glu_forward
