"""The adapter's skinny products in Triton, under its interpreter, against their twin in torch."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels.gpu.lora import adapter_products
from burnish.kernels.lora import LoraWeights, Projection, adapter_products_reference, lora_stack


def operands(tokens, outputs, rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + outputs)
    return (torch.randn(*shape, generator=generator).to(dtype) for shape in ((tokens, outputs), (outputs, rank), (tokens, rank)))


def assert_close(found, operands):
    """Not farther from float64 than the twin is."""
    dz, b, xa = operands
    truth = adapter_products_reference(dz.double(), b.double(), xa.double())
    plain = adapter_products_reference(dz, b, xa)
    for mine, theirs, right in zip(found, plain, truth, strict=True):
        assert mine.shape == right.shape
        assert mine.dtype is theirs.dtype
        if right.numel():
            slack = 4 * torch.finfo(torch.float32).eps * right.abs().max()
            assert (mine - right).abs().max() <= 1.05 * (theirs - right).abs().max() + slack


@pytest.mark.parametrize(
    ("tokens", "outputs", "rank"), [(1, 1, 1), (70, 130, 16), (200, 96, 5), (64, 128, 48), (130, 257, 17), (0, 7, 3), (3, 300, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_twin(tokens, outputs, rank, dtype):
    dz, b, xa = operands(tokens, outputs, rank, dtype)
    assert_close(adapter_products(dz, b, xa), (dz, b, xa))


def test_strides():
    dz, b, xa = operands(70, 130, 8)
    strided = dz.t().contiguous().t(), torch.cat([b, b], dim=1)[:, 8:], torch.cat([xa, xa], dim=1)[:, :8]
    assert_close(adapter_products(*strided), (dz, b, xa))
    assert_close(adapter_products(dz[::2, 1:100], b[1:100], xa[::2]), (dz[::2, 1:100], b[1:100], xa[::2]))


def test_bf16_runs():
    # The interpreter cuts bf16 results off instead of rounding them, so only their size is checked here.
    dz, b, xa = operands(70, 130, 16, torch.bfloat16)
    for found, plain in zip(adapter_products(dz, b, xa), adapter_products_reference(dz.float(), b.float(), xa.float()), strict=True):
        assert (found - plain).norm() <= 2**-8 * plain.norm()


def test_the_node_uses_it():
    x = torch.randn(70, 20, requires_grad=True)
    lora = LoraWeights(torch.randn(4, 20, requires_grad=True), torch.randn(33, 4, requires_grad=True), 0.5)
    found = [Projection(torch.randn(33, 20), None, lora), Projection(torch.randn(9, 20))]
    inputs = [x, lora.a, lora.b]
    ours, plain = (torch.autograd.grad(sum(y.sin().sum() for y in lora_stack(x, found, impl=impl)), inputs) for impl in ("triton", "torch"))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
