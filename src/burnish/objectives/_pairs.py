"""What the objectives over pairs have in common: the two answers of each pair, and how a pair is measured.

Branches alternate in a batch: 2p is the chosen answer of pair p, 2p + 1 the rejected one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from burnish.data.types import Batch
from burnish.objectives.base import Loss, Policy, branch_sums

Metrics = dict[str, tuple[torch.Tensor, float]]


def split(branches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen [P] and rejected [P] of one number for each branch [2P]."""
    return branches[0::2], branches[1::2]


@dataclass(frozen=True, slots=True)
class Answers:
    """The log-probabilities of a micro-batch's answers: sums over each answer's tokens [P], and how many tokens these are [P]."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @classmethod
    def of(cls, logprobs: torch.Tensor, batch: Batch) -> Answers:
        """From the log-probability of every target [K], each times its token's weight."""
        sums = split(branch_sums(batch.token_weights * logprobs, batch))
        tokens = split(branch_sums(batch.token_weights.to(logprobs.dtype), batch))
        return cls(*sums, *tokens)

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean log-probability of a token in the chosen and in the rejected answer, [P] each."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def chosen_nll(answers: Answers, batch: Batch) -> torch.Tensor:
    """Each pair's share [P] of the cross-entropy of the chosen answers, a mean over all their tokens in the step.

    The engine divides the sum by the step's weight, so it is scaled by weight over tokens of the step: the outcome does not depend on the
    cut into micro-batches.

    Raises:
        ValueError: The batch does not say how much the step's chosen tokens weigh.
    """
    if not batch.step_tokens > 0:
        raise ValueError(f"a mean over the step's chosen tokens needs their weight, found step_tokens={batch.step_tokens:g}")
    return -answers.chosen * (batch.step_weight / batch.step_tokens)


class PairObjective(ABC):
    """An objective whose rewards and losses are functions of the answers' log-probabilities alone: no reference.

    Metrics: those of `pair_metrics`.
    """

    needs_reference = False
    beta: float
    """Scale of the rewards."""
    sft_weight = 0.0
    """Weight of the cross-entropy on the chosen answers (`chosen_nll`)."""

    @abstractmethod
    def rewards(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards of chosen and rejected answers over beta, [P] each."""

    @abstractmethod
    def losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """The loss of each pair [P] from these."""

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight`, the sum of its pairs' weights, is what it sums over."""
        logprobs = policy.token_stats(batch).logprobs
        if not batch.branches:  # a placeholder of a rank without pairs
            return Loss(logprobs.sum())
        answers = Answers.of(logprobs, batch)
        chosen, rejected = self.rewards(answers)
        total = (batch.extras["weights"] * self.losses(chosen, rejected)).sum()
        if self.sft_weight:
            total = total + self.sft_weight * chosen_nll(answers, batch).sum()
        return Loss(total, pair_metrics(self.beta * chosen, self.beta * rejected, answers, batch))


def smoothed_sigmoid(z: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigma(z) - e log sigma(-z)."""
    loss = -F.logsigmoid(z)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * F.logsigmoid(-z)


def pair_metrics(chosen_reward: torch.Tensor, rejected_reward: torch.Tensor, answers: Answers, batch: Batch) -> Metrics:
    """How well the pairs are told apart, as (sum, count).

    `reward_accuracy` is the share of pairs whose chosen answer has the larger reward, a tie counts half. `accuracy_longer` and
    `accuracy_shorter` are the same among pairs whose chosen answer has more tokens than the rejected one, and fewer: far apart, they say
    that length is judged and not content.

    Args:
        chosen_reward: [P] implicit reward, or score.
        rejected_reward: The same of the rejected answers.
        answers: For `logp_chosen` and `logp_rejected`, summed over each answer.
        batch: The micro-batch.
    """
    chosen_reward, rejected_reward = chosen_reward.detach(), rejected_reward.detach()
    pairs = float(batch.examples)
    metrics = preferred(chosen_reward, rejected_reward, batch)
    metrics |= {
        "reward_chosen": (chosen_reward.sum(), pairs),
        "reward_rejected": (rejected_reward.sum(), pairs),
        "reward_margin": ((chosen_reward - rejected_reward).sum(), pairs),
        "logp_chosen": (answers.chosen.detach().sum(), pairs),
        "logp_rejected": (answers.rejected.detach().sum(), pairs),
    }
    return metrics


def preferred(chosen: torch.Tensor, rejected: torch.Tensor, batch: Batch) -> Metrics:
    """The accuracies of `pair_metrics` alone."""
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    metrics: Metrics = {"reward_accuracy": (right.sum(), float(batch.examples))}
    own, other = split(batch.extras["lengths"])
    counts = list(zip(batch.branches[0::2], batch.branches[1::2], strict=True))
    # How many there are is known on the host, which ones on the device: nobody waits for either.
    for name, among, count in (
        ("accuracy_longer", own > other, sum(mine > theirs for mine, theirs in counts)),
        ("accuracy_shorter", own < other, sum(mine < theirs for mine, theirs in counts)),
    ):
        if count:
            metrics[name] = ((right * among).sum(), float(count))
    return metrics


def distance(logprobs: torch.Tensor, reference: torch.Tensor) -> Metrics:
    """`kl`: an estimate of the KL divergence of the policy from the reference, a token, on the answers of the data.

    The mean of (log pi - log pi_ref)^2 / 2 over the trained tokens: never negative, zero where both agree, and right to second order
    (k2 in Schulman, "Approximating KL divergence", 2020). The answers are not the policy's own, so it tells how far it has gone, not more.
    """
    return {"kl": ((logprobs.detach() - reference).square().sum() / 2, float(len(logprobs)))}
