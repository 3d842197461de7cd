"""What an objective is: a function of log-probabilities that returns a sum, never a mean.

    Objective(policy, batch) -> Loss(sum, metrics)

The engine alone divides: `sum x ranks / step_weight`, so gradient accumulation and data parallelism are exact for every objective.
Objectives see the model only through the `Policy` protocol and can be tested with ten numbers and a fake policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from burnish.data.types import Batch
from burnish.kernels.linear_ce import TokenStats

__all__ = ["Loss", "Objective", "Policy", "StepObjective", "TokenStats", "Totals", "branch_sums", "reference_logprobs"]


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


Totals = Callable[[Mapping[str, tuple[float, float]]], dict[str, tuple[float, float]]]
"""Adds (sum, count) pairs over the ranks, key by key (`Backend.sums`)."""


@runtime_checkable
class StepObjective(Protocol):
    """An objective whose loss of one example depends on all examples of the step."""

    def begin_step(self, policy: Any, batches: Sequence[Batch], totals: Totals) -> None:
        """Called with all micro-batches of a step on this rank (or of a whole evaluation), on the device, before the first loss."""
        ...


def branch_sums(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sum of values [K] over the predictions of each branch [B], in a fixed order of additions and without waiting for the device.

    In float64, where the device has it: preferences are learnt from small differences of long sums, whose last digit in float32 would show.
    """
    wide = values.dtype if values.device.type == "mps" else torch.float64
    return torch.segment_reduce(values.to(wide), "sum", lengths=batch.extras["lengths"], unsafe=True)


def reference_logprobs(policy: Policy, batch: Batch) -> torch.Tensor:
    """The reference model's log-probability of each target [K]: computed before the run, or else now, without gradients."""
    known = batch.extras.get("reference")
    if known is not None:
        return known
    with policy.reference():
        return policy.token_stats(batch).logprobs
