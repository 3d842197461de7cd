"""ORPO: cross-entropy on the chosen answers plus the log odds ratio of the two (2403.07691, equations 4, 6 and 7). No reference.

    p(y)    = exp(log pi(y) / |y|)                       the mean log-probability of a token
    odds(y) = p(y) / (1 - p(y))
    loss    = nll(y+) - beta log sigma(log odds(y+) - log odds(y-))

nll is the mean over the tokens of the step's chosen answers; prompts are not trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from burnish.config.objectives import ORPO
from burnish.objectives._pairs import Answers, PairObjective


def log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, exact at both ends: by expm1 near zero, by log1p of a small power far from it (Maechler, 2012)."""
    near = x > -math.log(2)
    # Each branch gets numbers that are harmless to it, or the gradient of the branch not taken would be NaN.
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)


def log_odds(mean_logprob: torch.Tensor) -> torch.Tensor:
    """The log odds, log p - log(1 - p), of answers [P] from the mean log-probability of a token [P].

    Where it rounds to 0, the answer is certain and its odds have no end: they are taken a rounding away from that. The gradient stays
    1 / (1 - p), which that of log p with regard to the logits, of the order of 1 - p, makes finite again.
    """
    x = mean_logprob + (mean_logprob.clamp(max=-torch.finfo(mean_logprob.dtype).eps) - mean_logprob).detach()
    return x - log_one_minus_exp(x)


def odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigma(log odds(y+) - log odds(y-)) of each pair [P], from mean log-probabilities [P], each at most 0."""
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


class ORPOObjective(PairObjective):
    """ORPO over pairs; the reward is beta times the mean log-probability."""

    sft_weight = 1.0

    def __init__(self, config: ORPO) -> None:
        self.config, self.beta = config, config.beta

    def rewards(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean log-probabilities."""
        return answers.means

    def losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Beta times `odds_ratio`."""
        return self.beta * odds_ratio(chosen, rejected)


build = ORPOObjective
"""What `objective: orpo` builds."""
