"""The gated MLP with adapters as one node, against plain torch and against PEFT around transformers' MLP."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from burnish.kernels.lora import LoraWeights, Projection
from burnish.kernels.lora_mlp import lora_mlp, lora_mlp_reference

KINDS = ["silu", "gelu_tanh", "gelu"]
ADAPTERS = [{}, {"dropout": 0.4}, {"dora": True}, {"dora": True, "dropout": 0.3}]


def projection(out, inputs, generator, *, dora=False, dropout=0.0, adapter=True, train=("a", "b", "magnitude"), dtype=torch.float64):
    def tensor(name, *shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(name in train)

    weight, bias, a, b, magnitude = (
        tensor("weight", out, inputs),
        tensor("bias", out),
        tensor("a", 2, inputs),
        tensor("b", out, 2),
        tensor("magnitude", out),
    )
    return Projection(weight, bias, LoraWeights(a, b, 0.6, dropout, magnitude if dora else None) if adapter else None)


def mlp(adapters=(True, True, True), **options):
    generator = torch.Generator().manual_seed(1)
    shapes = ((6, 4), (6, 4), (5, 6))
    return [projection(*shape, generator, adapter=adapter, **options) for shape, adapter in zip(shapes, adapters, strict=True)]


def tensors(projections):
    parts = [t for p in projections for t in (p.weight, p.bias, *((p.lora.a, p.lora.b, p.lora.magnitude) if p.lora else ()))]
    return [t for t in parts if t is not None and t.requires_grad]


def gradients(function, x, projections, *options):
    torch.manual_seed(2)
    y = function(x, *projections, *options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = [x, *tensors(projections)] if x.requires_grad else tensors(projections)
    return y, *torch.autograd.grad((y.double() * weights).sum(), inputs)


def assert_same(x, projections, kind):
    for mine, theirs in zip(gradients(lora_mlp, x, projections, kind), gradients(lora_mlp_reference, x, projections, kind), strict=True):
        torch.testing.assert_close(mine, theirs)


def rows(t=7, train=True):
    return torch.randn(t, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=train)


@pytest.mark.parametrize(("kind", "options", "x_trained"), product(KINDS, ADAPTERS, [True, False]))
def test_equals_plain_torch(kind, options, x_trained):
    assert_same(rows(train=x_trained), mlp(**options), kind)


@pytest.mark.parametrize("train", [("weight", "bias", "a", "b"), ("b",), ("a",), ("bias",)])
@pytest.mark.parametrize("t", [0, 1, 7])
def test_whatever_is_trained(train, t):
    assert_same(rows(t), mlp(train=train), "silu")


@pytest.mark.parametrize("adapters", [(False, False, True), (True, False, False), (False, True, True), (False, False, False)])
@pytest.mark.parametrize("x_trained", [True, False])
def test_a_projection_may_lack_an_adapter(adapters, x_trained):
    if any(adapters) or x_trained:
        assert_same(rows(train=x_trained), mlp(adapters), "gelu_tanh")
    else:
        assert not lora_mlp(rows(train=False), *mlp(adapters), "silu").requires_grad


@pytest.mark.parametrize("options", ADAPTERS[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, options):
    projections = mlp(train=("weight", "bias", "a", "b"), **options)

    def function(x, *_):
        torch.manual_seed(0)
        return lora_mlp(x, *projections, kind)

    assert torch.autograd.gradcheck(function, [rows(2), *tensors(projections)])


def test_recomputed_in_the_backward_pass():
    x, projections = rows(), mlp(dropout=0.5)
    plain = gradients(lora_mlp, x, projections, "silu")
    again = gradients(lambda *given: checkpoint(lora_mlp, *given, use_reentrant=False), x, projections, "silu")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, plain, strict=True))


def test_the_product_is_not_kept():
    x, projections = rows(50), mlp()
    given = {t.untyped_storage().data_ptr() for t in [x, *(p.weight for p in projections)]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_mlp(x, *projections, "silu")
    ranks, intermediate = 2, 6
    adapters = sum(t.numel() for t in tensors(projections))
    assert 0 < sum(kept.values()) <= 50 * (2 * intermediate + 3 * ranks) + adapters


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_equals_peft_around_transformers(precision):
    torch.manual_seed(0)
    module = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4, hidden_act="silu"))
    module = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if precision == "fp64":
        module = module.double()
    elif precision == "bf16":
        for layer in (module.gate_proj, module.up_proj, module.down_proj):
            layer.base_layer.to(dtype)
    layers = [
        (m.base_layer.weight, m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"])
        for m in (module.gate_proj, module.up_proj, module.down_proj)
    ]
    projections = [Projection(w, None, LoraWeights(a, b, scaling)) for w, a, b, scaling in layers]
    x = torch.randn(129, 24, dtype=torch.float64).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ours = gradients(lora_mlp, x, projections, "silu")
        plain = gradients(lambda x, *_: module(x), x, projections, "silu")
    if precision != "bf16":
        for mine, theirs in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, theirs)
        return
    doubled = [
        Projection(w.double(), None, LoraWeights(a.detach().double().requires_grad_(), b.detach().double().requires_grad_(), scaling))
        for w, a, b, scaling in layers
    ]
    truth = gradients(lora_mlp_reference, x.detach().double().requires_grad_(), doubled, "silu")
    for mine, theirs, right in zip(ours, plain, truth, strict=True):
        assert mine.dtype is theirs.dtype
        assert (mine - right).norm() <= 1.05 * (theirs - right).norm()


def test_wrong_shapes_are_refused():
    gate, up, down = mlp()
    with pytest.raises(ValueError, match="gate is"):
        lora_mlp(rows(), gate, Projection(torch.zeros(7, 4, dtype=torch.float64)), down, "silu")
    with pytest.raises(ValueError, match="x is 6, expected 4"):
        lora_mlp(rows(), gate, up, gate, "silu")
