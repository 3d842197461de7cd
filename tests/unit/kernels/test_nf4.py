"""NF4 weights are dense again exactly as bitsandbytes makes them, and train a LoRA like the dense weight."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from burnish.kernels.lora import LoraWeights, Projection, lora_stack
from burnish.kernels.matmul import DenseWeight
from burnish.kernels.nf4 import CODE, NF4Weight, dense_absmax, dequantize_nf4


@pytest.fixture(autouse=True)
def _eager():
    """bitsandbytes compiles its own torch code for odd shapes, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def quantized(*shape, dtype=torch.float32, nested=False, blocksize=64):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=blocksize)


def magnitudes(state):
    if not state.nested:
        return state.absmax
    inner = state.state2
    return dense_absmax(state.absmax, inner.code, inner.absmax, state.offset, inner.blocksize)


SHAPES = [(6, 192), (64, 64), (5, 33), (3, 7), (1, 64), (40, 500), (7, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_bitsandbytes(shape, nested, dtype):
    packed, state = quantized(*shape, dtype=dtype, nested=nested)
    expected = bnb.dequantize_4bit(packed, state)
    found = dequantize_nf4(packed, magnitudes(state), shape, dtype)
    assert torch.equal(found, expected)
    assert torch.equal(dequantize_nf4(packed, magnitudes(state), shape, dtype, code=state.code), expected)


@pytest.mark.parametrize("blocksize", [32, 128, 256])
def test_other_block_sizes(blocksize):
    packed, state = quantized(9, 200, blocksize=blocksize)
    found = dequantize_nf4(packed, state.absmax, (9, 200), torch.float32, blocksize=blocksize)
    assert torch.equal(found, bnb.dequantize_4bit(packed, state))


def test_in_pieces(monkeypatch):
    packed, state = quantized(9, 201, blocksize=32)
    whole = dequantize_nf4(packed, state.absmax, (9, 201), torch.float32, blocksize=32)
    monkeypatch.setattr("burnish.kernels.nf4._CHUNK", 96)
    assert torch.equal(dequantize_nf4(packed, state.absmax, (9, 201), torch.float32, blocksize=32), whole)


def test_the_code_is_bitsandbytes():
    assert torch.equal(torch.tensor(CODE), bnb.get_4bit_type("nf4", device="cpu"))


def test_truth_in_float64():
    packed, state = quantized(6, 64)
    found = dequantize_nf4(packed, state.absmax, (6, 64), torch.float64)
    assert torch.equal(found, bnb.dequantize_4bit(packed, state).double())


def test_into_given_memory():
    packed, state = quantized(6, 64)
    out = torch.full((6, 64), torch.nan, dtype=torch.bfloat16)
    assert dequantize_nf4(packed, state.absmax, (6, 64), torch.bfloat16, out=out) is out
    assert torch.equal(out, bnb.dequantize_4bit(packed, state).bfloat16())


def test_an_adapter_on_it_trains_as_on_the_dense_weight():
    generator = torch.Generator().manual_seed(1)
    holders, plain = [], []
    for out in (40, 24):  # one after another in the same scratch memory
        packed, state = quantized(out, 64, nested=True)
        holders.append(NF4Weight(packed, magnitudes(state), (out, 64)))
        plain.append(bnb.dequantize_4bit(packed, state))
    assert all(isinstance(holder, DenseWeight) for holder in holders)
    adapters = [
        LoraWeights(*(torch.randn(*shape, generator=generator).requires_grad_() for shape in ((4, 64), (out, 4))), 0.5, dropout, magnitude)
        for out, dropout, magnitude in ((40, 0.0, torch.rand(40, generator=generator).requires_grad_()), (24, 0.3, None))
    ]
    x = torch.randn(9, 64, generator=generator, requires_grad=True)

    def run(weights):
        torch.manual_seed(2)
        outputs = lora_stack(x, [Projection(w, None, lora) for w, lora in zip(weights, adapters, strict=True)])
        inputs = [x, *(t for lora in adapters for t in (lora.a, lora.b, lora.magnitude) if t is not None)]
        return *outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), inputs)

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(run(holders), run(plain), strict=True))


def test_what_does_not_fit_is_refused():
    packed, state = quantized(6, 64)
    with pytest.raises(ValueError, match="bytes"):
        dequantize_nf4(packed, state.absmax, (6, 66), torch.float32)
    with pytest.raises(ValueError, match="bytes"):
        dequantize_nf4(packed.int(), state.absmax, (6, 64), torch.float32)
    with pytest.raises(ValueError, match="magnitudes"):
        dequantize_nf4(packed, state.absmax[1:], (6, 64), torch.float32)
    with pytest.raises(ValueError, match="share a byte"):
        dequantize_nf4(packed, torch.ones(128), (6, 64), torch.float32, blocksize=3)
    with pytest.raises(ValueError, match="cannot write"):
        dequantize_nf4(packed, state.absmax, (6, 64), torch.float32, out=torch.empty(64, 6))
