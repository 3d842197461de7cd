"""The guard of the first steps on whole models of every family: nothing is accused, and nothing is missed."""

from __future__ import annotations

import pytest
import torch

from burnish.config.objectives import SFT
from burnish.config.sections import Adapter, Train
from burnish.core.errors import TrainingError
from burnish.engine.backend import Backend
from burnish.engine.optim import build_optimizer
from burnish.engine.step import Stepper
from burnish.models.adapters import attach
from burnish.models.policy import Policy
from burnish.objectives.sft import SFTObjective

from .families import DEVICE, build
from .test_whole_model import batches, examples


def three_steps(policy: Policy) -> Stepper:
    parameters = policy.trainable()
    stepper = Stepper(
        Backend(precision="float32", cpu=DEVICE.type == "cpu"),
        build_optimizer(parameters, Train()),
        parameters,
        learning_rate=2e-4,
        clip=1.0,
    )
    objective = SFTObjective(SFT())
    policy.train()
    for step in range(3):
        for batch in batches(examples((9, 5, 12, 30), seed=step), 2):
            stepper.accumulate(objective(policy, batch), batch)
        stepper.update()
    return stepper


LORA, DORA = Adapter(rank=2, alpha=4), Adapter(rank=2, alpha=4, dora=True)


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        *[(family, None) for family in ("llama-tied", "qwen2", "gpt-oss", "gpt2", "opt")],
        *[(family, LORA) for family in ("llama", "qwen3-moe")],
        *[(family, DORA) for family in ("llama", "gpt2")],
    ],
)
def test_nothing_is_accused(family: str, adapter: Adapter | None):
    model = build(family, torch.float32)
    policy = Policy(attach(model, adapter) if adapter else model)
    stepper = three_steps(policy)
    assert stepper.guard.done
    assert stepper.skipped == 0


def test_a_target_that_the_loss_does_not_reach_is_named():
    model = build("llama", torch.float32)
    policy = Policy(attach(model, Adapter(rank=2, alpha=4)))
    layer = policy.model.base_model.model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(TrainingError, match=r"trained parameters got no gradient in update 1: .*layers\.0\.self_attn"):
        three_steps(policy)
