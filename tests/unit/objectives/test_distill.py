"""Distillation: what the sum is made of, on real little models, however a step is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from burnish.config.objectives import Distill
from burnish.core.errors import ModelError
from burnish.data.collate import collate
from burnish.data.types import Example
from burnish.kernels.divergence import divergence_rows
from burnish.models.policy import Policy
from burnish.objectives.distill import DistillObjective, build, common_vocabulary


def model(seed, vocabulary=29, hidden=16, family="Llama"):
    torch.manual_seed(seed)
    sizes = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    if family == "Gemma2":
        sizes |= {"head_dim": 8, "final_logit_softcapping": 3.0}
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, hidden_size=hidden, max_position_embeddings=64, **sizes)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def examples(seed=0):
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(0, 29, n).astype(np.int32), rng.choice([0, 0.5, 1], n).astype(np.float32)) for n in (7, 5, 9, 4)]


def batches(cut):
    rows, start, found = examples(), 0, []
    total = sum(float(row.weights[1:].sum()) for row in rows)
    for size in cut:
        found.append(collate(rows[start : start + size], step_weight=total))
        start += size
    return found


def config(**settings):
    return Distill(teacher="somewhere", **settings)


def full_logits(policy, batch):
    starts = (0, *batch.doc_ends)
    pieces = [policy.model(batch.input_ids[None, a:b]).logits[0] for a, b in itertools.pairwise(starts)]
    return torch.cat(pieces).index_select(0, batch.rows)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize(
    "settings", [{}, {"divergence": "reverse_kl", "sft_weight": 0.3}, {"divergence": "js", "mix": 0.2, "temperature": 2.0}]
)
def test_the_sum_is_that_of_full_logits(family, settings):
    policy, teacher = Policy(model(0, family=family)), Policy(model(1, hidden=24))
    (batch,) = batches([4])
    loss = DistillObjective(config(**settings), teacher=teacher)(policy, batch)
    loss.sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in policy.trainable().items()}
    policy.model.zero_grad()
    with torch.no_grad():
        theirs = full_logits(teacher, batch)
    ours = full_logits(policy, batch)
    rows = divergence_rows(
        ours,
        theirs,
        kind=settings.get("divergence", "forward_kl"),
        mix=settings.get("mix", 0.5),
        temperature=settings.get("temperature", 1.0),
    )
    nll, share = F.cross_entropy(ours, batch.targets, reduction="none"), settings.get("sft_weight", 0.0)
    expected = (batch.token_weights * ((1 - share) * rows + share * nll)).sum()
    expected.backward()
    torch.testing.assert_close(loss.sum, expected, atol=1e-4, rtol=1e-4)
    for name, parameter in policy.trainable().items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-4, rtol=1e-3)
    means = {key: float(amount) / count for key, (amount, count) in loss.metrics.items()}
    assert means["nll"] == pytest.approx((batch.token_weights * nll).sum().item() / batch.weight, rel=1e-4)
    assert means["divergence"] == pytest.approx((batch.token_weights * rows).sum().item() / batch.weight, rel=1e-3)
    assert means["accuracy"] == pytest.approx((ours.argmax(-1) == batch.targets).float().mean().item())
    assert means["agreement"] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_step_does_not_depend_on_its_cut():
    teacher = Policy(model(1, hidden=24))
    base = get_peft_model(model(0), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    policy, objective, found = Policy(base), build(config(sft_weight=0.2), teacher=teacher), []
    for cut in ([4], [1, 3], [1, 1, 1, 1]):
        policy.model.zero_grad()
        total = 0.0
        for batch in batches(cut):
            loss = objective(policy, batch).sum / batch.step_weight
            loss.backward()
            total += loss.item()
        found.append((total, {name: parameter.grad.clone() for name, parameter in policy.trainable().items()}))
    for total, gradients in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], atol=1e-5, rtol=1e-4)


def test_heads_that_are_not_plain_are_called():
    plain = Policy(model(0))
    adapted = get_peft_model(model(0), LoraConfig(r=2, target_modules=["lm_head"]))
    teacher, (batch,) = Policy(model(1)), batches([4])
    policy = Policy(adapted)
    assert policy.head_inputs(batch).module is not None
    expected = DistillObjective(config(), teacher=teacher)(plain, batch).sum
    torch.testing.assert_close(DistillObjective(config(), teacher=teacher)(policy, batch).sum, expected)
    torch.testing.assert_close(
        DistillObjective(config(), teacher=policy)(teacher, batch).sum, DistillObjective(config(), teacher=plain)(teacher, batch).sum
    )


def test_a_placeholder_takes_part():
    policy = Policy(model(0))
    loss = DistillObjective(config(sft_weight=0.5), teacher=Policy(model(1)))(policy, collate([], step_weight=3.0))
    loss.sum.backward()
    assert loss.sum.item() == 0
    assert policy.model.lm_head.weight.grad.abs().sum() == 0


def test_the_teacher_is_in_evaluation_mode():
    teacher = Policy(model(1)).train()
    objective = DistillObjective(config(), teacher=teacher)
    assert not teacher.model.training
    assert not objective.needs_reference


def test_padding_of_the_vocabulary_is_cut():
    assert common_vocabulary(29, 29) == 29
    assert common_vocabulary(29, 29, 25) == 29
    assert common_vocabulary(151936, 152064, 151665) == 151665
    for sizes in ((29, 32), (29, 32, 30)):
        with pytest.raises(ModelError, match="the student has 29 logits and the teacher 32"):
            common_vocabulary(*sizes)
    (batch,) = batches([4])
    policy, teacher = Policy(model(0)), Policy(model(1, vocabulary=32))
    with pytest.raises(ModelError, match="tokenizer's length is not known"):
        DistillObjective(config(), teacher=teacher)(policy, batch)
    loss = DistillObjective(config(), teacher=teacher, tokens=29)(policy, batch).sum
    rows = divergence_rows(full_logits(policy, batch), full_logits(teacher, batch)[:, :29])
    torch.testing.assert_close(loss, (batch.token_weights * rows).sum(), atol=1e-4, rtol=1e-4)
