"""What an objective is: a function of log-probabilities that returns a sum, never a mean.

    Objective(policy, batch) -> Loss(sum, metrics)

The engine alone divides: `sum x world_size / step_weight`, so gradient accumulation and data parallelism are exact for every objective.
Objectives see the model only through the `Policy` protocol and can be tested with ten numbers and a fake policy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from burnish.data.types import Batch
from burnish.kernels.linear_ce import TokenStats

__all__ = ["Loss", "Objective", "Policy", "TokenStats"]


class Policy(Protocol):
    """A trainable model as objectives see it (satisfied by `models.policy.Policy`)."""

    def token_stats(self, batch: Batch, *, want: frozenset[str] = frozenset()) -> TokenStats:
        """Log-probabilities of the batch's targets; `want` names the optional fields of TokenStats to fill."""
        ...

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [T, H], for value and reward heads."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """A context in which the policy answers as the reference model (adapters off, or a frozen copy)."""
        ...


@dataclass(slots=True)
class Loss:
    """A sum over the micro-batch, and metrics as (sum, count) pairs so that they add up exactly over micro-batches and ranks."""

    sum: torch.Tensor  # scalar, differentiable
    metrics: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict[str, tuple[torch.Tensor, float]])


class Objective(Protocol):
    """A training objective. Built from its Config (see config/objectives.py) by `run.py`."""

    needs_reference: bool

    def __call__(self, policy: Any, batch: Batch) -> Loss:
        """The loss of one micro-batch."""
        ...
