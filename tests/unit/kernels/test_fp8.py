"""FP8 weights: how far they may be from the weight they were made of, and that an adapter trains on exactly what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.kernels.fp8 import LARGEST, FP8Weight, quantize_fp8
from burnish.kernels.lora import LoraWeights, Projection, lora_stack
from burnish.kernels.matmul import DenseWeight


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 70), exponent=st.integers(-30, 30), seed=st.integers(0, 99))
def test_the_error_is_within_its_bound(out, width, exponent, seed):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    stored, scale = quantize_fp8(weight)
    found = stored.double() * scale[:, None].double()
    error, exact = (found - weight.double()).abs(), weight.double().abs()
    normal = exact >= 2.0**-6 * scale[:, None]
    slack = 1 + 2.0**-20  # the division by the scale rounds too, in fp32
    assert (error[normal] <= 2.0**-4 * exact[normal] * slack).all()
    assert (error <= torch.maximum(2.0**-4 * exact, 2.0**-10 * scale[:, None].double()) * slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_what_is_stored_rounded_once(dtype):
    weight = FP8Weight.of(torch.randn(70, 33))
    expected = (weight.stored.double() * weight.scale[:, None].double()).to(torch.float32).to(dtype)
    assert torch.equal(weight.dense(dtype), expected)
    out = torch.full((70, 33), torch.nan, dtype=dtype)
    assert weight.dense(dtype, out=out) is out
    assert torch.equal(out, expected)


def test_in_pieces(monkeypatch):
    weight = FP8Weight.of(torch.randn(7, 33))
    whole = weight.dense(torch.float32)
    monkeypatch.setattr("burnish.kernels.fp8._CHUNK", 70)
    assert torch.equal(weight.dense(torch.float32), whole)


def test_what_can_be_stored_comes_back():
    exact = torch.tensor([[LARGEST, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-896.0, 2.0, 1.0, 0.25]])
    weight = FP8Weight.of(exact)
    assert torch.equal(weight.dense(torch.float32), exact)
    assert weight.stored.element_size() == 1
    assert weight.scale.tolist() == [1.0, 1.0, 2.0]


def test_the_largest_of_every_row_is_exact_and_never_nan():
    weight = torch.randn(2000, 3) * torch.logspace(-20, 20, 2000)[:, None]
    dense = FP8Weight.of(weight).dense(torch.float64)
    largest = weight.abs().amax(dim=1).double()
    assert torch.isfinite(dense).all()
    torch.testing.assert_close(dense.abs().amax(dim=1), largest, rtol=1e-6, atol=0)


def test_an_adapter_on_it_trains_as_on_its_dense_weight():
    weight = FP8Weight.of(torch.randn(24, 40))
    assert isinstance(weight, DenseWeight)
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((9, 40), (4, 40), (24, 4)))
    lora = LoraWeights(a, b, 0.5)

    def run(w):
        y = lora_stack(x, [Projection(w, None, lora)])[0]
        return y, *torch.autograd.grad(y.sin().sum(), [x, a, b])

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(run(weight), run(weight.dense(torch.float32)), strict=True))


def test_every_number_of_the_format():
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = every[~every.float().isnan()].view(-1, 2)
    assert finite.numel() == 254
    weight = FP8Weight(finite, torch.ones(127))
    assert torch.equal(weight.dense(torch.float32), finite.float())
    assert torch.equal(weight.dense(torch.float32).signbit(), finite.float().signbit())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        quantize_fp8(torch.zeros(3))
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="finite"):
            quantize_fp8(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="NaN"):
        FP8Weight(torch.tensor([[1.0, torch.nan]]).to(torch.float8_e4m3fn), torch.ones(1))
    with pytest.raises(ValueError, match="scale"):
        FP8Weight(torch.zeros(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="scale"):
        FP8Weight(torch.zeros(3, 4).to(torch.float8_e4m3fn), torch.ones(4))
