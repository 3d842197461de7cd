"""The look at the first gradients."""

import pytest
import torch
from torch import nn

from burnish.core.errors import TrainingError
from burnish.engine.guard import GradientGuard

A, B = "q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight"


def parameters(*names: str, zero: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(2, 2) if name in zero else torch.ones(2, 2)) for name in names}


def gradients(found: dict[str, nn.Parameter], **values: float | None) -> None:
    for name, parameter in found.items():
        value = values.get(name.split(".")[0], 1.0)
        parameter.grad = None if value is None else torch.full((2, 2), value)


def test_all_have_a_gradient():
    found = parameters("a", "b")
    gradients(found)
    guard = GradientGuard(found)
    guard.look()
    assert guard.done
    assert guard.report.parameters == 2


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_parameter_without_gradient_is_named(value: float | None):
    found = parameters("a", "cut_off.weight")
    gradients(found, cut_off=value)
    with pytest.raises(TrainingError, match=r"1 of 2 trained parameters got no gradient in update 1: cut_off.weight"):
        GradientGuard(found).look()


def test_many_names_are_shortened():
    found = parameters(*[f"p{n}" for n in range(8)])
    with pytest.raises(TrainingError, match="p4 and 3 more"):
        GradientGuard(found).look()


def test_lora_a_may_wait_for_the_second_update():
    found = parameters(A, B, zero=(B,))
    found[A].grad, found[B].grad = torch.zeros(2, 2), torch.ones(2, 2)
    guard = GradientGuard(found)
    guard.look()
    assert not guard.done
    found[B].data += 1
    found[A].grad = torch.ones(2, 2)
    guard.look()
    assert guard.done


def test_lora_a_must_not_wait_longer():
    found = parameters(A, B, zero=(B,))
    found[A].grad, found[B].grad = torch.zeros(2, 2), torch.ones(2, 2)
    guard = GradientGuard(found)
    guard.look()
    found[B].data += 1
    with pytest.raises(TrainingError, match=r"in update 2: q_proj.lora_A"):
        guard.look()


def test_lora_a_with_another_init_does_not_wait():
    found = parameters(A, B)  # B is not zero: PiSSA, OLoRA
    found[A].grad, found[B].grad = torch.zeros(2, 2), torch.ones(2, 2)
    with pytest.raises(TrainingError, match="lora_A"):
        GradientGuard(found).look()


def test_the_pair_of_an_embedding_starts_the_other_way_round():
    a, b = "embed.lora_embedding_A", "embed.lora_embedding_B"
    found = parameters(a, b, zero=(a,))
    found[a].grad = torch.ones(2, 2)
    guard = GradientGuard(found)
    guard.look()
    assert not guard.done


def test_a_rate_of_zero_does_not_wait_for_ever():
    found = parameters(A, B, zero=(B,))
    found[B].grad = torch.ones(2, 2)
    guard = GradientGuard(found, patience=3)
    for _ in range(3):
        guard.look()
    assert guard.done


def test_idle_experts_are_counted():
    names = [f"layers.0.experts.{n}.up_proj.weight" for n in range(3)]
    found = parameters(*names)
    for name in names[:2]:
        found[name].grad = torch.ones(2, 2)
    guard = GradientGuard(found)
    guard.look()
    guard.look()
    assert guard.done
    assert guard.report.idle_experts == [names[2]]


def test_a_layer_without_a_busy_expert_is_an_error():
    names = [f"layers.{layer}.experts.{n}.up_proj.weight" for layer in range(2) for n in range(2)]
    found = parameters(*names)
    found[names[0]].grad = torch.ones(2, 2)
    with pytest.raises(TrainingError, match=r"2 of 4 .* layers.1.experts.0"):
        GradientGuard(found).look()


def test_new_tokens_that_do_not_occur_are_counted():
    found = parameters("a", "embed_tokens.trainable_tokens_delta.default")
    found["a"].grad = torch.ones(2, 2)
    guard = GradientGuard(found)
    guard.look()
    guard.look()
    assert guard.report.idle_tokens == ["embed_tokens.trainable_tokens_delta.default"]
