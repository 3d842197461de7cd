"""Ranks that share the weights of every layer are one: loss and every gradient, whole models of every family, in float64.

The ranks are threads with a copy of the model each; `test_sharded.py` has whole runs of real processes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from burnish.config.objectives import DPO, KTO, Distill
from burnish.core.errors import ConfigError
from burnish.data.collate import collate
from burnish.data.tree import grow
from burnish.models.policy import Policy
from burnish.models.score import attach_score
from burnish.models.tensor import refuse_layers
from burnish.objectives.distill import DistillObjective
from burnish.objectives.dpo import DPOObjective
from burnish.objectives.kto import KTOObjective

from .families import DEVICE, FAMILIES, SEGMENT_BY_SEGMENT, build
from .test_pairs import cut, lora, pairs, sides
from .test_pairs import train_once as train_pairs
from .test_whole_model import FAST, assert_same, batches, examples, train_once
from .threads import together

# The backward passes of all threads share one thread for each GPU, where they cannot wait for each other.
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="ranks are threads")

SHARED = ("llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi", "granite", "cohere", "gpt-neox")
"""Families whose layers are cut by outputs and inputs alone."""


def policy_of(model, **options):
    return Policy(copy.deepcopy(model), **options)


def joined(results):
    """The loss, which all ranks agree on, and the gradients of whole weights, from each rank's (loss, gradients) and what was cut."""
    cuts = results[0][1]
    losses = [step[0] for step, _ in results]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)
    made = {}
    for name in {name for step, _ in results for name in step[1]}:
        parts = [step[1][name] for step, _ in results if name in step[1]]
        if name in cuts.dims:
            made[name] = torch.cat(parts, dim=cuts.dims[name])
        elif name in cuts.partial:
            made[name] = sum(parts)
        else:
            for part in parts:
                torch.testing.assert_close(part, parts[0], rtol=1e-12, atol=1e-12)
            made[name] = parts[0]
    return losses[0], made


def shared(make, size, step, *, kernels=False):
    """One step of policies on `size` ranks that share their layers; `make` gives a fresh one each time."""
    policies = [make() for _ in range(size)]

    def one(group):
        policy = policies[group.rank]
        cuts = policy.share_layers(group, DEVICE, kernels=kernels)
        return step(policy), cuts

    return joined(together(size, one))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", SHARED)
def test_every_family(name, size, capsys):
    model = build(name, num_key_value_heads=size)
    rows = examples((9, 5, 12, 1))

    def step(policy):
        return train_once(policy, [*batches(rows, 3), collate([], step_weight=1.0).to(DEVICE)])

    assert_same(shared(lambda: policy_of(model, kernels=False), size, step), step(policy_of(model, kernels=False)), 1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_fast_modules_and_recomputation(name, capsys):
    model, rows = lora(name), examples()

    def step(policy):
        policy.checkpoint_activations(tile=5)
        return train_once(policy, batches(rows, 2))

    plain, kernels = policy_of(model), []

    def fast(policy):
        kernels.append(policy.kernels)
        return step(policy)

    assert_same(shared(lambda: policy_of(model, kernels=False), 2, fast, kernels=True), train_once(plain, batches(rows, 2)), FAST)
    ours = {slot: found.replaced for slot, found in plain.kernels.slots.items()}
    assert ours or name in ("cohere", "phi", "gpt-neox")
    assert all({slot: found.replaced for slot, found in report.slots.items()} == ours for report in kernels)


def test_biases_on_both_sides_count_once(capsys):
    """Also where they are trained, and under an adapter."""
    model, rows = build("llama", attention_bias=True, mlp_bias=True), examples()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()

    def step(policy):
        return train_once(policy, batches(rows, 2))

    for made in (
        model,
        get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).double(),
    ):
        found = shared(lambda made=made: policy_of(made, kernels=False), 2, step)
        assert_same(found, step(policy_of(made, kernels=False)), 1e-6)
        fast = shared(lambda made=made: policy_of(made, kernels=False), 2, step, kernels=True)
        assert_same(fast, step(policy_of(made, kernels=False)), FAST)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("adapted", [False, True])
def test_shared_prompts_and_references(name, adapted, capsys):
    model = lora(name) if adapted else build(name)

    def step(policy):
        if not adapted:
            policy.keep_reference()
            with torch.no_grad():
                for parameter in policy.trainable().values():
                    parameter.mul_(1.02)
        return train_pairs(policy, cut(pairs(), 20), DPOObjective(DPO(loss=["aot"])))

    assert_same(shared(lambda: policy_of(model, kernels=False), 2, step), step(policy_of(model, kernels=False)), 1e-6)


def test_kto_asks_for_other_answers(capsys):
    model = lora("llama-tied")
    answers = [grow([side], values=(float(place),), weight=1.0) for both in sides() for place, side in enumerate(both)]

    def step(policy):
        return train_pairs(policy, cut(answers, 25, mismatched=True), KTOObjective(KTO()))

    assert_same(shared(lambda: policy_of(model, kernels=False), 2, step), step(policy_of(model, kernels=False)), 1e-6)


def test_a_teacher_is_shared_too(capsys):
    model, teacher, rows = build("llama-tied"), build("qwen2"), examples()

    def one(group=None):
        student, other = policy_of(model, kernels=False), policy_of(teacher, kernels=False)
        cuts = None
        if group is not None:
            cuts = student.share_layers(group, DEVICE)
            other.share_layers(group, DEVICE)
        objective = DistillObjective(Distill(teacher="other", sft_weight=0.3), teacher=other)
        return train_once(student, batches(rows, 2), objective), cuts

    assert_same(joined(together(2, one)), one()[0], 1e-6)


def test_scores_and_the_gradient_of_their_head(capsys):
    model = build("qwen2")
    attach_score(model, "answers")

    def step(policy):
        policy.model.zero_grad()
        (batch,) = cut(pairs())
        loss = policy.scores(batch).square().sum()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}

    assert_same(shared(lambda: policy_of(model, kernels=False), 2, step), step(policy_of(model, kernels=False)), 1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_part_of_the_layers(size, capsys):
    model = build("qwen3", num_key_value_heads=4)
    layers = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    rest = sum(p.numel() for p in model.parameters()) - layers

    def one(group):
        policy = policy_of(model, kernels=False)
        policy.share_layers(group, DEVICE)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in policy.model.parameters())
        return sum(p.numel() for p in policy.model.parameters())

    assert together(size, one) == [rest + layers // size] * size


@pytest.mark.parametrize("name", sorted({*FAMILIES, *SEGMENT_BY_SEGMENT} - set(SHARED)))
def test_other_families_are_refused(name, capsys):
    with pytest.raises(ConfigError, match="cannot be shared: ") as caught:
        refuse_layers(policy_of(build(name), kernels=False).anatomy, 2)
    assert caught.value.where is not None
    assert caught.value.where.field == "parallel.tensor"


def test_heads_that_cannot_be_shared_are_named(capsys):
    said = r"4 devices cannot share the layers of LlamaForCausalLM equally: layers\.0\.self_attn\.k_proj has 2 heads"
    with pytest.raises(ConfigError, match=said) as caught:
        refuse_layers(policy_of(build("llama"), kernels=False).anatomy, 4)
    assert caught.value.hint == "take 2"
    with pytest.raises(ConfigError, match=said) as caught:
        refuse_layers(policy_of(build("llama"), kernels=False).anatomy, 4, processes=3)
    assert caught.value.hint == "take 2, and a number of processes that it divides"


def refused(model, match):
    with pytest.raises(ConfigError, match=match):
        together(2, lambda group: policy_of(model, kernels=False).share_layers(group, DEVICE))


def test_what_would_not_be_the_same_is_refused(capsys):
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    refused(get_peft_model(build("llama"), LoraConfig(use_dora=True, **options)).double(), "is no plain linear layer")
    refused(get_peft_model(build("llama"), LoraConfig(lora_dropout=0.1, **options)).double(), "there is dropout in layers.0.self_attn")
    refused(build("llama", attention_dropout=0.1), "there is dropout in layers.0.self_attn")
    strange = build("llama")
    strange.model.layers[1].mlp.extra = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    refused(strange, r"model\.layers\.1\.mlp\.extra is not in the plan")


class Longer(torch.autograd.Function):
    """Gives a gradient that depends on all of it."""

    @staticmethod
    def forward(_ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * gradient.norm()


@pytest.mark.parametrize("strange", [lambda x: x / x.norm(), Longer.apply])
def test_a_model_whose_parts_are_not_its_whole_is_refused(strange, capsys):
    """Something that looks at all features between the layers that are cut: of the values, or only of their gradients."""

    def one(group):
        policy = policy_of(build("llama"), kernels=False)
        policy.anatomy.backbone.layers[0].mlp.act_fn.register_forward_hook(lambda module, inputs, output: strange(output))
        policy.share_layers(group, DEVICE)

    with pytest.raises(ConfigError, match="differ from those on one"):
        together(2, one)


def test_code_that_counts_all_heads_is_refused(capsys):
    def one(group):
        policy = policy_of(build("llama"), kernels=False)
        attention = policy.anatomy.backbone.layers[1].self_attn
        plain = attention.forward

        def forward(hidden_states, **options):
            output, weights = plain(hidden_states, **options)
            assert attention.q_proj(hidden_states).shape[-1] == 32, "four heads"
            return output, weights

        attention.forward = forward
        policy.share_layers(group, DEVICE)

    with pytest.raises(ConfigError, match=r"its code does not compute a part of its heads \(AssertionError: four heads"):
        together(2, one)
