"""Weights that rank 0 alone has read, handed out to ranks that each keep a part of them.

    Weights       before the model is cut: rank 0 puts its weights aside, and all ranks have a model without any (torch's meta device)
    hand_out      after it: one tensor after the other is sent to all, and each rank keeps its rows

So one process of all holds the model whole, in its host's memory, and each tensor leaves that when it has been sent.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from burnish.core.errors import TrainingError

__all__ = ["Weights", "replace_parameters", "replaced"]


class Weights:
    """What the model of rank 0 holds, taken off it. All ranks take part, in every method.

    Args:
        model: With its weights on rank 0, on the meta device elsewhere.

    Raises:
        TrainingError: the ranks have built different models.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reads = dist.get_rank() == 0
        named = dict(model.named_parameters())
        ours = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in named.items()}
        theirs = _from_first(ours)
        if differing := sorted(set(ours) ^ set(theirs)) or sorted(name for name in ours if ours[name][::2] != theirs[name][::2]):
            raise TrainingError(f"rank {dist.get_rank()} has built another model than rank 0: they differ in {differing[0]}")
        self._whole = named if self._reads else {}
        empty = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=theirs[name][1], device="meta"), requires_grad=p.requires_grad)
            for name, p in named.items()
        }
        replace_parameters(model, empty)

    def hand_out(self, model: nn.Module, device: torch.device, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Fills the model, which has been cut into DTensors.

        Args:
            model: The same.
            device: What the tensors are sent by.
            keep: Gives this rank's part of a whole tensor, where it belongs.
        """
        for owner, name, like in self._loose(model):
            value = self._sent(like, device, _held(owner, name))
            if not self._reads:
                (owner._buffers if name in owner._buffers else vars(owner))[name] = value
        filled: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            cut: Any = parameter
            whole = self._sent((tuple(cut.shape), cut.dtype), device, self._whole.pop(name, None))
            part = keep(whole)
            assert part.shape == cut.to_local().shape
            made = DTensor.from_local(part, cut.device_mesh, cut.placements, run_check=False, shape=whole.shape, stride=whole.stride())
            filled[id(parameter)] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        replace_parameters(model, filled)

    def _loose(self, model: nn.Module) -> list[tuple[Any, str, tuple[tuple[int, ...], torch.dtype]]]:
        """Tensors that are no parameters (buffers, and those that a module keeps by itself): owner, name, shape and type."""
        owners = dict(model.named_modules())
        here = [
            (path, name, tuple(value.shape), value.dtype)
            for path, owner in owners.items()
            for name, value in (*owner._buffers.items(), *vars(owner).items())
            if isinstance(value, torch.Tensor)
        ]
        return [(owners[path], name, (shape, dtype)) for path, name, shape, dtype in _from_first(here)]

    def _sent(self, like: tuple[tuple[int, ...], torch.dtype], device: torch.device, value: torch.Tensor | None) -> torch.Tensor:
        """A tensor of rank 0, on every rank."""
        shape, dtype = like
        if self._reads:
            assert value is not None
            found = value.detach().to(device).contiguous()
        else:
            found = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(found, src=0)
        return found


def replace_parameters(model: nn.Module, by_id: Mapping[int, nn.Parameter]) -> None:
    """Puts other parameters in the place of those whose `id` is a key, wherever they stand: tied ones stay tied."""
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) in by_id:
                owner._parameters[name] = by_id[id(parameter)]


@contextmanager
def replaced(model: nn.Module, found: Callable[[nn.Parameter], torch.Tensor | None], *, frozen: bool) -> Generator[None]:
    """Inside, the trained parameters of `model`, and the `frozen` ones too if wanted, are what `found` gives for them, where it does."""
    there: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        if (frozen or parameter.requires_grad) and (value := found(parameter)) is not None:
            there[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    back = {id(there[id(parameter)]): parameter for parameter in model.parameters() if id(parameter) in there}
    replace_parameters(model, there)
    try:
        yield
    finally:
        replace_parameters(model, back)


def _held(owner: nn.Module, name: str) -> torch.Tensor | None:
    return owner._buffers[name] if name in owner._buffers else vars(owner).get(name)


def _from_first(value: Any) -> Any:
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
