"""Contrastive preference optimisation: DPO with a uniform reference, and cross-entropy on the chosen answers (2401.08417, equation 3).

d    = log pi(y+) - log pi(y-)        sums over tokens; for `ipo` means
loss = l(d) + sft_weight nll(y+)      nll: the mean over the step's chosen tokens
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from burnish.config.objectives import CPO
from burnish.objectives._pairs import Answers, PairObjective, smoothed_sigmoid


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


class CPOObjective(PairObjective):
    """CPO over pairs; the reward is beta times the log-probability, of the answer or for `ipo` of a token."""

    def __init__(self, config: CPO) -> None:
        self.config, self.beta = config, config.beta
        self.sft_weight = config.sft_weight

    def rewards(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, of answers or for `ipo` of a token."""
        return answers.means if self.config.loss == "ipo" else (answers.chosen, answers.rejected)

    def losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """The chosen variant of the difference."""
        return LOSSES[self.config.loss](chosen - rejected, self.config)


build = CPOObjective
"""What `objective: cpo` builds."""
