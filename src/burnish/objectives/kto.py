"""KTO: learn from answers that are judged good or bad, each by itself (2402.01306, equations 7 and 8).

    r    = log pi(y|x) - log ref(y|x)                                    the log-ratio of an answer
    z0   = max(0, mean over the step of log pi(y'|x) - log ref(y'|x))    y' is the answer to another prompt of the step
    loss = desirable_weight   (1 - sigma(beta (r - z0)))                 for a good answer
           undesirable_weight (1 - sigma(beta (z0 - r)))                 for a bad one

z0 estimates the KL divergence of the policy from the reference, and has no gradient. It is taken over all micro-batches and ranks of a step
before the first loss, so it does not depend on how the step is cut. `apo_zero` is the same with z0 = 0 (2408.06266, unpaired).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from burnish.config.objectives import KTO
from burnish.core.errors import TrainingError
from burnish.data.select import keep_branches
from burnish.data.types import Batch
from burnish.objectives._pairs import distance
from burnish.objectives.base import Loss, Policy, Totals, branch_sums, reference_logprobs


def kto(logratio: torch.Tensor, good: torch.Tensor, baseline: torch.Tensor | float, config: KTO) -> torch.Tensor:
    """The loss of each answer [E].

    Args:
        logratio: [E] summed log-ratio of policy and reference.
        good: [E] 1 for a good answer, 0 for a bad one.
        baseline: The step's z0; 0 for `apo_zero`.
        config: Weights and beta.
    """
    weight = torch.where(good > 0, config.desirable_weight, config.undesirable_weight)
    return weight * (1 - torch.sigmoid((2 * good - 1) * config.beta * (logratio - baseline)))


@dataclass(frozen=True, slots=True)
class _Own:
    """A micro-batch without its mismatched answers, and the reference's log-probabilities of what is left [K]."""

    batch: Batch
    reference: torch.Tensor


class KTOObjective:
    """KTO over judged answers.

    Metrics: `reward_chosen` and `reward_rejected` (beta times the log-ratio of good and of bad answers), `logp_chosen`, `logp_rejected`,
    `reward_accuracy` (the share of answers whose log-ratio is on the right side of z0, a tie counts half), `baseline` (z0), and `kl` as
    for DPO.
    """

    needs_reference = True

    def __init__(self, config: KTO) -> None:
        self.config = config
        self._own: dict[int, _Own] = {}
        self._baseline = 0.0

    def begin_step(self, policy: Policy, batches: Sequence[Batch], totals: Totals) -> None:
        """Computes z0 without gradients. The reference's pass serves the answers themselves as well, where it is not known already."""
        self._own, self._baseline = {}, 0.0
        if self.config.loss == "apo_zero":
            return
        amount, count = 0.0, 0.0
        for batch in batches:
            mine, ratios = self._split(policy, batch)
            self._own[id(batch)] = mine
            amount, count = amount + float(ratios.sum()), count + len(ratios)
        amount, count = totals({"baseline": (amount, count)})["baseline"]
        self._baseline = max(0.0, amount / count) if count else 0.0

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight` is the weight of its answers.

        Raises:
            TrainingError: the micro-batch is a part of a step that `begin_step` has not seen.
        """
        if self.config.loss == "kto" and id(batch) not in self._own:
            if batch.weight != batch.step_weight:
                raise TrainingError("kto compares with the mean over the whole step, so begin_step must see all its micro-batches first")
            self.begin_step(policy, [batch], dict)
        own = self._own.pop(id(batch), None)
        batch, reference = (own.batch, own.reference) if own else (batch, reference_logprobs(policy, batch))
        logprobs = policy.token_stats(batch).logprobs
        ratio = branch_sums(batch.token_weights * (logprobs - reference), batch)
        losses = kto(ratio, batch.extras["values"], self._baseline, self.config)
        metrics = self._metrics(ratio.detach(), branch_sums(batch.token_weights * logprobs.detach(), batch), batch)
        return Loss((batch.extras["weights"] * losses).sum(), metrics | distance(logprobs, reference))

    def _split(self, policy: Policy, batch: Batch) -> tuple[_Own, torch.Tensor]:
        """The answers themselves, and the log-ratio of each mismatched one [E]; none where the step has one answer only."""
        if len(batch.branches) == batch.examples:
            return _Own(batch, reference_logprobs(policy, batch)), batch.token_weights[:0]
        first = [place % 2 == 0 for place in range(len(batch.branches))]
        mine, other = keep_branches(batch, first), keep_branches(batch, [not own for own in first])
        with torch.no_grad():
            theirs = policy.token_stats(other).logprobs
            both = reference_logprobs(policy, batch)
        is_own = np.repeat(first, batch.branches)
        own, mismatched = (torch.as_tensor(np.flatnonzero(side)).to(both.device) for side in (is_own, ~is_own))
        return _Own(mine, both[own]), branch_sums(other.token_weights * (theirs - both[mismatched]), other)

    def _metrics(self, ratio: torch.Tensor, logp: torch.Tensor, batch: Batch) -> dict[str, tuple[torch.Tensor, float]]:
        good = batch.extras["values"]
        side = (2 * good - 1) * (ratio - self._baseline)
        right = (side > 0).float() + 0.5 * (side == 0).float()
        found = {"reward_accuracy": (right.sum(), float(batch.examples)), "baseline": (logp.new_tensor(self._baseline), 1.0)}
        for name, label in (("chosen", 1.0), ("rejected", 0.0)):
            if count := sum(value == label for value in batch.values):
                mine = (good == label).float()
                found[f"reward_{name}"] = (self.config.beta * (mine * ratio).sum(), float(count))
                found[f"logp_{name}"] = ((mine * logp).sum(), float(count))
        return found


build = KTOObjective
"""What `objective: kto` builds."""
