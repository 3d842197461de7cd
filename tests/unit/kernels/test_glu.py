"""Gated linear units: against fp64 truth, against the models' own arithmetic, and every gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from burnish.kernels import native
from burnish.kernels.glu import CASES, KINDS, glu, glu_backward, glu_forward, glu_kernels, glu_reference

cases = pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
kinds = pytest.mark.parametrize("kind", KINDS)


def inputs(case, dtype, seed=0):
    """(gate, up), the same numbers in every type that holds bf16; far out in the tails too."""
    generator = torch.Generator().manual_seed(seed)
    both = (torch.randn(case["rows"], 2 * case["size"], generator=generator) * 3).bfloat16().to(dtype)
    gate, up = both.chunk(2, dim=-1) if case.get("halves") else (half.contiguous() for half in both.chunk(2, dim=-1))
    return gate.requires_grad_(), up.requires_grad_()


def run(product, parts, kind, **options):
    """h and the gradients of gate and up."""
    h = product(*parts, kind, **options)
    upstream = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(h.dtype)
    return [h.detach(), *torch.autograd.grad(h, parts, upstream)]


def assert_not_worse(found, plain, truth):
    """Scale-free: no further from the truth than plain torch in the same type, but for a last bit."""
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == true.shape
        if true.numel():
            error, allowed = ((t.double() - true).abs().max().item() for t in (mine, theirs))
            assert error <= 1.05 * allowed + 1e-6 * true.abs().max().item()


@cases
@kinds
def test_equals_plain_torch_in_double(case, kind):
    parts = inputs(case, torch.float64)
    for mine, theirs in zip(run(glu, parts, kind), run(glu_reference, parts, kind), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@kinds
def test_gradients_are_the_derivatives(kind):
    parts = inputs({"rows": 3, "size": 5}, torch.float64)
    assert torch.autograd.gradcheck(lambda gate, up: glu(gate, up, kind), parts)
    assert torch.autograd.gradcheck(lambda gate, up: glu_reference(gate, up, kind), parts)


@cases
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_not_above_the_plain_one(case, kind, dtype):
    truth = run(glu_reference, inputs(case, torch.float64), kind)
    assert_not_worse(run(glu, inputs(case, dtype), kind), run(glu_reference, inputs(case, dtype), kind), truth)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_equal_the_models_own(kind, dtype):
    name = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[kind]
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=name)).to(dtype)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    assert torch.equal(glu(gate, up, kind, impl="torch"), ACT2FN[name](gate) * up)
    assert torch.equal(mlp.down_proj(glu(gate, up, kind, impl="torch")), mlp(x))


@kinds
def test_the_product_can_be_had_again(kind):
    gate, up = (part.detach() for part in inputs({"rows": 4, "size": 17}, torch.bfloat16))
    dh = torch.randn(gate.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    before = [t.clone() for t in (dh, gate, up)]
    *gradients, h = glu_backward(dh, gate, up, kind, True)
    *others, nothing = glu_backward(dh, gate, up, kind, False)
    assert nothing is None
    assert torch.equal(h, glu_forward(gate, up, kind))
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((dh, gate, up), before, strict=True)), "an argument was written to"


def test_any_strides():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 4, 20, generator=generator, dtype=torch.float64)
    for gate, up in ((wide[..., ::2], wide[..., 1::2]), (wide.transpose(0, 2), wide.transpose(0, 2)), (wide[:, :1].expand(3, 4, 20), wide)):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = glu(gate, up)
        assert h.is_contiguous()
        torch.testing.assert_close(h, glu_reference(gate, up))
        mine, theirs = (torch.autograd.grad(product(gate, up).sum(), (gate, up)) for product in (glu, glu_reference))
        torch.testing.assert_close(mine, theirs)


def test_only_gate_and_up_are_saved():
    gate, up = inputs({"rows": 4, "size": 8}, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        glu(gate, up)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


def test_native_takes_what_it_knows(monkeypatch):
    mine = (lambda *_: None, lambda *_: None)
    monkeypatch.setattr(native, "glu_forward", mine[0], raising=False)
    monkeypatch.setattr(native, "glu_backward", mine[1], raising=False)
    for dtype in (torch.float32, torch.bfloat16):
        assert glu_kernels("native", torch.zeros(2, 4, dtype=dtype)) == mine
    for dtype in (torch.float16, torch.float64):
        assert glu_kernels("native", torch.zeros(2, 4, dtype=dtype)) == (glu_forward, glu_backward)


@pytest.mark.parametrize(
    ("gate", "up", "options", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 3), {}, "differ"),
        (torch.ones(2, 4), torch.ones(2, 4).double(), {}, "differ"),
        (torch.ones(2, 4), torch.ones(2, 4), {"kind": "relu"}, "no activation 'relu'"),
        (torch.ones(2, 4), torch.ones(2, 4), {"impl": "cobol"}, "cobol"),
    ],
)
def test_wrong_arguments_are_named(gate, up, options, message):
    with pytest.raises(ValueError, match=message):
        glu(gate, up, **options)
