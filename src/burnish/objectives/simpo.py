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
from burnish.data.types import Batch
from burnish.objectives._pairs import Answers, chosen_nll, pair_metrics, smoothed_sigmoid
from burnish.objectives.base import Loss, Policy


def reward(mean_logprob: torch.Tensor, alpha: float) -> torch.Tensor:
    """The reward of answers over beta [P], from the mean log-probability of a token [P]."""
    return mean_logprob if alpha == 0 else -torch.expm1(-alpha * mean_logprob) / alpha


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, config: SimPO) -> torch.Tensor:
    """The loss of each pair [P] from the rewards over beta [P]."""
    return smoothed_sigmoid(config.beta * (chosen - rejected) - config.gamma, config.label_smoothing)


class SimPOObjective:
    """SimPO over pairs. Metrics: those of `_pairs.pair_metrics`."""

    needs_reference = False

    def __init__(self, config: SimPO) -> None:
        self.config = config

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight`, the sum of its pairs' weights, is what it sums over."""
        config = self.config
        logprobs = policy.token_stats(batch).logprobs
        if not batch.branches:  # a placeholder of a rank without pairs
            return Loss(logprobs.sum())
        answers = Answers.of(logprobs, batch)
        chosen, rejected = (reward(mean, config.alpha) for mean in answers.means)
        total = (batch.extras["weights"] * simpo(chosen, rejected, config)).sum()
        if config.sft_weight:
            total = total + config.sft_weight * chosen_nll(answers, batch).sum()
        return Loss(total, pair_metrics(config.beta * chosen, config.beta * rejected, answers, batch))


build = SimPOObjective
"""What `objective: simpo` builds."""
