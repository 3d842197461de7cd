"""Activations in the host's memory: for examples so long that even the inputs of recomputed layers do not fit beside the weights.

Forward, each kept tensor is copied out on a stream of its own while the next layer computes. Backward, they come back in the opposite
order, and while one layer is recomputed the next one's input is already on its way: two are on the device at any time.

    forward    compute layer 0 | compute layer 1 | ...          backward    fetch n-1 | recompute n-1 | recompute n-2 | ...
    copies            out 0    |       out 1     | ...                                | fetch n-2     | fetch n-3     | ...

Copies move bits and change none. On a CPU, where there is nothing to move to, tensors stay where they are.
"""

# transformers, PEFT and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any

import torch

_SMALLEST = 1 << 20
"""Bytes below which a tensor stays: its copy would cost more than its place."""


@contextmanager
def offload(device: torch.device, weights: Collection[int], *, smallest: int = _SMALLEST) -> Generator[None]:
    """Around a forward pass: what it keeps for the backward pass goes to pinned host memory.

    Args:
        device: Where the model is.
        weights: Addresses of the storages that stay, see `storages`.
        smallest: Bytes from which on a tensor is worth its way.
    """
    if device.type != "cuda":
        yield
        return
    mover = Mover(_CudaCopies(device), weights, smallest)
    with torch.autograd.graph.saved_tensors_hooks(mover.pack, mover.unpack):
        yield


def storages(module: torch.nn.Module) -> frozenset[int]:
    """Addresses of the storages of all weights and buffers: autograd keeps views of them, which cost nothing."""
    return frozenset(t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers()))


class Mover:
    """Moves saved tensors out in order and back in the opposite order, one ahead of need.

    Args:
        copies: How tensors are copied: `out(tensor) -> ticket`, `start_back(ticket)`, `finish_back(ticket) -> tensor`.
        weights: Addresses of the storages that stay.
        smallest: Bytes from which on a tensor is moved.
    """

    def __init__(self, copies: Any, weights: Collection[int], smallest: int) -> None:
        self._copies, self._weights, self._smallest = copies, weights, smallest
        self._tickets: list[Any] = []

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps instead of the tensor: its number, or the tensor itself where that stays."""
        stays = tensor.nbytes < self._smallest or not tensor.is_floating_point()
        if stays or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        self._tickets.append(self._copies.out(tensor))
        return len(self._tickets) - 1

    def unpack(self, kept: Any) -> torch.Tensor:
        """The tensor again; the one that will be wanted next is set off."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._copies.start_back(self._tickets[kept])
        if kept:
            self._copies.start_back(self._tickets[kept - 1])
        return self._copies.finish_back(self._tickets[kept])


class _Ticket:
    """One tensor that is away."""

    def __init__(self, host: torch.Tensor, there: Any) -> None:
        self.host, self.there = host, there
        self.device: torch.Tensor | None = None
        self.back: Any = None


class _CudaCopies:
    """Copies on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def out(self, tensor: torch.Tensor) -> _Ticket:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the tensor must have been computed
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            there = self._stream.record_event()
        tensor.record_stream(self._stream)  # its memory is not given to others before the copy is done
        return _Ticket(host, there)

    def start_back(self, ticket: _Ticket) -> None:
        if ticket.device is not None:
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ticket.there)
            ticket.device = torch.empty_like(ticket.host, device=self._device)
            ticket.device.copy_(ticket.host, non_blocking=True)
            ticket.back = self._stream.record_event()

    def finish_back(self, ticket: _Ticket) -> torch.Tensor:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ticket.back)
        tensor, ticket.device = ticket.device, None
        assert tensor is not None
        tensor.record_stream(current)
        return tensor
