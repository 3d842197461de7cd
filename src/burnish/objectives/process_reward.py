"""Process reward models: whether each step of a solution is right (2305.20050).

At the last token of every step two logits say wrong and right; the loss is their cross-entropy with the step's label, averaged over all
steps. A label between 0 and 1 is the probability of being right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from burnish.config.objectives import ProcessReward
from burnish.data.types import Batch
from burnish.objectives.base import Loss
from burnish.objectives.reward import Scorer


def step_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-label log p(right) - (1 - label) log p(wrong) of each step [B], from logits [B, 2] (wrong, right)."""
    logp = F.log_softmax(logits, dim=-1)
    return -(labels * logp[:, 1] + (1 - labels) * logp[:, 0])


class ProcessRewardObjective:
    """Cross-entropy over steps.

    Metrics: `accuracy` over all steps, `accuracy_right` and `accuracy_wrong` over the right and the wrong ones alone.
    """

    needs_reference = False

    def __init__(self, config: ProcessReward) -> None:
        self.config = config

    def __call__(self, policy: Scorer, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight` counts its steps."""
        logits, labels = policy.scores(batch), batch.extras["values"]
        agrees = ((logits[:, 1] > logits[:, 0]) == (labels > 0.5)).float()
        metrics = {"accuracy": (agrees.sum(), float(len(labels)))}
        for name, right in (("accuracy_right", True), ("accuracy_wrong", False)):
            if count := sum((value > 0.5) == right for value in batch.values):
                metrics[name] = ((agrees * ((labels > 0.5) == right)).sum(), float(count))
        return Loss(step_loss(logits, labels).sum(), metrics)


build = ProcessRewardObjective
"""What `objective: process_reward` builds."""
