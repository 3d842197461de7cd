"""Updates within the backward pass are those of an ordinary step, and what they cannot have is refused."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from tests.unit.engine.conftest import TinyExamples, TinyObjective, TinyPolicy
from tests.unit.engine.test_loop import SignalAt
from tests.unit.engine.test_step import batches
from torch import nn

from burnish.config.sections import Train
from burnish.core.errors import ConfigError, Interrupted, TrainingError
from burnish.data.loader import Loader
from burnish.engine.backend import Backend
from burnish.engine.combined import InBackward
from burnish.engine.loop import Job
from burnish.engine.loop import train as train_loop
from burnish.engine.optim import build_optimizer
from burnish.engine.step import Stepper


def settings(kind: str = "adamw", **more: object) -> Train:
    return Train.model_validate({"learning_rate": 0.01, "optimizer": kind, "weight_decay": 0.1, "clip": None, **more})


def stepper(
    policy: TinyPolicy, in_backward: bool, kind: str = "adamw", backend: Backend | None = None, clip: float | None = None
) -> Stepper:
    backend = backend or Backend(precision="float32", cpu=True)
    optimizer = build_optimizer(policy.trainable(), settings(kind), in_backward=in_backward)
    return Stepper(backend, optimizer, policy.trainable(), learning_rate=0.01, multiplier=lambda step: 1 / (step + 1), clip=clip)


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon", "adafactor", "adamw_8bit"])
def test_the_weights_are_those_of_an_ordinary_step(kind: str):
    policies = TinyPolicy(), TinyPolicy()
    ordinary, inside = stepper(policies[0], False, kind), stepper(policies[1], True, kind)
    (batch,) = batches([8])
    for _ in range(4):
        results = []
        for policy, steps in zip(policies, (ordinary, inside), strict=True):
            steps.accumulate(TinyObjective()(policy, batch), batch)
            if steps is inside:
                assert all(p.grad is None for p in policy.trainable().values())
            results.append(steps.update())
        first, second = results
        assert second.loss == first.loss and second.learning_rate == first.learning_rate
        assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-6)
        for name, parameter in policies[0].trainable().items():
            assert torch.equal(parameter, policies[1].trainable()[name]), name
    assert inside.guard.done and inside.guard.report.parameters == len(policies[1].trainable())


def test_each_gradient_is_gone_before_the_next_one_comes():
    """In the backward pass through a chain of layers there is never more than one gradient."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    alive: list[int] = []
    for layer in model:
        layer.weight.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    optimizer = build_optimizer(dict(model.named_parameters()), settings(), in_backward=True)
    assert isinstance(optimizer, InBackward)
    optimizer.begin()
    model(torch.ones(2, 8)).sum().backward()
    assert alive == [1] * 5
    assert set(optimizer.finish()) == set(model.parameters())


def test_several_micro_batches_are_refused_before_anything_moves():
    policy = TinyPolicy()
    steps = stepper(policy, True)
    before = copy.deepcopy(policy.trainable())
    first, _ = batches([3, 5])
    with pytest.raises(TrainingError, match="a step has one micro-batch, and this one has more") as caught:
        steps.accumulate(TinyObjective()(policy, first), first)
    assert "train.micro_batch_tokens" in str(caught.value.hint)
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    (batch,) = batches([8])
    steps.accumulate(TinyObjective()(policy, batch), batch)
    with pytest.raises(TrainingError, match="one micro-batch"):
        steps.accumulate(TinyObjective()(policy, batch), batch)


def test_what_needs_all_gradients_is_refused():
    with pytest.raises(ConfigError, match=r"train\.clip.*needs all gradients"):
        build_optimizer(TinyPolicy().trainable(), settings(clip=1.0), in_backward=True)
    with pytest.raises(ConfigError, match="needs all gradients"):
        stepper(TinyPolicy(), True, clip=0.5)
    with pytest.raises(ConfigError, match="'adamw_schedule_free' works on all parameters at once"):
        build_optimizer(TinyPolicy().trainable(), settings("adamw_schedule_free"), in_backward=True)
    with pytest.raises(ConfigError, match="float16 looks for overflow"):
        stepper(TinyPolicy(), True, backend=Backend(precision="float16", cpu=True))
    many = Backend(precision="float32", cpu=True)
    many.world_size = 2
    with pytest.raises(ConfigError, match="several processes average"):
        stepper(TinyPolicy(), True, backend=many)


def test_a_gradient_that_is_not_finite_does_not_spoil_the_weights():
    policy = TinyPolicy()
    steps = stepper(policy, True)
    (batch,) = batches([8])
    for number in range(3):
        loss = TinyObjective()(policy, batch)
        if number == 1:
            loss.sum = loss.sum * math.nan
        steps.accumulate(loss, batch)
        assert steps.update().skipped == (number == 1)
    assert steps.skipped == 1
    assert all(p.isfinite().all() for p in policy.trainable().values())


def test_a_parameter_without_gradient_is_noticed():
    policy = TinyPolicy()
    policy.model["idle"] = nn.Linear(2, 2, bias=False)
    steps = stepper(policy, True)
    (batch,) = batches([8])
    steps.accumulate(TinyObjective()(policy, batch), batch)
    with pytest.raises(TrainingError, match=r"1 of 7 trained parameters got no gradient in update 1: idle\.weight"):
        steps.update()


class Pair(nn.Module):
    """LoRA beside a frozen matrix: A has no gradient until B has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(4, 16))
        self.lora_B = nn.Parameter(torch.zeros(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x @ self.lora_A.T @ self.lora_B.T


def test_what_is_zero_by_construction_is_waited_for():
    policy = TinyPolicy()
    policy.model["dropout"] = nn.Sequential(nn.Linear(32, 16, bias=False), Pair(), nn.Linear(16, 32, bias=False))
    steps = stepper(policy, True)
    (batch,) = batches([8])
    for _ in range(2):  # the guard looks at B as it was before the update
        steps.accumulate(TinyObjective()(policy, batch), batch)
        steps.update()
    assert steps.guard.done


def test_a_backward_pass_of_nobodys_step_changes_nothing():
    policy = TinyPolicy()
    optimizer = build_optimizer(policy.trainable(), settings(), in_backward=True)
    before = copy.deepcopy(policy.trainable())
    (batch,) = batches([8])
    TinyObjective()(policy, batch).sum.backward()
    assert all(torch.equal(p, before[name]) and p.grad is not None for name, p in policy.trainable().items())
    optimizer.zero_grad()
    assert all(p.grad is None for p in policy.trainable().values())
    with pytest.raises(TrainingError, match="updates within the backward pass"):
        optimizer.step()


def test_resumed_equals_uninterrupted(make_job: Callable[..., Job]):
    def job(folder: str, **more: object) -> Job:
        # One micro-batch a step: 8 examples of at most 11 tokens.
        made = make_job(folder, dropout=0.2, clip=None, weight_decay=0.1, **more)
        made.source = Loader(TinyExamples(40), batch_size=8, max_length=16, micro_batch_tokens=1000, seed=made.train.seed)
        made.optimizer = build_optimizer(made.policy.trainable(), made.train, in_backward=True)
        return made

    whole = job("whole")
    train_loop(whole)
    with pytest.raises(Interrupted):
        train_loop(job("parts", callbacks=[SignalAt(4)]))
    again = job("parts")
    assert train_loop(again).resumed_from is not None
    for name, parameter in whole.policy.trainable().items():
        assert torch.equal(parameter, again.policy.trainable()[name]), name
