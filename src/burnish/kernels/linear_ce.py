"""The head: hidden states at trained positions -> statistics of the targets, without ever holding all logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class TokenStats:
    """What the head says about each trained prediction. All [K], fp32, differentiable but for `correct`.

    `mean_logit` (the mean of the logits over the vocabulary) makes label smoothing, `logsumexp` the z-loss; both are None unless asked.
    """

    logprobs: torch.Tensor
    logsumexp: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None  # bool [K]: the argmax is the target; no gradient
