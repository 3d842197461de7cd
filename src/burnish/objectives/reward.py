"""Reward models: a score s(y) for each answer, so that the better one of a pair has the higher.

    loss = -log sigma(s(y+) - s(y-) - m) + c (s(y+) + s(y-))^2

The first term is Bradley and Terry's likelihood (2203.02155, equation 1), m the margin that the row asks for (Llama 2, 2307.09288, equation
2), the second keeps scores around zero (2312.09244, section 3.2). The score is read at the answer's last token.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from burnish.config.objectives import Reward
from burnish.data.types import Batch
from burnish.objectives._pairs import preferred, split
from burnish.objectives.base import Loss


class Scorer(Protocol):
    """A policy with a score head."""

    def scores(self, batch: Batch) -> torch.Tensor:
        """The head's outputs [B, 1] at the last token of each branch."""
        ...


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0, centering: float = 0.0) -> torch.Tensor:
    """The loss of each pair [P] from the scores of its answers [P] and the margin [P] by which they shall differ."""
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + centering * (chosen + rejected).square() if centering else loss


class RewardObjective:
    """Bradley-Terry over pairs.

    Metrics: `reward_chosen`, `reward_rejected`, `reward_margin` (mean scores), `reward_accuracy` (the share of pairs whose chosen answer
    has the higher score, a tie counts half), and `accuracy_longer`, `accuracy_shorter` as for DPO.
    """

    needs_reference = False

    def __init__(self, config: Reward) -> None:
        self.config = config

    def __call__(self, policy: Scorer, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight` counts its pairs."""
        chosen, rejected = split(policy.scores(batch).squeeze(-1))
        margin = batch.extras["values"] if self.config.margin else 0.0
        losses = batch.extras["weights"] * bradley_terry(chosen, rejected, margin, self.config.centering)
        good, bad, pairs = chosen.detach(), rejected.detach(), float(batch.examples)
        metrics = preferred(good, bad, batch) | {
            "reward_chosen": (good.sum(), pairs),
            "reward_rejected": (bad.sum(), pairs),
            "reward_margin": ((good - bad).sum(), pairs),
        }
        return Loss(losses.sum(), metrics)


build = RewardObjective
"""What `objective: reward` builds."""
