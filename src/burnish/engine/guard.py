"""A look at the first gradients: is everything that should learn, learning?

A parameter that is trained in name but gets no gradient (cut off by a patch, a wrong target, a frozen path) does not fail, it only makes
the result worse. So every trained parameter must have got a finite, non-zero gradient within the first steps. What is zero by
construction is told apart:

- one matrix of a LoRA pair while the other one is still all zero: the gradient of A is B^T (...), and B starts at zero;
- experts of a mixture that saw no token yet, and rows of new tokens that did not occur: counted and reported, not refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
        over_ranks: Gives the largest of each value over the ranks, where these hold parts of the same parameters.
        patience: After this many looks what is zero by construction is no longer waited for (a run with a rate of 0 never moves B).
    """

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        *,
        over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        patience: int = 10,
    ) -> None:
        self._parameters = dict(named_parameters)
        self._waiting = dict(named_parameters)
        self._looks = 0
        self._over_ranks = over_ranks
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
        zeros = self._zeros()
        silent = [name for name in self._waiting if name not in zeros]
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
        gradients = [parameter.grad for parameter in self._waiting.values()]
        return [name for name, seen in zip(self._waiting, self._any(gradients), strict=True) if not seen]

    def _zeros(self) -> set[str]:
        """The names of parameters that are zero by construction, because they are one of a pair and the other one is still all zero."""
        pairs = {name: _other_of_pair(name) for name in self._waiting}
        partners = sorted({other for other in pairs.values() if other in self._parameters})
        at_work = self._any([self._parameters[other].detach() for other in partners])
        idle = {other for other, any_value in zip(partners, at_work, strict=True) if not any_value}
        return {name for name, other in pairs.items() if other in idle}

    def _any(self, tensors: Sequence[torch.Tensor | None]) -> list[bool]:
        """Whether each tensor has an element other than zero, on any rank. One transfer for all of them."""
        if not tensors:
            return []
        largest = [tensor.detach().abs().max().float() if tensor is not None and tensor.numel() else None for tensor in tensors]
        zero = torch.zeros(())
        return [value > 0 for value in self._over_ranks(torch.stack([(zero if x is None else x).cpu() for x in largest])).tolist()]

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
