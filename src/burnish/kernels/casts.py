"""Adapters in the type of the products, made for all layers at once.

An adapter's weights are fp32, its products in half precision. So every call of a layer begins with casts of A and of s B: some 20 launches
a layer, each over in a microsecond, at the start of a step, where a GPU waits for them. Inside `Casts.at_once` those that the last call
asked for are made together, in a handful of launches, and those of one input lie side by side. They are the same numbers, made anew from
the weights each time; what was not foreseen is cast as ever.
"""
# torch._foreach_* (one kernel for a list of tensors) has no public name
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import weakref
from collections.abc import Collection, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch


class Asked(NamedTuple):
    """What a cast is of: a tensor by its identity, times a factor, in a type."""

    tensor: int
    factor: float
    dtype: torch.dtype


def cast(tensor: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
    """`tensor` times `factor` in `dtype`, for the inside of an autograd node. The factor goes in before the rounding."""
    if _NOW and tensor.dtype is not dtype and tensor.device.type in _NOW[-1].devices:
        return _NOW[-1].take(tensor, dtype, factor)
    return _cast(tensor, dtype, factor)


class Casts:
    """What the layers of one model ask for, call after call.

    Args:
        devices: Where making them together saves time.
    """

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        self.devices = devices
        self._asked: dict[Asked, weakref.ref[torch.Tensor]] = {}  # in the order of the last call
        self._made: dict[Asked, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def at_once(self) -> Generator[None]:
        """While the model runs: what it asked for last time is there already."""
        self._make()
        self._asked = {}
        _NOW.append(self)
        try:
            yield
        finally:
            _NOW.remove(self)
            self._made = {}

    def take(self, tensor: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """What `cast` gives."""
        key = Asked(id(tensor), factor, dtype)
        self._asked[key] = weakref.ref(tensor)
        of, made = self._made.get(key, (None, None))
        return made if made is not None and of is tensor else _cast(tensor, dtype, factor)

    @torch.no_grad()
    def _make(self) -> None:
        """Memory of their own for each call: an earlier one's may still be needed by its backward pass."""
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Asked, torch.Tensor]]] = {}
        for key, reference in self._asked.items():
            tensor = reference()
            if tensor is not None:
                groups.setdefault((tensor.device, key.dtype), []).append((key, tensor))
        for (device, dtype), group in groups.items():
            sizes = [-(-tensor.numel() // _ALIGNED) * _ALIGNED for _, tensor in group]
            parts: tuple[torch.Tensor, ...] = torch.empty(sum(sizes), dtype=dtype, device=device).split_with_sizes(sizes)
            made = [part[: tensor.numel()].view(tensor.shape) for part, (_, tensor) in zip(parts, group, strict=True)]
            torch._foreach_copy_(made, _scaled(group))
            self._made |= {key: (tensor, result) for (key, tensor), result in zip(group, made, strict=True)}


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """[r_i, n] on top of each other, without a copy where they lie so already."""
    first = parts[0]
    for before, part in pairwise(parts):
        adjacent = before.data_ptr() + before.nbytes == part.data_ptr() and before.is_contiguous() and part.is_contiguous()
        if not adjacent or before.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
            return torch.cat(parts)
    return first if len(parts) == 1 else first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), first.stride())


_ALIGNED = 64
"""Elements whose multiples casts begin at: products want their operands aligned to 16 bytes."""

_NOW: list[Casts] = []


def _cast(tensor: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
    return (tensor if factor == 1.0 else tensor * factor).to(dtype)


def _scaled(group: list[tuple[Asked, torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors with their factors, still in their own type."""
    found = [tensor.detach() for _, tensor in group]
    places = [place for place, (key, _) in enumerate(group) if key.factor != 1.0]
    if places:
        for place, made in zip(places, torch._foreach_mul([found[p] for p in places], [group[p][0].factor for p in places]), strict=True):
            found[place] = made
    return found
