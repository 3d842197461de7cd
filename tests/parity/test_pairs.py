"""A pair's prompt is computed once, and nothing else changes: loss and every gradient are those of the answers computed separately."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from burnish.config.objectives import DPO, KTO
from burnish.data.loader import Listed, Step
from burnish.data.tree import grow
from burnish.data.types import Example
from burnish.models.policy import Policy
from burnish.objectives.dpo import DPOObjective
from burnish.objectives.kto import KTOObjective

from .families import DEVICE, FAMILIES, SEGMENT_BY_SEGMENT, VOCABULARY, build
from .test_whole_model import EXACT, FAST, assert_same

SHAPES = ((6, 3, 5), (1, 4, 2), (9, 1, 7))  # prompt, chosen, rejected


def sides(seed=0, shapes=SHAPES):
    """Prompts with two answers each, as plain examples."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt, *answers in shapes:
        shared = rng.integers(3, VOCABULARY, prompt)
        rows = [np.concatenate([shared, rng.integers(3, VOCABULARY, n)]).astype(np.int32) for n in answers]
        made.append([Example(row, (np.arange(len(row)) >= prompt).astype(np.float32)) for row in rows])
    return made


def pairs(*, share=True, shapes=SHAPES):
    return [grow(both, values=(0.0,), weight=1.0, share=share) for both in sides(shapes=shapes)]


def cut(examples, budget=1000, *, packing=True, mismatched=False):
    """The micro-batches of one step."""
    step = Step(Listed(examples), np.arange(len(examples)), mismatched=mismatched)
    return [batch.to(DEVICE) for batch in step.batches(budget, 0, 1, packing=packing)]


def train_once(policy, batches, objective):
    policy.model.zero_grad()
    if hasattr(objective, "begin_step"):
        objective.begin_step(policy, batches, dict)
    total = 0.0
    for batch in batches:
        loss = objective(policy, batch).sum / batch.step_weight
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def lora(name):
    torch.manual_seed(1)
    model = get_peft_model(build(name), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for module in model.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    return model.double()


def by_hand(model, both):
    """DPO with plain transformers: every answer in a call of its own, the reference is the model without its adapter."""
    model.zero_grad()

    def logprob(example):
        ids = torch.tensor(example.input_ids, device=DEVICE).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        return (logits.gather(-1, ids[0, 1:, None])[:, 0] * torch.tensor(example.weights[1:], device=DEVICE)).sum()

    total = 0.0
    for chosen, rejected in both:
        with torch.no_grad(), model.disable_adapter():
            reference = logprob(chosen) - logprob(rejected)
        loss = -F.logsigmoid(0.1 * (logprob(chosen) - logprob(rejected) - reference)) / len(both)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", sorted([*FAMILIES, *SEGMENT_BY_SEGMENT]))
def test_a_shared_prompt_changes_nothing(name, kernels, capsys):
    model = build(name)
    policy = Policy(model, kernels=kernels)
    policy.keep_reference()
    with torch.no_grad():  # away from the reference, where its part of the loss is more than zero
        for parameter in policy.trainable().values():
            parameter.mul_(1.02)
    tolerance = FAST if kernels else EXACT
    shared = train_once(policy, cut(pairs()), DPOObjective(DPO()))
    assert_same(shared, train_once(policy, cut(pairs(share=False)), DPOObjective(DPO())), tolerance)
    assert_same(train_once(policy, cut(pairs(), packing=False), DPOObjective(DPO())), shared, tolerance)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_the_same_as_plain_transformers_and_peft(name):
    model = lora(name)
    truth = by_hand(copy.deepcopy(model), sides())
    for kernels in (False, True):
        policy = Policy(copy.deepcopy(model), kernels=kernels)
        assert_same(train_once(policy, cut(pairs()), DPOObjective(DPO())), truth, FAST)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "aot", "aot_unpaired", "sft", "sigmoid_norm"])
def test_the_cut_into_micro_batches_does_not_matter(loss):
    policy = Policy(lora("llama"))
    shapes = ((6, 3, 5), (2, 4, 2), (9, 1, 7), (3, 3, 3), (5, 6, 1))
    whole = train_once(policy, cut(pairs(shapes=shapes)), DPOObjective(DPO(loss=[loss])))
    pieces = cut(pairs(shapes=shapes), 25)
    assert len(pieces) > 1
    assert_same(train_once(policy, pieces, DPOObjective(DPO(loss=[loss]))), whole)


def test_all_kinds_of_reference_say_the_same():
    model = lora("llama")
    policy = Policy(model)
    (batch,) = cut(pairs())
    with policy.reference():
        off = policy.token_stats(batch).logprobs
    kept = Policy(build("llama"))
    kept.keep_reference()
    with torch.no_grad():
        for parameter in kept.trainable().values():
            parameter.add_(torch.randn_like(parameter))
        moved = kept.token_stats(batch).logprobs
    with kept.reference():
        copied = kept.token_stats(batch).logprobs
    alone = Policy(build("llama")).eval()
    with torch.no_grad():
        plain = alone.token_stats(batch).logprobs
    torch.testing.assert_close(off, plain, rtol=1e-9, atol=1e-9)
    assert torch.equal(copied, plain)
    assert not torch.allclose(moved, plain)
    with torch.no_grad():
        assert torch.equal(kept.token_stats(batch).logprobs, moved)  # the trained weights are back


def test_the_reference_moves_towards_the_policy():
    policy = Policy(build("llama"))
    policy.keep_reference()
    before = {name: value.clone() for name, value in policy.kept_reference.items()}
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(1.0)
    policy.move_reference(0.25)
    for name, value in policy.kept_reference.items():
        torch.testing.assert_close(value, before[name] + 0.25)


def test_judged_answers_do_not_depend_on_the_cut_either():
    policy = Policy(lora("llama"))
    answers = [grow([side], values=(float(place),), weight=1.0) for both in sides() for place, side in enumerate(both)]
    whole = train_once(policy, cut(answers, mismatched=True), KTOObjective(KTO()))
    pieces = cut(answers, 25, mismatched=True)
    assert len(pieces) > 1
    assert_same(train_once(policy, pieces, KTOObjective(KTO())), whole)
