"""Fast modules are used where they are proven, refused where they are not, and never change a number."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from burnish.config.sections import Adapter
from burnish.data.collate import collate
from burnish.data.types import Example
from burnish.models import fused, patch
from burnish.models.adapters import attach, experts_of
from burnish.models.families import FAMILIES, Norm
from burnish.models.policy import Policy

from .conftest import MORE_FAMILIES, build

ROWS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "mixtral", "qwen3-moe"]
SLOTS = {"norm", "attention", "mlp", "layer"}
MIXTURES = {"mixtral", "qwen3-moe"}
POST_NORM = {"olmo2", "olmo3"}
CHANGES = {"granite": {"residual_multiplier": 0.3}}


def adapted(model, **settings):
    """An adapter on every linear layer (in a mixture of experts, on attention), with all its weights at work."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if hasattr(model.config, "num_experts_per_tok") else "all-linear"
    return at_work(get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": targets, **settings})))


def at_work(model):
    """No B is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
    return model


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 128, (n,), generator=generator).int().numpy() for n in (9, 5, 12)]
    return collate([Example(ids, (ids % 2).astype("float32")) for ids in rows], step_weight=1.0)


def outcome(policy):
    """Log-probabilities and every gradient of their sum."""
    policy.model.zero_grad()
    logprobs = policy.token_stats(batch()).logprobs
    logprobs.sum().backward()
    return {"logprobs": logprobs.detach(), **{name: p.grad for name, p in policy.trainable().items() if p.grad is not None}}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * max(value.norm(), 1e-3 * largest), name


def policies(model, **options):
    """The same model with and without fast modules."""
    return Policy(copy.deepcopy(model), **options), Policy(model, kernels=False)


@pytest.mark.parametrize("family", ROWS)
@pytest.mark.parametrize(
    "adapter", [None, {}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}], ids=["full", "lora", "dora", "rslora"]
)
def test_patched_is_unpatched(family, adapter):
    model = build(family, **CHANGES.get(family, {}))
    assert_patched_is_unpatched(family, model if adapter is None else adapted(eager(model), **adapter))


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_so_it_is_in_the_other_families(family):
    assert_patched_is_unpatched(family, build(family))


def assert_patched_is_unpatched(family, model):
    fast, plain = policies(eager(model).double().train())
    slots = fast.kernels.slots
    expected = SLOTS - ({"layer"} if family in POST_NORM else set())
    if hasattr(model.config, "num_experts_per_tok"):
        expected = expected - {"mlp"} | {"experts"}
    assert {name for name, slot in slots.items() if slot.replaced} >= expected
    assert ("layer" in slots) == (family not in POST_NORM)
    assert not [slot.refused for slot in slots.values() if slot.refused], fast.kernels.line()
    assert_same(outcome(fast), outcome(plain), 1e-6)


def eager(model):
    """The grouped product of experts knows no fp64."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


def with_experts(family, targets="all"):
    """A mixture of experts in fp64 with this library's own adapter, on its experts too."""
    model = build(family)
    model.set_experts_implementation("eager")
    return at_work(attach(model, Adapter(targets=targets, rank=4))).double().train()


@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize(
    ("targets", "adapters"),
    [("all", [True, True]), ("mlp", [True, True]), (["gate_up_proj"], [True, False]), (["down_proj"], [False, True])],
    ids=["all", "mlp", "gate_up", "down"],
)
def test_adapted_experts_are_unpatched_experts(family, targets, adapters, monkeypatch):
    fast, plain = policies(with_experts(family, targets))
    slot = fast.kernels.slots["experts"]
    assert (slot.replaced, slot.found) == (2, 2), fast.kernels.line()
    calls = []
    right = fused.expert_mlp
    monkeypatch.setattr(fused, "expert_mlp", lambda *given: calls.append([lora is not None for lora in given[-2:]]) or right(*given))
    found = outcome(fast)
    assert calls == [adapters] * 2  # once a layer, adapters and all
    assert any(".experts." in name for name in found)
    assert_same(found, outcome(plain), 1e-6)


@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize("half", [True, False])
def test_grouped_experts_are_proven(family, half):
    """As they are trained: transformers' grouped products, adapters in fp32. The whole model is no measure: rounding changes its routes."""
    model = at_work(attach(build(family), Adapter(targets="all", rank=4)))
    slot = Policy(in_bfloat16(model) if half else model).kernels.slots["experts"]
    assert model.config._experts_implementation == "grouped_mm"
    assert (slot.replaced, slot.found) == (2, 2), slot.refused


def test_experts_are_computed_as_their_adapters_are_at_this_moment():
    """Switched off, merged, unmerged, two at once, with a hook inside."""
    both = fast, plain = policies(with_experts("qwen3-moe"))

    def logprobs(policy):
        return policy.token_stats(batch()).logprobs.detach()

    first = logprobs(plain)
    assert_same(outcome(fast), outcome(plain), 1e-6)
    with fast.reference(), plain.reference():
        torch.testing.assert_close(logprobs(fast), logprobs(plain))
        assert not torch.allclose(logprobs(fast), first, rtol=1e-3)
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(fast.model, change)()
        torch.testing.assert_close(logprobs(fast), first)
    assert_same(outcome(fast), outcome(plain), 1e-6)
    for policy in both:
        torch.manual_seed(0)
        second = copy.deepcopy(policy.model.peft_config["default"])
        second.init_lora_weights = False
        policy.model.add_adapter("other", second)
        policy.model.double().base_model.set_adapter(["default", "other"])
    assert_same(outcome(fast), outcome(plain), 1e-6)
    assert not torch.allclose(logprobs(fast), first, rtol=1e-3)
    seen = []
    inner = fast.model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    inner.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    for policy in both:
        policy.model.base_model.set_adapter("default")
    assert_same(outcome(fast), outcome(plain), 1e-6)
    assert seen == [(26, 64)]


def test_other_layouts_of_experts_are_left_alone():
    module = build("mixtral").model.layers[0].mlp.experts
    assert experts_of(module) is not None
    for name, value in [("is_transposed", True), ("is_concatenated", False), ("has_bias", True), ("_is_expert_parallel", True)]:
        changed = copy.deepcopy(module)
        setattr(changed, name, value)
        assert experts_of(changed) is None, name
    clamped = copy.deepcopy(module)
    clamped.__class__ = type("Clamped", (type(module),), {"_apply_gate": lambda self, x: x.chunk(2, dim=-1)[0]})
    assert experts_of(clamped) is None
    quantized = copy.deepcopy(module)
    quantized.down_proj = torch.nn.Parameter(module.down_proj.to(torch.int8), requires_grad=False)
    assert experts_of(quantized) is None
    assert experts_of(torch.nn.Linear(2, 2)) is None


def test_the_report_is_one_line():
    fast, plain = policies(build("llama"))
    assert fast.kernels.line() == "kernels: fast, each proven against the model's own: layer 2/2, attention 2/2, mlp 2/2, norm 5/5"
    assert plain.kernels.line() == "kernels: the model's own (switched off)"
    other = Policy(build("gpt2"))
    assert other.kernels.line() == "kernels: the model's own (no fast modules for gpt2)"


def test_a_wrong_row_costs_speed_only(monkeypatch):
    """As if a release of transformers had changed what Llama's norm does."""
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], norm=Norm(1.0, late=True)))
    fast, plain = policies(build("llama"))
    norm = fast.kernels.slots["norm"]
    assert (norm.found, norm.replaced) == (5, 0)
    assert "its output is off by" in next(iter(norm.refused))
    assert fast.kernels.slots["layer"].replaced == 0
    assert fast.kernels.slots["mlp"].replaced == 2
    assert_same(outcome(fast), outcome(plain), 1e-5)


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        (lambda out, x: out * 1.001, "its output is off by"),
        (lambda out, x: out.detach() + 0 * x, "it has another set of gradients: gradient of down_proj.weight"),
        (lambda out, x: out + (x - x.detach()), "its input gradient is off by"),
        (lambda out, x: out * float("nan"), "its output is off by nan"),
        (lambda out, x: out[:, :1], "its output has shape [1, 1, 64], expected [1, 12, 64]"),
        (lambda out, x: out @ x, "RuntimeError: "),
    ],
    ids=["values", "cut off", "gradient", "nan", "shape", "error"],
)
def test_a_wrong_replacement_is_refused(monkeypatch, breakage, reason):
    right = fused.mlp_forward
    monkeypatch.setattr(fused, "mlp_forward", lambda gated, module, x: breakage(right(gated, module, x), x))
    fast, plain = policies(build("llama"))
    refused = fast.kernels.slots["mlp"].refused
    assert len(refused) == 1
    assert next(iter(refused)).startswith(reason)
    assert reason in fast.kernels.line()
    assert_same(outcome(fast), outcome(plain), 1e-5)


def test_a_replacement_that_loses_an_adapter_is_refused(monkeypatch):
    def without_adapter(module, x):
        return module.base_layer(x)

    monkeypatch.setattr(fused, "linear_forward", without_adapter)
    fast, _ = policies(adapted(build("llama")))
    assert fast.kernels.slots["linear"].replaced == 0
    assert "gradients: gradient of lora_A" in next(iter(fast.kernels.slots["linear"].refused))


def test_a_fresh_adapter_is_proven_with_its_b_at_work(monkeypatch):
    """B begins as zero, behind which a lost adapter could hide."""
    monkeypatch.setattr(fused, "linear_forward", lambda module, x: module.base_layer(x) + 0 * module.lora_B["default"].weight.sum())
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))
    assert Policy(model).kernels.slots["linear"].replaced == 0


def test_what_does_not_agree_together_is_taken_back(monkeypatch):
    monkeypatch.setattr(patch, "_verdict", lambda place, call: "")
    monkeypatch.setattr(fused, "mlp_forward", lambda gated, module, x: -x)
    fast, plain = policies(build("llama"))
    assert fast.kernels.reason.startswith("together they are off by")
    assert not fast.kernels.slots
    assert torch.equal(outcome(fast)["logprobs"], outcome(plain)["logprobs"])


def test_only_instances_are_touched():
    model, other = build("llama"), build("llama")
    kind = type(model.model.layers[0].mlp)
    before = kind.forward
    Policy(model)
    assert kind.forward is before
    assert "forward" in vars(model.model.layers[0].mlp)
    assert all("forward" not in vars(module) for module in other.modules())


def test_a_copy_computes_with_its_own_weights():
    policy = Policy(build("llama"))
    copied = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    ids = torch.arange(3, 9)[None]
    assert copied(ids).logits.abs().max() > 0
    assert policy.model(ids).logits.abs().max() == 0


def test_somebody_elses_forward_is_left_alone():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    theirs = mlp.forward
    mlp.forward = lambda x: theirs(x) * 2
    policy = Policy(model)
    assert policy.kernels.slots["mlp"].found == 1
    assert mlp.forward is not theirs


def test_hooks_on_a_projection_still_run():
    model = adapted(build("llama"))
    policy = Policy(model)
    seen = []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    outcome(policy)
    assert seen == [(1, 26, 64)]


def test_an_adapter_switched_off_is_the_base():
    base = Policy(build("llama"), kernels=False)
    policy = Policy(adapted(build("llama")))
    with policy.reference():
        found = policy.token_stats(batch()).logprobs
    torch.testing.assert_close(found, base.token_stats(batch()).logprobs.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(policy.token_stats(batch()).logprobs, found, rtol=1e-3)


def test_a_merged_adapter_is_still_right():
    policy = Policy(adapted(build("llama")))
    expected = policy.token_stats(batch()).logprobs.detach()
    policy.model.merge_adapter()
    torch.testing.assert_close(policy.token_stats(batch()).logprobs.detach(), expected, rtol=1e-4, atol=1e-4)
    policy.model.unmerge_adapter()
    torch.testing.assert_close(policy.token_stats(batch()).logprobs.detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_second_adapter_goes_to_the_models_own_code():
    fast, plain = policies(adapted(build("llama")))
    for policy in (fast, plain):
        torch.manual_seed(0)
        policy.model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        policy.model.base_model.set_adapter(["default", "other"])
    assert_same(outcome(fast), outcome(plain), 1e-4)


def test_dropout_acts_in_training_only():
    policy = Policy(adapted(build("llama"), lora_dropout=0.5)).train()
    assert policy.kernels.slots["attention"].replaced == 2
    first, second = outcome(policy)["logprobs"], outcome(policy)["logprobs"]
    assert not torch.allclose(first, second)
    policy.eval()
    assert torch.equal(outcome(policy)["logprobs"], outcome(policy)["logprobs"])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_decoding_gives_the_same_tokens(family):
    fast, plain = policies(build(family))
    ids = torch.tensor([[5, 9, 33, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert fast.model.generate(ids, **options).tolist() == plain.model.generate(ids, **options).tolist()


def in_bfloat16(model):
    """All but the adapters."""
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def test_half_precision_is_as_near_the_truth(family="llama"):
    """Against the same weights in double precision, patched bfloat16 is not further off than the plain model."""
    model = adapted(build(family))
    truth = outcome(Policy(copy.deepcopy(model).double(), kernels=False))
    half = in_bfloat16(copy.deepcopy(model))
    off = {}
    for kernels in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(Policy(copy.deepcopy(half), kernels=kernels))
        off[kernels] = {name: ((found[name].double() - value).norm() / value.norm()).item() for name, value in truth.items()}
    worse = {name: (off[True][name], off[False][name]) for name in truth if off[True][name] > 1.5 * off[False][name] + 5e-3}
    assert not worse
