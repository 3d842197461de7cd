"""Supervised fine-tuning: make the trained tokens likely.

For one trained token with log-probability logp, over a vocabulary of V with logits z:

    nll      = -logp
    smoothed = (1 - e) nll + e (lse(z) - mean(z))      the second term is the mean over v of -log p_v: label smoothing (1512.00567)
    loss     = w (smoothed + c lse(z)^2)               the last term keeps logits from drifting: z-loss (PaLM, 2204.02311, section 5)

e is `label_smoothing`, c is `z_loss`, w is the token's weight. The engine divides the sum by the sum of w over the whole step, so every
token counts the same however the examples are cut into micro-batches.
"""

from __future__ import annotations

import torch

from burnish.config.objectives import SFT
from burnish.data.types import Batch
from burnish.objectives.base import Loss, Policy


def sft(
    logprobs: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    logsumexp: torch.Tensor | None = None,
    mean_logit: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The weighted loss of each trained token, [K].

    Args:
        logprobs: [K] log-probability of each target.
        token_weights: [K] weight of each target, 0 or more.
        logsumexp: [K] log-sum-exp of the logits; needed for label smoothing and z-loss.
        mean_logit: [K] mean of the logits; needed for label smoothing.
        label_smoothing: Share of the target's probability spread evenly over the vocabulary.
        z_loss: Weight of the squared log-sum-exp.

    Raises:
        ValueError: A statistic that the settings need is missing.
    """
    loss = -logprobs
    if label_smoothing:
        if logsumexp is None or mean_logit is None:
            raise ValueError("label smoothing needs logsumexp and mean_logit")
        loss = (1 - label_smoothing) * loss + label_smoothing * (logsumexp - mean_logit)
    if z_loss:
        if logsumexp is None:
            raise ValueError("z-loss needs logsumexp")
        loss = loss + z_loss * logsumexp.square()
    return token_weights * loss


class SFTObjective:
    """Cross-entropy on the trained tokens.

    Metrics: `nll` is the plain, weighted negative log-likelihood (what perplexity is made of, whatever the smoothing), `accuracy` the
    share of trained tokens that are the model's first choice, `entropy` (on request) the mean entropy of its predictions.
    NEFTune noise belongs to the model's input: `Policy.noise(config.neftune_alpha)` switches it on.
    """

    needs_reference = False

    def __init__(self, config: SFT, *, entropy: bool = False) -> None:
        self.config = config
        want = {"correct"}
        if self.config.label_smoothing:
            want |= {"logsumexp", "mean_logit"}
        if self.config.z_loss:
            want.add("logsumexp")
        if entropy:
            want.add("entropy")
        self._want = frozenset(want)

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight` is what it sums over."""
        stats = policy.token_stats(batch, want=self._want)
        losses = sft(
            stats.logprobs,
            batch.token_weights,
            logsumexp=stats.logsumexp,
            mean_logit=stats.mean_logit,
            label_smoothing=self.config.label_smoothing,
            z_loss=self.config.z_loss,
        )
        count = float(batch.targets.shape[0])
        metrics = {"nll": (-(batch.token_weights * stats.logprobs.detach()).sum(), batch.weight)}
        if stats.correct is not None:
            metrics["accuracy"] = (stats.correct.sum(), count)
        if stats.entropy is not None:
            metrics["entropy"] = (stats.entropy.detach().sum(), count)
        return Loss(losses.sum(), metrics)


build = SFTObjective
"""What `objective: sft` builds."""
