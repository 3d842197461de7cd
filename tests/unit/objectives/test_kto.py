"""KTO by hand, against TRL, and on a real model however a step is cut."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from burnish.config.objectives import KTO
from burnish.data.collate import collate
from burnish.models.policy import Policy
from burnish.objectives.base import StepObjective
from burnish.objectives.kto import KTOObjective, apo_zero, build, kto

from .judging import Table, judged

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_kto.json").read_text())
EXAMPLES = [
    ([3, 4, 5], [2, 5, 7], [9, 3]),
    ([6, 1], [1, 8], [2, 5, 7]),
    ([3], [9, 3, 4, 4], [1, 8]),
    ([7, 7, 2, 4], [6, 2], [9, 3, 4, 4]),
]
LABELS = [1, 0, 1, 0]


def alone(values):
    """Totals of one rank."""
    return dict(values)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_ten_numbers():
    ratios, good = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64), torch.tensor([1, 0, 0])
    losses = kto(ratios, good, 0.5, beta=0.2, desirable_weight=2.0, undesirable_weight=3.0)
    assert losses.tolist() == pytest.approx([2 * (1 - sigmoid(0.2 * 1.5)), 3 * (1 - sigmoid(0.2 * 1.5)), 1.5])
    losses = apo_zero(ratios, good, beta=0.2)
    assert losses.tolist() == pytest.approx([1 - sigmoid(0.4), sigmoid(-0.2), sigmoid(0.1)])


def test_gradcheck():
    ratios = torch.randn(6, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([1, 0, 1, 1, 0, 0])
    assert torch.autograd.gradcheck(lambda r: kto(r, good, 0.3, beta=0.7, desirable_weight=1.3), [ratios])
    assert torch.autograd.gradcheck(lambda r: apo_zero(r, good, beta=0.7, undesirable_weight=0.4), [ratios])


def test_the_baseline_is_the_mean_of_mismatched_answers_without_gradient():
    policy = Table([0.0, -1.0, -2.0, -0.5], [0.0, -2.0, -2.5, -1.5])  # log-ratios 0, 1, 0.5, 1
    batch = judged([([0], [1], [2, 2]), ([0], [2, 3], [1])], labels=[1, 0], weights=[2.0, 0.5])
    objective = KTOObjective(KTO(beta=0.4))
    objective.begin_step(policy, [batch], alone)
    loss = objective(policy, batch)
    z0 = (1.0 + 1.0) / 2
    good, bad = 1 - sigmoid(0.4 * (1.0 - z0)), 1 - sigmoid(0.4 * (z0 - 1.5))
    assert loss.sum.item() == pytest.approx(2 * good + 0.5 * bad)
    means = {key: float(amount) / count for key, (amount, count) in loss.metrics.items()}
    assert means == pytest.approx(
        {
            "reward_chosen": 0.4,
            "reward_rejected": 0.6,
            "logp_chosen": -1.0,
            "logp_rejected": -2.5,
            "reward_accuracy": 0.25,  # the good answer is right at the baseline, which counts half, and the bad one is above it
            "kl": z0,
        }
    )
    assert not any(amount.requires_grad for amount, _ in loss.metrics.values())
    loss.sum.backward()
    slope = 0.4 * 0.25 * 2  # of the good answer, right at the baseline; nothing reaches token 1 through z0
    assert policy.policy.grad[1].item() == pytest.approx(-slope)


def test_the_baseline_is_not_below_zero():
    policy = Table([0.0, -1.0], [0.0, -0.5])
    batch = judged([([0], [1], [1]), ([0], [1], [1])])
    objective = KTOObjective(KTO(beta=1.0))
    objective.begin_step(policy, [batch], alone)
    loss = objective(policy, batch)
    assert float(loss.metrics["kl"][0]) == 0.0
    assert loss.sum.item() == pytest.approx(2 * (1 - sigmoid(-0.5)))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['settings']['loss']}-{case['policy']}")
def test_numbers_are_trls(case):
    other = {"policy": "reference", "reference": "policy"}[case["policy"]]
    policy = Table(GOLDEN["tables"][case["policy"]], GOLDEN["tables"][other])
    objective = build(KTO(**case["settings"]))
    answers = zip(GOLDEN["answers"], GOLDEN["mismatched"], strict=True)
    batch = judged([([0], own, *([other] if objective.needs_mismatched else [])) for own, other in answers], labels=GOLDEN["labels"])
    objective.begin_step(policy, [batch], alone)
    loss = objective(policy, batch)
    (loss.sum / batch.step_weight).backward()
    assert loss.sum.item() / batch.step_weight == pytest.approx(case["loss"], abs=1e-6)
    torch.testing.assert_close(policy.policy.grad, torch.tensor(case["gradient"], dtype=torch.float64), atol=1e-6, rtol=1e-6)
    means = {key: float(amount) / count for key, (amount, count) in loss.metrics.items()}
    theirs = case["metrics"]
    assert means["reward_chosen"] == pytest.approx(theirs["rewards/chosen"], abs=1e-5)
    assert means["reward_rejected"] == pytest.approx(theirs["rewards/rejected"], abs=1e-5)
    assert means["logp_chosen"] == pytest.approx(theirs["logps/chosen"], abs=1e-5)
    assert means["logp_rejected"] == pytest.approx(theirs["logps/rejected"], abs=1e-5)
    assert means.get("kl", 0.0) == pytest.approx(theirs["kl"], abs=1e-5)


def test_nobody_computes_more_than_is_needed():
    policy = Table(torch.linspace(-2, -1, 10), torch.linspace(-1, -3, 10))
    batch = judged(EXAMPLES, labels=LABELS)
    prompts = sum(len(prompt) for prompt, *_ in EXAMPLES)
    own, mismatched = (sum(len(example[place]) for example in EXAMPLES) for place in (1, 2))
    objective = KTOObjective(KTO())
    objective.begin_step(policy, [batch], alone)
    objective(policy, batch)
    everything, lean = prompts + own + mismatched, [("policy", 4, prompts + mismatched), ("policy", 4, prompts + own)]
    assert policy.asked == [("reference", 8, everything), *lean]
    known = judged(EXAMPLES, labels=LABELS, reference=policy.own_reference[torch.tensor([t for _, own, _ in EXAMPLES for t in own])])
    policy.asked.clear()
    plain = objective(policy, batch).sum
    objective.begin_step(policy, [known], alone)
    torch.testing.assert_close(objective(policy, known).sum, plain)
    torch.testing.assert_close(objective(policy, replace(batch)).sum, plain)  # another object than the step began with
    assert policy.asked[1:4] == [("reference", 4, prompts + mismatched), *lean]


def test_ranks_share_one_baseline_and_placeholders_take_part():
    tables = torch.linspace(-2, -1, 10), torch.linspace(-1, -3, 10)
    whole = judged(EXAMPLES, labels=LABELS)
    expected = KTOObjective(KTO())
    policy = Table(*tables)
    expected.begin_step(policy, [whole], alone)
    truth = expected(policy, whole)
    shares = [[judged(EXAMPLES[:3], labels=LABELS[:3])], [judged(EXAMPLES[3:], labels=LABELS[3:])], [collate([], step_weight=4.0)]]
    # What each rank gives to its totals, asked for first, then added up for all.
    given = []
    for share in shares:
        record = []
        KTOObjective(KTO()).begin_step(Table(*tables), share, lambda values, r=record: (r.append(values["kl"]), {"kl": (0.0, 4.0)})[1])
        given.append(record)
    added = [{"kl": tuple(map(sum, zip(*column, strict=True)))} for column in zip(*given, strict=True)]
    total = 0.0
    for share in shares:
        objective, policy, answers = KTOObjective(KTO()), Table(*tables), iter(added)
        objective.begin_step(policy, share, lambda _, a=answers: next(a))
        loss = objective(policy, share[0])
        assert [who for who, *_ in policy.asked] == ["reference", "policy", "policy"]  # the same passes on every rank
        total += loss.sum.item()
    assert total == pytest.approx(truth.sum.item())


def test_a_step_of_one_example_has_no_baseline():
    policy = Table([0.0, -1.0], [0.0, -3.0])
    batch = judged([([0], [1])])
    objective = KTOObjective(KTO(beta=0.5))
    objective.begin_step(policy, [batch], alone)
    assert policy.asked == []
    assert objective(policy, batch).sum.item() == pytest.approx(1 - sigmoid(1.0))


def test_only_kto_wants_mismatched_answers():
    assert KTOObjective(KTO()).needs_mismatched
    assert not KTOObjective(KTO(loss="apo_zero")).needs_mismatched
    assert isinstance(KTOObjective(KTO()), StepObjective)


def test_a_loss_before_its_step_is_refused():
    with pytest.raises(ValueError, match="begin_step"):
        KTOObjective(KTO())(Table([0.0], [0.0]), judged(EXAMPLES))


def test_odd_branches_are_refused():
    batch = judged([([0], [1], [1]), ([0], [1])])
    with pytest.raises(ValueError, match="3 branches of 2 judged answers"):
        KTOObjective(KTO()).begin_step(Table([0.0, 0.0], [0.0, 0.0]), [batch], alone)


def policy_and_reference():
    torch.manual_seed(1)
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=32)),
        LoraConfig(r=2, target_modules="all-linear"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return Policy(model)


@pytest.mark.parametrize("loss", ["kto", "apo_zero"])
def test_a_step_does_not_depend_on_its_cut(loss):
    policy = policy_and_reference()
    weights = [1.0, 2.0, 0.5, 1.0]
    examples = EXAMPLES if loss == "kto" else [example[:2] for example in EXAMPLES]
    found = []
    for cut in ([4], [1, 3], [2, 2], [1, 1, 1, 1]):
        objective, start, batches = KTOObjective(KTO(loss=loss, beta=0.5)), 0, []
        for size in cut:
            part = slice(start, start + size)
            batches.append(judged(examples[part], labels=LABELS[part], weights=weights[part], step_weight=4.5))
            start += size
        policy.model.zero_grad()
        objective.begin_step(policy, batches, alone)
        total, kl = 0.0, 0.0
        for batch in batches:
            result = objective(policy, batch)
            (result.sum / batch.step_weight).backward()
            total += result.sum.item()
            kl += float(result.metrics["kl"][0]) / 4 if loss == "kto" else 0.0
        found.append((total, kl, {name: parameter.grad.clone() for name, parameter in policy.trainable().items()}))
    (total, kl, gradients), *others = found
    assert loss == "apo_zero" or kl > 0.01
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for other, other_kl, other_gradients in others:
        assert other == pytest.approx(total, rel=1e-5)
        assert other_kl == pytest.approx(kl, rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_token_weights_weigh_log_ratios():
    policy = Table([0.0, -1.0, -2.0], [0.0, -2.0, -2.5])
    batch = judged([([0], [1, 2])])
    batch = replace(batch, token_weights=torch.tensor([0.5, 2.0]))
    objective = KTOObjective(KTO(loss="apo_zero", beta=1.0))
    assert objective(policy, batch).sum.item() == pytest.approx(1 - sigmoid(0.5 + 1.0))
