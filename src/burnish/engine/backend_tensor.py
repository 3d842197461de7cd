"""Ranks that share the weights of every layer: what they say to each other, and what becomes of their gradients.

`models/tensor.py` cuts the layers. Every rank of a group computes the gradient of the one loss that all of them have, and each parameter
is one of three kinds:

    cut        a part on each rank, with the whole gradient of that part        mean over the ranks that have the same part
    whole      the same on every rank, with the whole gradient                  mean over all ranks
    partial    the same on every rank, with a part of the gradient              sum over the group, mean over the groups
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from burnish.engine.backend_collectives import average_gradients, gather_objects, gather_parts, gradient_norm, group_of, total
from burnish.engine.backend_weights import replaced
from burnish.engine.grid import Grid
from burnish.engine.parts import Part
from burnish.models.tensor import Cuts

__all__ = ["Cut", "TensorGroup"]


class TensorGroup:
    """The ranks that share this rank's layers. All ranks of the run must make theirs at the same time.

    Args:
        grid: How the ranks are laid out.
        timeout: After which a collective gives up.

    Attributes:
        rank: This rank's place, which is that of its parts.
        size: How many they are.
    """

    def __init__(self, grid: Grid, timeout: timedelta | None = None) -> None:
        self.rank, self.size = grid.tensor_rank, grid.tensor
        self.group = group_of(grid.tensor_groups, grid.rank, timeout=timeout)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, which all ranks have; in the backward pass the sum of all ranks' gradients."""
        return _Spread.apply(x, self.group, self.size)  # pyright: ignore[reportUnknownMemberType, reportReturnType]

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`; in the backward pass the gradient as it is."""
        return _Total.apply(x, self.group, self.size)  # pyright: ignore[reportUnknownMemberType, reportReturnType]


class Cut:
    """A model whose layers are cut: the parts of its trained weights, their gradients, and the way back to whole ones.

    Args:
        model: Cut.
        cuts: What was cut.
        group: The ranks that share it.
        grid: How the ranks are laid out.
        device: Where they compute.
    """

    def __init__(self, model: nn.Module, cuts: Cuts, group: TensorGroup, grid: Grid, device: torch.device) -> None:
        self.is_main = grid.rank == 0
        self.shard, self.shards, self.replica = group.rank, group.size, grid.data_rank
        named = dict(model.named_parameters())
        self.layout = {name: self._part(named[name], dim) for name, dim in cuts.dims.items()}
        self._model, self._device, self._grid, self._group = model, device, grid, group.group
        self._dims = {named[name]: dim for name, dim in cuts.dims.items()}
        self._partial = {named[name] for name in cuts.partial}
        self._equals = group_of(grid.equal_groups, grid.rank)
        # Of their own, so that a thread that saves does not meet what the training sends.
        self._hosts = group_of(grid.tensor_groups, grid.rank, backend="gloo")
        self._everyone: Any = dist.new_group(backend="gloo")

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by the whole one of its parameter, or its part of it, as the mean over the groups."""
        for parameter in parameters:
            if parameter in self._partial and parameter.grad is not None:
                parameter.grad *= self.shards
        average_gradients([p for p in parameters if p not in self._dims], self._grid.world_size)
        if self._grid.data_world_size > 1:
            average_gradients([p for p in parameters if p in self._dims], self._grid.data_world_size, self._equals)

    def norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The norm of all gradients: of each part, and of each whole one once."""
        kinds = [p for p in parameters if p in self._dims], [p for p in parameters if p not in self._dims]
        cut, whole = (gradient_norm(kind).to(self._device).double().square() for kind in kinds)
        dist.all_reduce(cut, group=self._group)
        return (cut + whole).sqrt()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, by a way that a thread may use while the model trains."""
        return gather_objects(value, self._everyone)

    def whole(self, frozen: bool) -> AbstractContextManager[None]:
        """Inside, the model of rank 0 has whole weights in the host's memory: the trained ones, and the `frozen` ones too if wanted."""
        return replaced(self._model, self._gathered, frozen=frozen)

    def _gathered(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The whole tensor on rank 0, of one that is cut."""
        if self.replica or parameter not in self._dims:
            return None
        parts = gather_parts(parameter.detach().cpu().contiguous(), self._hosts, self.shards, first=self.is_main)
        return torch.cat(parts, dim=self._dims[parameter]) if parts else None

    def _part(self, local: nn.Parameter, dim: int) -> Part:
        size = local.shape[dim]
        shape = (*local.shape[:dim], size * self.shards, *local.shape[dim + 1 :])
        return Part(shape, self.shard * size, (self.shard + 1) * size, dim)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, size: int) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        return total(gradients[0], ctx.group, ctx.size), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor, group: Any, size: int) -> torch.Tensor:
        return total(x, group, size)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        _ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None
