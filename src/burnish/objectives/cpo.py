"""Contrastive preference optimisation: DPO with a uniform reference, and cross-entropy on the chosen answers (2401.08417, equation 3).

d    = log pi(y+) - log pi(y-)        sums over tokens; for `ipo` means
loss = l(d) + sft_weight nll(y+)      nll: the mean over the step's chosen tokens
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from burnish.config.objectives import CPO
from burnish.data.types import Batch
from burnish.objectives._pairs import Answers, chosen_nll, pair_metrics, smoothed_sigmoid
from burnish.objectives.base import Loss, Policy


def sigmoid(difference: torch.Tensor, config: CPO) -> torch.Tensor:
    """-log sigma(beta d), with label smoothing."""
    return smoothed_sigmoid(config.beta * difference, config.label_smoothing)


def hinge(difference: torch.Tensor, config: CPO) -> torch.Tensor:
    """The hinge max(0, 1 - beta d) (2305.10425)."""
    return torch.relu(1 - config.beta * difference)


def ipo(difference: torch.Tensor, config: CPO) -> torch.Tensor:
    """IPO's square (d - 1 / (2 beta))^2 (2310.12036, equation 17)."""
    return (difference - 1 / (2 * config.beta)).square()


LOSSES: dict[str, Callable[[torch.Tensor, CPO], torch.Tensor]] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}


class CPOObjective:
    """CPO over pairs. Metrics: those of `_pairs.pair_metrics`; the reward is beta times the (mean) log-probability."""

    needs_reference = False

    def __init__(self, config: CPO) -> None:
        self.config = config

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight`, the sum of its pairs' weights, is what it sums over."""
        config = self.config
        logprobs = policy.token_stats(batch).logprobs
        if not batch.branches:  # a placeholder of a rank without pairs
            return Loss(logprobs.sum())
        answers = Answers.of(logprobs, batch)
        chosen, rejected = answers.means if config.loss == "ipo" else (answers.chosen, answers.rejected)
        total = (batch.extras["weights"] * LOSSES[config.loss](chosen - rejected, config)).sum()
        if config.sft_weight:
            total = total + config.sft_weight * chosen_nll(answers, batch).sum()
        return Loss(total, pair_metrics(config.beta * chosen, config.beta * rejected, answers, batch))


build = CPOObjective
"""What `objective: cpo` builds."""
