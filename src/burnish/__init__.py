"""burnish fine-tunes open language models.

    import burnish

    burnish.train("run.yaml")                       # what `burnish train run.yaml` does

    run = burnish.Run.from_file("run.yaml")         # the loop in your own hands
    for batch in run.batches():
        run.step(run.loss(batch))
    run.save()

    policy = burnish.load("HuggingFaceTB/SmolLM2-135M-Instruct", adapter={"rank": 16})   # the model in anyone's training code
    reward = burnish.load_reward("runs/reward")     # a reward model at work: reward.score(conversations)

Names are looked up when they are first used: `import burnish` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from burnish.core.garbage import paused

if TYPE_CHECKING:
    from burnish.core.errors import BurnishError
    from burnish.data.types import Batch, Completion, Conversation, Judged, Message, Pair, Stepwise
    from burnish.models.policy import Policy
    from burnish.objectives.base import Loss
    from burnish.reward import ProcessRewardModel, RewardModel, load_process_reward, load_reward
    from burnish.run import Run, load, train

_HOMES = {
    "Batch": "burnish.data.types",
    "BurnishError": "burnish.core.errors",
    "Completion": "burnish.data.types",
    "Conversation": "burnish.data.types",
    "Judged": "burnish.data.types",
    "Loss": "burnish.objectives.base",
    "Message": "burnish.data.types",
    "Pair": "burnish.data.types",
    "Policy": "burnish.models.policy",
    "ProcessRewardModel": "burnish.reward",
    "RewardModel": "burnish.reward",
    "Run": "burnish.run",
    "Stepwise": "burnish.data.types",
    "load": "burnish.run",
    "load_process_reward": "burnish.reward",
    "load_reward": "burnish.reward",
    "train": "burnish.run",
}

__all__ = [
    "Batch",
    "BurnishError",
    "Completion",
    "Conversation",
    "Judged",
    "Loss",
    "Message",
    "Pair",
    "Policy",
    "ProcessRewardModel",
    "RewardModel",
    "Run",
    "Stepwise",
    "load",
    "load_process_reward",
    "load_reward",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'burnish' has no attribute '{name}'")
    with paused():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
