"""Weights stored small go through the fast path like any other, and give what their own modules give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from burnish.config.sections import Adapter, Model
from burnish.core.errors import AdapterError, ConfigError
from burnish.kernels.nf4 import NF4Weight
from burnish.models import quantized
from burnish.models.adapters import attach, merge, projection
from burnish.models.load import load_model
from burnish.models.policy import Policy
from burnish.models.quantized import FP8Linear, store_fp8, weight_of

from .conftest import build
from .test_patch import assert_same, at_work, batch, outcome

KINDS = ["nf4", "fp8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return str(path)


def load(folder, kind, dtype=torch.float32):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return load_model(Model(path=folder, quantize=kind), compute_dtype=dtype)


def policies(folder, kind, dtype=torch.float32, **adapter):
    model = at_work(attach(load(folder, kind, dtype), Adapter(rank=4, **adapter))).train()
    return Policy(copy.deepcopy(model)), Policy(model, kernels=False)


@pytest.mark.parametrize(("kind", "adapter"), [("nf4", {}), ("nf4", {"dora": True}), ("fp8", {}), ("fp8", {"rslora": True})])
def test_patched_is_unpatched(folder, kind, adapter):
    fast, plain = policies(folder, kind, **adapter)
    slots = fast.kernels.slots
    assert {name: (slot.replaced, slot.found) for name, slot in slots.items()} == {
        "layer": (2, 2),
        "attention": (2, 2),
        "linear": (14, 14),
        "mlp": (2, 2),
        "norm": (5, 5),
    }, fast.kernels.line()
    assert_same(outcome(fast), outcome(plain), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_near_the_truth(folder, kind):
    """The truth is the same stored weights computed in fp32."""
    truth = outcome(policies(folder, kind)[1])
    off = []
    for policy in policies(folder, kind, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(policy)
        off.append({name: ((found[name] - value).norm() / value.norm()).item() for name, value in truth.items()})
    mine, plain = off
    worse = {name: (mine[name], plain[name]) for name in truth if mine[name] > 1.5 * plain[name] + 1e-2}
    assert not worse


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_base(folder, kind):
    fast, _ = policies(folder, kind)
    base = Policy(load(folder, kind), kernels=False)
    with fast.reference():
        found = fast.token_stats(batch()).logprobs
    torch.testing.assert_close(found, base.token_stats(batch()).logprobs.detach(), rtol=1e-4, atol=1e-4)


def test_nf4_magnitudes_are_unpacked_once_and_again_for_other_weights(folder):
    model = load(folder, "nf4")
    layer = model.model.layers[0].mlp.up_proj
    first = weight_of(layer)
    assert isinstance(first, NF4Weight)
    assert weight_of(layer) is first
    assert torch.equal(first.dense(torch.float32), quantized_dense(layer))
    copied = copy.deepcopy(layer)
    assert weight_of(copied) is not first
    assert torch.equal(weight_of(copied).dense(torch.float32), first.dense(torch.float32))


def quantized_dense(layer):
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def test_int8_stays_with_its_own_code():
    layer = nn.Linear(4, 4)
    layer.__class__ = type("Linear8bitLt", (nn.Linear,), {})
    assert weight_of(layer) is None
    assert projection(layer) is None


class TestFP8:
    def test_all_linear_layers_but_the_head(self):
        model = build("llama")
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        store_fp8(model)
        kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert kinds.pop("lm_head") is nn.Linear
        assert set(kinds.values()) == {FP8Linear}
        assert len(kinds) == 14
        layer = model.model.layers[0].mlp.up_proj
        off = (layer.stored().dense(torch.float32) - before).abs()
        assert (off <= before.abs() * 2**-4 + layer.scale[:, None] * 2**-10).all()
        assert 0.005 < (off.norm() / before.norm()) < 0.05  # it is a rounding, and it is there

    def test_it_computes_in_the_type_of_its_input(self):
        layer = FP8Linear(nn.Linear(8, 4))
        dense = layer.stored().dense(torch.float32)
        x = torch.randn(3, 8, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, x @ dense.t() + layer.bias)
        y.sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 8))
        assert layer(x.detach().bfloat16()).dtype is torch.bfloat16 if layer.bias is None else True
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16

    def test_half_the_bytes(self):
        plain, small = build("llama").bfloat16(), build("llama").bfloat16()
        store_fp8(small)

        def size(model):
            return sum(t.nbytes for layer in model.model.layers for t in (*layer.parameters(), *layer.buffers()))

        assert size(small) < 0.55 * size(plain)

    def test_adapters_stay_in_fp32_and_merging_is_refused(self, folder):
        model = attach(load(folder, "fp8", torch.bfloat16), Adapter(rank=4))
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
        with pytest.raises(AdapterError, match="cannot be merged into quantised weights"):
            merge(model)

    def test_it_needs_an_adapter(self, folder):
        with pytest.raises(ConfigError, match="fp8 needs an adapter"):
            load_model(Model(path=folder, quantize="fp8"), compute_dtype=torch.float32, trainable=True)


def test_a_layer_that_is_not_quantised_yet_is_not_nf4():
    layer = nn.Linear(4, 4)
    layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    assert not quantized.is_nf4(layer)
