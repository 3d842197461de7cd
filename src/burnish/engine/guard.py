"""A look at the first gradients: is everything that should learn, learning?

A parameter that is trained in name but gets no gradient (cut off by a patch, a wrong target, a frozen path) does not fail, it only makes
the result worse. So every trained parameter must have got a finite, non-zero gradient within the first steps. What is zero by
construction is told apart:

- one matrix of a LoRA pair while the other one is still all zero: the gradient of A is B^T (...), and B starts at zero;
- experts of a mixture that saw no token yet, and rows of new tokens that did not occur: counted and reported, not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from burnish.core.errors import TrainingError

__all__ = ["GradientGuard", "GuardReport"]

_EXPERT = re.compile(r"(experts?)\.\d+\.")
_NEW_TOKENS = re.compile(r"trainable_tokens")


@dataclass(slots=True)
class GuardReport:
    """What the guard found when it was done."""

    parameters: int = 0
    idle_experts: list[str] = field(default_factory=list)
    """Expert parameters that saw no token while others of their layer did."""
    idle_tokens: list[str] = field(default_factory=list)
    """Embeddings of new tokens that did not occur."""


class GradientGuard:
    """Watches the first updates. Call `look` with finite gradients in place, before the optimiser moves anything.

    Args:
        named_parameters: The trained parameters by full name.
        patience: After this many looks what is zero by construction is no longer waited for (a run with a rate of 0 never moves B).
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], *, patience: int = 10) -> None:
        self._parameters = dict(named_parameters)
        self._waiting = dict(named_parameters)
        self._looks = 0
        self._patience = patience
        self.report = GuardReport(parameters=len(named_parameters))

    @property
    def done(self) -> bool:
        """True when there is nothing more to look for."""
        return not self._waiting

    def look(self) -> None:
        """Checks the gradients in place.

        Raises:
            TrainingError: parameters that must have a gradient have none, by name.
        """
        if self.done:
            return
        self._looks += 1
        self._waiting = {name: self._waiting[name] for name in self._without_gradient()}
        silent = [name for name in self._waiting if not self._is_zero_by_construction(name)]
        experts = [name for name in self._waiting if self._has_busy_sibling(name)]
        tokens = [name for name in silent if _NEW_TOKENS.search(name)]
        missing = [name for name in silent if name not in experts and name not in tokens]
        if missing:
            raise TrainingError(
                f"{len(missing)} of {self.report.parameters} trained parameters got no gradient in update {self._looks}: {_some(missing)}",
                hint="they cannot learn: take them out of the trained ones, or look for what cuts them off from the loss",
            )
        settled = set(experts) | set(tokens)
        # The first look cannot settle anything for good: what idles there may wake up in the second.
        if self._looks >= 2 and (settled >= set(self._waiting) or self._looks >= self._patience):
            self.report.idle_experts, self.report.idle_tokens = sorted(experts), sorted(tokens)
            self._waiting = {}

    def _without_gradient(self) -> list[str]:
        names = list(self._waiting)
        with_gradient = [name for name in names if self._waiting[name].grad is not None]
        if not with_gradient:
            return names
        # One transfer for all of them.
        largest = torch.stack([self._waiting[name].grad.detach().abs().max().float().cpu() for name in with_gradient])  # pyright: ignore[reportOptionalMemberAccess]
        seen = {name for name, value in zip(with_gradient, largest.tolist(), strict=True) if value > 0}
        return [name for name in names if name not in seen]

    def _is_zero_by_construction(self, name: str) -> bool:
        other = _other_of_pair(name)
        partner = self._parameters.get(other) if other else None
        return partner is not None and not bool(torch.count_nonzero(partner.detach()))

    def _has_busy_sibling(self, name: str) -> bool:
        if not _EXPERT.search(name):
            return False
        family = _EXPERT.sub(r"\1.*.", name)
        return any(_EXPERT.sub(r"\1.*.", other) == family and other not in self._waiting for other in self._parameters)


def _other_of_pair(name: str) -> str | None:
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if a in name:
            return name.replace(a, b)
        if b in name:
            return name.replace(b, a)
    return None


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
