"""Weights of which each rank has a part: which part that is, and what can be done with all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Held", "Part", "Writing", "local_part"]


@dataclass(frozen=True, slots=True)
class Part:
    """What lies between `start` and `stop` along the dimension `dim` of a tensor of `shape`."""

    shape: tuple[int, ...]
    start: int
    stop: int
    dim: int = 0

    @property
    def size(self) -> tuple[int, ...]:
        """Its own shape."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])


class Writing(Protocol):
    """Ranks that write a checkpoint together (satisfied by `Copies`, and by what holds weights in parts)."""

    is_main: bool
    shard: int
    """This rank's place among those that write one copy of the weights together."""
    shards: int
    """How many those are."""
    replica: int
    """Which of the copies is this rank's; the first one is written."""
    layout: dict[str, Part]
    """This rank's part of each weight, of the trained ones at least; one that is not in it is whole, and the same on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, by a way that a thread may use while the model trains."""
        ...


class Held(Writing, Protocol):
    """Trained weights that lie on several ranks in parts (satisfied by `Sharding` and by `Cut`)."""

    def average(self, parameters: Sequence[nn.Parameter], /) -> None:
        """Replaces the gradients of all trained parameters by this rank's parts of their means over the ranks."""
        ...

    def norm(self, parameters: Sequence[nn.Parameter], /) -> torch.Tensor:
        """The norm of all gradients, from this rank's parts."""
        ...

    def whole(self, frozen: bool) -> AbstractContextManager[None]:
        """Inside, the model on rank 0 has its weights whole: the trained ones, and the `frozen` ones too if wanted."""
        ...


def local_part(layout: Mapping[str, Part], name: str) -> Part | None:
    """The part that this rank has of a trained weight, or of the reference's copy of it; None where it has all of it."""
    return layout.get(name.removeprefix("reference/"))
