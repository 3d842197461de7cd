"""Ranks that share the tokens of every micro-batch: their process group, and its two collectives as differentiable functions.

    exchange    piece s of each rank's tensor goes to rank s             gradient: the exchange again, which is its own transpose
    gather      every rank gets all ranks' tensors, in rank order        gradient: the sum of all ranks' gradients for the own part

Both gradients are those of the sum of all ranks' losses (`engine.grid` says what becomes of that).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from burnish.engine.backend_collectives import added, all_gather, all_to_all, group_of
from burnish.engine.grid import Grid

__all__ = ["ContextGroup"]


class ContextGroup:
    """The ranks that share this rank's micro-batches. All ranks of the run must make theirs at the same time.

    Args:
        grid: How the ranks are laid out.
        timeout: After which a collective gives up.

    Attributes:
        rank: This rank's place, which is that of its tokens.
        size: How many they are.
    """

    def __init__(self, grid: Grid, timeout: timedelta | None = None) -> None:
        self.rank, self.size = grid.context_rank, grid.context
        self._group = group_of(grid.context_groups, grid.rank, timeout=timeout)

    def exchange(self, pieces: torch.Tensor) -> torch.Tensor:
        """[N, ...], piece s for rank s -> [N, ...], piece s from rank s. Differentiable."""
        return _Exchange.apply(pieces, self._group)  # pyright: ignore[reportUnknownMemberType, reportReturnType]

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each rank, equally many on all -> [N n, ...]. Differentiable."""
        return _Gather.apply(part, self._group, self.size)  # pyright: ignore[reportUnknownMemberType, reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return all_to_all(pieces, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_to_all(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any, size: int) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        return all_gather(part, group, size)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        return added(gradients[0].unflatten(0, (ctx.size, -1)), ctx.group), None, None
