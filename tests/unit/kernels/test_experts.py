"""The feed-forward of a mixture of experts as one node, against plain torch, transformers and PEFT."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from burnish.kernels import experts
from burnish.kernels.experts import CASES, ExpertLora, combine, expert_mlp, expert_mlp_reference, route
from burnish.kernels.glu import KINDS

NAMES = ("x", "weights", "gate_up", "down", "a", "b", "c", "d")


def problem(tokens, experts, top, hidden, inner, rank, *, idle=0, routing="free", strided=False, dtype=torch.float64, seed=0):
    """The tensors of one case by name, and the choices [T, k]."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape, scale=1.0):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        if strided:  # the same numbers, last dimension first in memory
            made = made.movedim(-1, 0).contiguous().movedim(0, -1)
        return made.to(dtype)

    index = torch.zeros(tokens, top, dtype=torch.long)
    if routing == "free" and tokens:
        index = torch.rand(tokens, experts - idle, generator=generator).topk(top, dim=-1).indices
    tensors = {
        "x": tensor(tokens, hidden),
        "weights": tensor(tokens, top).softmax(dim=-1),
        "gate_up": tensor(experts, 2 * inner, hidden, scale=hidden**-0.5),
        "down": tensor(experts, hidden, inner, scale=inner**-0.5),
        "a": tensor(experts, rank, hidden, scale=hidden**-0.5),
        "b": tensor(experts, 2 * inner, rank, scale=0.5),
        "c": tensor(experts, rank, inner, scale=inner**-0.5),
        "d": tensor(experts, hidden, rank, scale=0.5),
    }
    return tensors, index


def narrowed(tensors, dtype):
    """All but the adapters, which are single precision whatever the model is."""
    return {name: t.to(torch.float32 if name in "abcd" else dtype) for name, t in tensors.items()}


def outcome(function, tensors, index, *, train=NAMES, kind="silu", adapters=(True, True), **options):
    """Output and every gradient by name, for one fixed direction."""
    given = {name: t.detach().requires_grad_(name in train) for name, t in tensors.items()}
    loras = ExpertLora(given["a"], given["b"], 0.6), ExpertLora(given["c"], given["d"], 1.5)
    chosen = [lora if used else None for lora, used in zip(loras, adapters, strict=True)]
    out = function(given["x"], index, given["weights"], given["gate_up"], given["down"], kind, *chosen, **options)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [name for name in train if (name not in "ab" or adapters[0]) and (name not in "cd" or adapters[1])]
    return {
        "out": out.detach(),
        **dict(zip(wanted, torch.autograd.grad((out.double() * direction).sum(), [given[n] for n in wanted]), strict=True)),
    }


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


def assert_no_worse(found, plain, truth):
    """Never further from the truth than plain torch in the same type, but for what two samples of so many roundings differ by."""
    for name, right in truth.items():
        own, allowed = (found[name].double() - right).norm(), (plain[name].double() - right).norm()
        assert found[name].dtype is plain[name].dtype
        assert own <= (1.05 + right.numel() ** -0.5) * allowed + 1e-6 * right.norm(), (name, own / right.norm(), allowed / right.norm())


@pytest.fixture
def grouped(monkeypatch):
    """The grouped products of a GPU, which a CPU computes too."""
    monkeypatch.setattr(experts, "takes_grouped_mm", lambda x, dtype, sizes: x.shape[0] > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_equals_plain_torch(case, kind):
    tensors, index = problem(**case)
    assert_same(outcome(expert_mlp, tensors, index, kind=kind), outcome(expert_mlp_reference, tensors, index, kind=kind))


@pytest.mark.parametrize("adapters", list(product([True, False], repeat=2)))
@pytest.mark.parametrize("train", [NAMES, *((name,) for name in NAMES), ("x", "weights"), ("a", "b", "c", "d"), ("x", "b", "c")])
def test_whatever_is_trained(train, adapters):
    tensors, index = problem(**CASES[0][1])
    if any((name not in "ab" or adapters[0]) and (name not in "cd" or adapters[1]) for name in train):
        options = {"train": train, "adapters": adapters}
        assert_same(outcome(expert_mlp, tensors, index, **options), outcome(expert_mlp_reference, tensors, index, **options))


@pytest.mark.parametrize(("kind", "top"), [("silu", 1), ("gelu", 2), ("gelu_tanh", 3)])
def test_gradcheck(kind, top):
    tensors, index = problem(3, 4, top, 3, 2, 2)
    inputs = [tensors[name].requires_grad_() for name in NAMES]

    def function(x, weights, gate_up, down, a, b, c, d):
        return expert_mlp(x, index, weights, gate_up, down, kind, ExpertLora(a, b, 0.6), ExpertLora(c, d, 1.5))

    def plain(x, weights, gate_up, down, a, b, c, d):
        return expert_mlp_reference(x, index, weights, gate_up, down, kind, ExpertLora(a, b, 0.6), ExpertLora(c, d, 1.5))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(plain, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [0, 3, 4])
def test_narrow_types_are_as_near_the_truth(case, dtype):
    wide, index = problem(**{**CASES[case][1], "tokens": 211, "hidden": 40, "inner": 24})
    tensors = narrowed(wide, dtype)
    truth = outcome(expert_mlp_reference, {name: t.double() for name, t in tensors.items()}, index)
    assert_no_worse(outcome(expert_mlp, tensors, index), outcome(expert_mlp_reference, tensors, index), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 3])
def test_grouped_products(grouped, rank, dtype):
    """Idle experts, strided weights and a rank that has to be filled up among them."""
    wide, index = problem(80, 16, 2, 24, 16, rank, idle=5, strided=True)
    tensors = narrowed(wide, dtype)
    truth = outcome(expert_mlp_reference, {name: t.double() for name, t in tensors.items()}, index)
    found = outcome(expert_mlp, tensors, index)
    assert_no_worse(found, outcome(expert_mlp_reference, tensors, index), truth)
    idle = [e for e in range(16) if e not in index]
    assert len(idle) == 5
    assert all(not found[name][idle].any() for name in NAMES[2:])


def test_grouped_products_in_every_case(grouped):
    for name, case in CASES:
        if case["hidden"] % 8 == 0:
            tensors, index = problem(**case, dtype=torch.float32)
            found, expected = outcome(expert_mlp, tensors, index), outcome(expert_mlp_reference, tensors, index)
            assert name
            assert_same(found, expected, rtol=2e-5, atol=2e-5)


def test_autocast():
    """Activations and adapters in fp32, weights in bf16, products in bf16, as adapters are trained."""
    wide, index = problem(**{**CASES[0][1], "tokens": 211})
    tensors = {name: t.to(torch.bfloat16 if name in ("gate_up", "down") else torch.float32) for name, t in wide.items()}
    truth = outcome(expert_mlp_reference, {name: t.double() for name, t in tensors.items()}, index)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(expert_mlp, tensors, index)
    half = {name: t.bfloat16() for name, t in tensors.items()}
    plain = {name: value.to(found[name].dtype) for name, value in outcome(expert_mlp_reference, half, index).items()}
    assert found["out"].dtype is torch.float32
    assert_no_worse(found, plain, truth)


def test_same_bits_every_time():
    tensors, index = problem(**{**CASES[0][1], "tokens": 40}, dtype=torch.bfloat16)
    first, second = outcome(expert_mlp, tensors, index), outcome(expert_mlp, tensors, index)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputed_in_the_backward_pass():
    tensors, index = problem(**CASES[0][1])
    again = outcome(lambda *given: checkpoint(expert_mlp, *given, use_reentrant=False), tensors, index)
    assert all(torch.equal(value, again[name]) for name, value in outcome(expert_mlp, tensors, index).items())


@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_route(integer):
    index = torch.tensor([[3, 0], [1, 3], [0, 1], [3, 1]], dtype=integer)
    way = route(index, 5, grouped=False)
    assert index.reshape(-1)[way.order].tolist() == [0, 0, 1, 1, 1, 3, 3, 3]
    assert way.token.tolist() == [0, 2, 1, 2, 3, 0, 1, 3]
    assert way.order[way.place].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert way.offs.tolist() == [2, 5, 5, 8, 8]
    assert way.groups == [(0, 0, 2), (1, 2, 5), (3, 5, 8)]


def test_combine_sums_in_single_precision():
    """Sixteen ones beside 256 are lost where a sum is in bfloat16."""
    rows, place = torch.tensor([[256.0]] + [[1.0]] * 16, dtype=torch.bfloat16), torch.arange(17)[None]
    assert combine(rows, place, None, torch.bfloat16).item() == 272
    assert combine(rows, place, torch.full((1, 17), 0.5), torch.bfloat16).item() == 136


def test_one_copy_of_the_inputs_is_kept():
    tensors, index = problem(50, 4, 4, 32, 8, 2, dtype=torch.float32)
    for t in tensors.values():
        t.requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    loras = ExpertLora(tensors["a"], tensors["b"], 1.0), ExpertLora(tensors["c"], tensors["d"], 1.0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        expert_mlp(tensors["x"], index, tensors["weights"], tensors["gate_up"], tensors["down"], "silu", *loras)
    pairs, gate_and_up, ranks, order_and_place = 200, 16, 4, 2
    assert 0 < sum(kept.values()) <= pairs * (gate_and_up + ranks + order_and_place) + 4


def test_nothing_is_differentiable_where_nothing_is_trained():
    tensors, index = problem(**CASES[0][1])
    assert not expert_mlp(tensors["x"], index, tensors["weights"], tensors["gate_up"], tensors["down"], "silu").requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (7, 16)}, r"x is \[7, 16\], expected \[24, 16\]"),
        ({"x": (24, 4, 4)}, "expected x"),
        ({"weights": (24, 3)}, r"weights is \[24, 3\], expected \[24, 2\]"),
        ({"gate_up": (4, 47, 16)}, r"gate_up is \[4, 47, 16\], expected \[4, 46, 16\]"),
        ({"down": (4, 24, 16)}, r"down is \[4, 24, 16\], expected \[4, 16, 24\]"),
        ({"a": (4, 8, 15)}, r"lora_gate_up.a is \[4, 8, 15\], expected \[4, 8, 16\]"),
        ({"d": (4, 16, 7)}, r"lora_down.b is \[4, 16, 7\], expected \[4, 16, 8\]"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    tensors, index = problem(**CASES[0][1])
    tensors |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        outcome(expert_mlp, tensors, index)


def test_wrong_choices_and_names_are_refused():
    tensors, index = problem(**CASES[0][1])
    with pytest.raises(ValueError, match="index runs from 0 to 4, but there are 4 experts"):
        outcome(expert_mlp, tensors, index.clone().fill_(4).index_fill(0, torch.tensor([0]), 0))
    with pytest.raises(ValueError, match="no activation 'relu'"):
        outcome(expert_mlp, tensors, index, kind="relu")
    with pytest.raises(ValueError, match="no 'cuda' implementation"):
        outcome(expert_mlp, tensors, index, impl="cuda")


SIZES = {"hidden_size": 24, "num_experts_per_tok": 2, "hidden_act": "silu"}
FAMILIES = {
    "qwen3-moe": (Qwen3MoeExperts, lambda: Qwen3MoeConfig(num_experts=6, moe_intermediate_size=16, **SIZES)),
    "mixtral": (MixtralExperts, lambda: MixtralConfig(num_local_experts=6, intermediate_size=16, **SIZES)),
}


def transformers_module(family, implementation, *, adapted=True):
    """Their experts with PEFT's adapters of rank 3, all at work, in fp64 where their implementation knows it."""
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    settings = config()
    settings._experts_implementation = implementation
    holder = nn.ModuleDict({"experts": kind(settings)})
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.3)
    if adapted:
        names = ["experts.gate_up_proj", "experts.down_proj"]
        holder = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=names), holder)
        for name, parameter in holder.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return holder["experts"].double() if implementation == "eager" else holder["experts"]


def layers(module):
    """{parameter name: PEFT's wrapper} and the experts inside."""
    found = {}
    while hasattr(module, "base_layer"):
        found[module.parameter_name], module = module, module.base_layer
    return found, module


def adapter(wrapper):
    """PEFT's flat adapter weights, expert by expert."""
    if wrapper is None:
        return None
    a, b, count = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, wrapper.num_experts
    stacked = torch.stack([b[:, e::count] for e in range(count)])
    return ExpertLora(a.reshape(count, -1, a.shape[1]), stacked, wrapper.scaling["default"])


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_and_peft(family, implementation, adapted):
    module = transformers_module(family, implementation, adapted=adapted)
    wrappers, base = layers(module)
    generator = torch.Generator().manual_seed(2)
    dtype = base.down_proj.dtype
    x = torch.randn(19, 24, generator=generator).to(dtype).requires_grad_()
    logits = torch.randn(19, 6, generator=generator).to(dtype).requires_grad_()
    weights, index = logits.softmax(dim=-1).topk(2, dim=-1)

    def ours():
        loras = [adapter(wrappers.get(name)) for name in ("gate_up_proj", "down_proj")]
        return expert_mlp(x, index, weights, base.gate_up_proj, base.down_proj, "silu", *loras)

    def gradients(out):
        module.zero_grad()
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        inputs = {"x": x, "logits": logits, **named}
        return {
            "out": out,
            **dict(zip(inputs, torch.autograd.grad((out * direction).sum(), inputs.values(), retain_graph=True), strict=True)),
        }

    found, expected = gradients(ours()), gradients(module(x, index, weights))
    assert len(found) == (7 if adapted else 5)
    assert_same(found, expected, **({} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}))
