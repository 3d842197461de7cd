"""SimPO and AlphaPO: the mean log-probability of an answer is its reward; no reference model.

    r(y)  = beta log p        p = exp(log pi(y) / |y|)                  SimPO (2405.14734, equation 4)
    r(y)  = beta (1 - p^-alpha) / alpha                                 AlphaPO (2501.03884); alpha -> 0 is SimPO
    loss  = -log sigma(r(y+) - r(y-) - gamma)                           (2405.14734, equation 6)

With label smoothing e, e of the loss is that of the pair the other way round. `sft_weight` adds the cross-entropy on the chosen answers, a
mean over their tokens.
"""

from __future__ import annotations

import torch

from burnish.config.objectives import SimPO
from burnish.objectives._pairs import Answers, PairObjective, smoothed_sigmoid


def reward(mean_logprob: torch.Tensor, alpha: float) -> torch.Tensor:
    """The reward of answers over beta [P], from the mean log-probability of a token [P]."""
    return mean_logprob if alpha == 0 else -torch.expm1(-alpha * mean_logprob) / alpha


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, config: SimPO) -> torch.Tensor:
    """The loss of each pair [P] from the rewards over beta [P]."""
    return smoothed_sigmoid(config.beta * (chosen - rejected) - config.gamma, config.label_smoothing)


class SimPOObjective(PairObjective):
    """SimPO over pairs."""

    def __init__(self, config: SimPO) -> None:
        self.config, self.beta = config, config.beta
        self.sft_weight = config.sft_weight

    def rewards(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean log-probabilities, in AlphaPO's shape."""
        chosen, rejected = answers.means
        return reward(chosen, self.config.alpha), reward(rejected, self.config.alpha)

    def losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """`simpo`."""
        return simpo(chosen, rejected, self.config)


build = SimPOObjective
"""What `objective: simpo` builds."""
