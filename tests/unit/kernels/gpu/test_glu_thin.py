"""The gated MLP whose thin products are added in registers, under Triton's interpreter: the same numbers, no further from the truth."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels import lora_mlp as node
from burnish.kernels.gpu import glu_thin
from burnish.kernels.lora import LoraWeights, Projection
from burnish.kernels.lora_mlp import lora_mlp, lora_mlp_reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def problem(tokens=37, inputs=20, inner=150, rank=5, dtype=torch.float32, train="xab", dropout=0.0, seed=0):
    """(x, gate, up, down); adapters in fp32 as in training."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(name, *shape, scale=1.0, kind=dtype):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        # Numbers that every type holds, so that all start from the same ones.
        return made.bfloat16().to(kind).requires_grad_(name in train)

    def projection(out, width, ranks):
        wide = dtype if dtype is torch.float64 else torch.float32
        lora = LoraWeights(
            tensor("a", ranks, width, scale=width**-0.5, kind=wide), tensor("b", out, ranks, scale=0.7, kind=wide), 0.5, dropout, None
        )
        return Projection(tensor("w", out, width, scale=width**-0.5), None, lora)

    return (
        tensor("x", tokens, inputs),
        projection(inner, inputs, rank),
        projection(inner, inputs, rank + 3),
        projection(inputs, inner, rank),
    )


def run(function, parts, kind="silu", **options):
    x, *projections = parts
    y = function(x, *projections, kind, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    leaves = [x, *(t for p in projections for t in (p.weight, p.lora.a, p.lora.b))]
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], upstream)]


@pytest.fixture
def folded(monkeypatch):
    """Counts the calls of the kernels' functions."""
    calls = []
    for name in ("thin_forward", "thin_backward"):
        real = getattr(glu_thin, name)
        monkeypatch.setattr(glu_thin, name, lambda *given, real=real, name=name: calls.append(name) or real(*given))
    return calls


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("options", [{}, {"tokens": 1, "inner": 130, "rank": 1}, {"tokens": 33, "inner": 16, "rank": 17}, {"tokens": 0}])
def test_equals_plain_torch(kind, options, folded):
    found, truth = run(lora_mlp, problem(**options), kind, impl="triton"), run(lora_mlp_reference, problem(**options), kind)
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)
    assert folded == ["thin_forward", "thin_backward"]


@pytest.mark.parametrize("train", ["x", "ab", "b", "a", "xabw"])
def test_whatever_is_trained(train):
    found, truth = run(lora_mlp, problem(train=train), impl="triton"), run(lora_mlp_reference, problem(train=train))
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_error_is_not_above_the_plain_one():
    options = {"tokens": 64, "inputs": 48, "inner": 256, "rank": 16}
    truth = run(lora_mlp_reference, problem(dtype=torch.float64, **options))
    found, plain = (
        run(f, problem(dtype=torch.float16, **options), **o) for f, o in ((lora_mlp, {"impl": "triton"}), (lora_mlp_reference, {}))
    )
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        error, allowed = (torch.linalg.vector_norm(t.double() - true) for t in (mine, theirs))
        assert error <= 1.05 * allowed


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"rank": node.LARGEST_THIN_RANK}])
def test_what_it_does_not_know_goes_the_long_way(options, folded):
    torch.manual_seed(5)
    found = run(lora_mlp, problem(**options), impl="triton")
    torch.manual_seed(5)
    for mine, theirs in zip(found, run(lora_mlp, problem(**options), impl="torch"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert folded == []
