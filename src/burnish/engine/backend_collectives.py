"""Collectives that several strategies are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import nn
from torch.nn.utils import get_total_norm

__all__ = [
    "added",
    "all_gather",
    "all_to_all",
    "average_gradients",
    "gather_objects",
    "gather_parts",
    "gradient_norm",
    "group_of",
    "largest",
    "total",
]

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name


def group_of(groups: Sequence[Sequence[int]], rank: int, **options: Any) -> Any:
    """The process group, of these, that `rank` belongs to. Every rank of the run makes every group."""
    return {place: made for ranks in groups for made in [dist.new_group(list(ranks), **options)] for place in ranks}[rank]


def all_to_all(pieces: torch.Tensor, group: Any) -> torch.Tensor:
    """[N, ...], piece s for rank s -> [N, ...], piece s from rank s."""
    pieces = pieces.contiguous()
    found = torch.empty_like(pieces)
    dist.all_to_all_single(found, pieces, group=group)
    return found


def all_gather(part: torch.Tensor, group: Any, size: int) -> torch.Tensor:
    """[n, ...] of each of `size` ranks, equally many on all -> [size n, ...]."""
    part = part.contiguous()
    whole = part.new_empty(size * part.shape[0], *part.shape[1:])
    _all_gather(whole, part, group=group)
    return whole


def added(pieces: torch.Tensor, group: Any) -> torch.Tensor:
    """[N, ...], piece s for rank s -> [...], the sum of what all ranks have for this one.

    It is taken in rank order and in float32, whatever the type is and whatever a backend's own reduction does.
    """
    found = all_to_all(pieces, group)
    wide = found.dtype if found.dtype.itemsize > 4 else torch.float32
    return found.sum(dim=0, dtype=wide).to(found.dtype)


def total(value: torch.Tensor, group: Any, size: int) -> torch.Tensor:
    """The sum of all ranks' `value`, of any shape; the same bits on each of them, and taken as in `added`."""
    each = -(-value.numel() // size)
    flat = functional.pad(value.flatten(), (0, each * size - value.numel()))
    return all_gather(added(flat.view(size, each), group), group, size)[: value.numel()].view(value.shape)


def average_gradients(parameters: Iterable[nn.Parameter], size: int, group: Any = None) -> None:
    """Replaces every gradient by its mean over `size` ranks, in one collective per type.

    A parameter without gradient on this rank counts as zero.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter)
    for members in by_dtype.values():
        flat = torch.cat([p.grad.flatten() for p in members if p.grad is not None])
        dist.all_reduce(flat, group=group)
        flat /= size
        offset = 0
        for parameter in members:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()


def gather_parts(part: torch.Tensor, group: Any, size: int, *, first: bool) -> list[torch.Tensor]:
    """The tensors of all ranks of a group, equally large, on the `first` of them; an empty list on the others."""
    parts = [torch.empty_like(part) for _ in range(size)] if first else None
    dist.gather(part, parts, group=group, group_dst=0)  # pyright: ignore[reportArgumentType]
    return parts or []


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients that are there."""
    return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def largest(values: torch.Tensor) -> torch.Tensor:
    """The largest of each value over all ranks, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_objects(value: Any, group: Any) -> list[Any]:
    """`value` of every rank of a group, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
