"""Ranks that share the tokens of every micro-batch: their process group, and its two collectives as differentiable functions.

    exchange    piece s of each rank's tensor goes to rank s             gradient: the exchange again, which is its own transpose
    gather      every rank gets all ranks' tensors, in rank order        gradient: the sum of all ranks' gradients for the own part

Both gradients are those of the sum of all ranks' losses (`engine.grid` says what becomes of that).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from burnish.engine.grid import Grid

__all__ = ["ContextGroup"]

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name


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
        # Every rank takes part in making every group.
        self._group: Any = {tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in grid.context_groups}[_mine(grid)]

    def exchange(self, pieces: torch.Tensor) -> torch.Tensor:
        """[N, ...], piece s for rank s -> [N, ...], piece s from rank s. Differentiable."""
        return _Exchange.apply(pieces, self._group)  # pyright: ignore[reportUnknownMemberType, reportReturnType]

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each rank, equally many on all -> [N n, ...]. Differentiable."""
        return _Gather.apply(part, self._group, self.size)  # pyright: ignore[reportUnknownMemberType, reportReturnType]


def _mine(grid: Grid) -> tuple[int, ...]:
    return next(tuple(ranks) for ranks in grid.context_groups if grid.rank in ranks)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(pieces, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_to_all(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any, size: int) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        part = part.contiguous()
        whole = part.new_empty(size * part.shape[0], *part.shape[1:])
        _all_gather(whole, part, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        # A reduction that adds in rank order and in float32, whatever the type is and whatever a backend's own one does.
        found = _all_to_all(gradients[0].unflatten(0, (ctx.size, -1)), ctx.group)
        wide = found.dtype if found.dtype.itemsize > 4 else torch.float32
        return found.sum(dim=0, dtype=wide).to(found.dtype), None, None


def _all_to_all(pieces: torch.Tensor, group: Any) -> torch.Tensor:
    pieces = pieces.contiguous()
    found = torch.empty_like(pieces)
    dist.all_to_all_single(found, pieces, group=group)
    return found
