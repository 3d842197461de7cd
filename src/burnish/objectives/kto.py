"""KTO: learn from answers that are judged good or bad, each by itself (2402.01306).

With r = sum over an answer's tokens of log p / p_ref, the reward is beta r. Each answer is judged against a baseline z0 (equations 7, 8):

    good    loss = w_good (1 - sigmoid(beta (r - z0)))
    bad     loss = w_bad  (1 - sigmoid(beta (z0 - r)))

z0 estimates the KL divergence of policy and reference: the mean of r over *mismatched* answers, each prompt with the answer of another
example of the step, and not below 0. No gradient goes through it. The mean is over the whole optimiser step on all ranks, so it does not
depend on how the step is cut into micro-batches. A step of one example has nothing to mismatch: there z0 is 0.

`apo_zero` (2408.06266, the unpaired form) is the same with z0 = 0: good answers become likelier than the reference makes them, bad ones
less likely.

The engine divides the sum by the sum of the examples' weights, so good and bad answers are averaged together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from burnish.config.objectives import KTO
from burnish.data.select import keep_branches
from burnish.data.types import Batch
from burnish.objectives.base import Loss, Policy, Totals, branch_sums, reference_logprobs


def kto(
    log_ratios: torch.Tensor,
    good: torch.Tensor,
    z0: float | torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """The loss of each judged answer, [E] (2402.01306, equations 7 and 8).

    Args:
        log_ratios: [E] summed log-ratio of policy and reference, in nats.
        good: [E] 1 (or True) for good answers, 0 for bad ones.
        z0: The baseline, in nats, 0 or more.
        beta: Scale of the reward.
        desirable_weight: Weight of good answers.
        undesirable_weight: Weight of bad answers.
    """
    good = good.to(log_ratios.dtype)
    weight = undesirable_weight + (desirable_weight - undesirable_weight) * good
    return weight * torch.sigmoid(beta * (1 - 2 * good) * (log_ratios - z0))  # 1 - sigmoid(x) = sigmoid(-x)


def apo_zero(
    log_ratios: torch.Tensor, good: torch.Tensor, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> torch.Tensor:
    """The loss of each judged answer, [E], without a baseline (2408.06266, equation 7, for answers that are not in pairs).

    Args:
        log_ratios: As in `kto`, like every argument.
        good: Which answers are good.
        beta: Scale of the reward.
        desirable_weight: Of good answers.
        undesirable_weight: Of bad ones.
    """
    return kto(log_ratios, good, 0.0, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


class KTOObjective:
    """KTO and APO-zero on judged answers.

    Where `needs_mismatched`, every example of a step with more than one brings a second branch, the answer of another example:
    `begin_step` asks for those alone, and the loss computes the own answers alone.

    Metrics: `reward_chosen` and `reward_rejected`, the mean reward beta r of good and of bad answers; `logp_chosen`, `logp_rejected`, the
    mean of their summed log-probabilities; `reward_accuracy`, the share of answers on the right side of the baseline, a
    tie counts half; `kl`, the baseline.
    """

    needs_reference = True

    def __init__(self, config: KTO) -> None:
        self.config = config
        self.needs_mismatched = config.loss == "kto"
        self._z0: float | None = None if self.needs_mismatched else 0.0
        self._own: dict[int, tuple[Batch, Batch]] = {}  # by identity: the batch as given, and its own answers with their reference

    def begin_step(self, policy: Policy, batches: Sequence[Batch], totals: Totals) -> None:
        """Estimates z0 from the mismatched answers of all micro-batches: one pass of the policy, one of the reference, no gradients.

        Every rank makes the same number of passes, placeholders included, for strategies that compute together.

        Raises:
            ValueError: A batch has neither one branch an example nor two.
        """
        self._own.clear()
        if not self.needs_mismatched:
            return
        found = sum(batch.examples for batch in batches if _has_mismatched(batch))
        _, count = totals({"kl": (0.0, float(found))})["kl"]
        self._z0 = 0.0
        if not count:
            return
        shares: list[torch.Tensor] = []
        with torch.no_grad():
            for batch in batches:
                mismatched = self._split(policy, batch)
                reference = reference_logprobs(policy, mismatched)
                ratios = policy.token_stats(mismatched).logprobs - reference
                if _has_mismatched(batch):
                    shares.append((mismatched.token_weights * ratios).sum(dtype=torch.float64))
        amount = float(torch.stack(shares).sum()) if shares else 0.0
        amount, count = totals({"kl": (amount, float(found))})["kl"]
        self._z0 = max(0.0, amount / count)

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight`, the sum of the examples' weights, is what it sums over.

        Raises:
            ValueError: The loss is `kto` and no step was begun.
        """
        if self._z0 is None:
            raise ValueError("kto needs the baseline of the step, expected a call of begin_step before the first loss")
        own = self._own_answers(batch)
        reference = reference_logprobs(policy, own)
        logprobs = policy.token_stats(own).logprobs
        if not own.branches:  # a placeholder
            return Loss(logprobs.sum())
        logp = branch_sums(own.token_weights * logprobs, own)
        log_ratios = logp - branch_sums(own.token_weights * reference, own)
        good = own.extras["values"].to(log_ratios.dtype)
        losses = kto(
            log_ratios,
            good,
            self._z0,
            beta=self.config.beta,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )
        return Loss((own.extras["weights"] * losses).sum(), self._metrics(own, logp.detach(), log_ratios.detach(), good))

    def _metrics(
        self, own: Batch, logp: torch.Tensor, log_ratios: torch.Tensor, good: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, float]]:
        z0, count = self._z0 or 0.0, float(own.examples)
        side = (2 * good - 1) * (log_ratios - z0)
        metrics = {"reward_accuracy": ((side > 0).sum() + 0.5 * (side == 0).sum(), count)}
        rewards = self.config.beta * log_ratios
        right = sum(value > 0.5 for value in own.values)
        for name, mask, answers in (("chosen", good, right), ("rejected", 1 - good, own.examples - right)):
            if answers:
                metrics[f"reward_{name}"] = ((mask * rewards).sum(), float(answers))
                metrics[f"logp_{name}"] = ((mask * logp).sum(), float(answers))
        if self.needs_mismatched:
            metrics["kl"] = (torch.full((), z0 * count, device=logp.device), count)
        return metrics

    def _split(self, policy: Policy, batch: Batch) -> Batch:
        """The mismatched answers, with their reference; own answers are kept for the loss, with theirs.

        Where the reference is not known yet, one pass over the whole tree answers for both.
        """
        known = "reference" in batch.extras
        if known and _has_mismatched(batch):
            return keep_branches(_without_reference(batch), (False, True) * batch.examples)
        whole = batch if known else replace(batch, extras={**batch.extras, "reference": reference_logprobs(policy, batch)})
        if not _has_mismatched(batch):  # a placeholder
            self._own[id(batch)] = batch, whole
            return whole
        self._own[id(batch)] = batch, keep_branches(whole, (True, False) * batch.examples)
        return keep_branches(whole, (False, True) * batch.examples)

    def _own_answers(self, batch: Batch) -> Batch:
        """The batch without mismatched answers."""
        given, own = self._own.get(id(batch), (None, batch))
        if given is batch or not _has_mismatched(batch):
            return own
        own = keep_branches(_without_reference(batch), (True, False) * batch.examples)
        if "reference" in batch.extras:
            own.extras["reference"] = batch.extras["reference"]
        return own


def _has_mismatched(batch: Batch) -> bool:
    """Whether every example has a mismatched answer beside its own.

    Raises:
        ValueError: Some have and some have not, or branches are no answers.
    """
    if len(batch.branches) not in (batch.examples, 2 * batch.examples):
        raise ValueError(f"found {len(batch.branches)} branches of {batch.examples} judged answers, expected one or two of each")
    return len(batch.branches) > batch.examples


def _without_reference(batch: Batch) -> Batch:
    """The reference covers own answers alone, which is not what `keep_branches` cuts."""
    return replace(batch, extras={name: value for name, value in batch.extras.items() if name != "reference"})


build = KTOObjective
"""What `objective: kto` builds."""
