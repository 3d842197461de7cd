"""Weights in shards (FSDP2 and HSDP): each rank keeps a part of every weight, of its gradient and of its optimiser state.

    root        embeddings, final norm, head: whole while an objective runs and until its backward pass is over
    layers      one unit each: gathered when the model comes to it, given back after it, gathered again in the backward pass

A weight is cut along its first dimension into as many equal parts as there are shards; the last ones may be smaller, or empty. `trained`
holds this rank's parts as ordinary parameters in the memory that torch gathers from: optimisers, checkpoints and copies work on them
without knowing of ranks, as long as they treat every element by itself.

HSDP: the ranks form groups of `shards` neighbours. Each group holds the whole model in shards, and gradients are averaged over the groups.

ZeRO (1910.02054, section 5) cuts less: in stages 1 and 2 all weights are whole from a step's first forward pass to its last backward pass,
in stage 1 the gradients too. Between steps everything lies in shards, in every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from burnish.engine.backend_collectives import gather_objects, gather_parts, gradient_norm, group_of
from burnish.engine.backend_weights import Weights, replaced
from burnish.engine.parts import Part
from burnish.objectives.base import Loss

__all__ = ["Sharding"]

T = TypeVar("T")


class _Root(nn.Module):
    """Runs whatever it is called with, in the reach of its hooks: an objective calls the body and the head, not the model's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class Sharding:
    """Cuts a model into shards, in place. All ranks take part, in every method.

    Args:
        model: With the same weights on every rank. It may lie on the host; its shards go to `device`.
        layers: The modules of it that are gathered one at a time.
        device: Where the model computes.
        shards: Ranks that share one copy of the model; a divisor of the number of ranks.
        offload: Keep the shards, their gradients and the optimiser's state in the host's memory.
        reshard: Give layers back after the forward pass. Without, they stay whole until the backward pass is over: less traffic, and as
            much memory as whole weights.
        stage: ZeRO's. 3: as said. 2: weights stay whole until the step's last backward pass. 1: gradients too, and are sent once.
        spread: Only rank 0's model has weights; the others are on the meta device, and are given theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        device: torch.device,
        *,
        shards: int,
        offload: bool,
        reshard: bool,
        stage: int = 3,
        spread: bool = False,
    ) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.shards, self.replicas = shards, world // shards
        self.shard, self.replica = rank % shards, rank // shards
        self.is_main = rank == 0
        names, sizes = (("replicas", "shards"), (self.replicas, shards)) if self.replicas > 1 else (("shards",), (shards,))
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
        # Weights that are codes cannot be cut: they stay whole on every rank.
        codes = {parameter for parameter in model.parameters() if parameter.dtype.itemsize == 1}
        self.replicated = sum(parameter.nbytes for parameter in codes)
        options: dict[str, Any] = {"mesh": mesh, "offload_policy": policy, "ignored_params": codes}
        weights = Weights(model) if spread else None
        for layer in layers:
            fully_shard(layer, reshard_after_forward=reshard and stage == 3, **options)
        self._units = [cast(FSDPModule, layer) for layer in layers]
        self._root: Any = fully_shard(_Root(model), reshard_after_forward=False, **options)
        self._stage = stage
        self._device = device
        if weights is not None:
            home = torch.device("cpu") if offload else device
            weights.hand_out(model, device, lambda whole: whole[self._stretch(whole.shape[0])].to(home, copy=True))
        self._group = mesh["shards"].get_group() if self.replicas > 1 else mesh.get_group()
        # Of their own, so that a thread that saves does not meet what the training sends.
        self._hosts = group_of([range(first, first + shards) for first in range(0, world, shards)], rank, backend="gloo")
        self._everyone: Any = dist.new_group(backend="gloo")
        self.run(lambda: None)  # from here on the shards lie where they will always lie
        self._model = model
        self._wholes = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained = {name: nn.Parameter(_local(whole)) for name, whole in self._wholes.items()}
        self.layout = {name: self._part(whole) for name, whole in self._wholes.items()}

    def run(self, call: Callable[[], T]) -> T:
        """Calls `call`, which may call any part of the model. What it returns may be differentiated: a Loss, or a tensor."""
        made: list[T] = []

        def forward() -> list[torch.Tensor]:
            made.append(call())
            return [value.sum] if isinstance(value := made[0], Loss) else [value] if isinstance(value, torch.Tensor) else []

        outputs = self._root(forward)
        if not any(output.requires_grad for output in outputs):  # no backward pass will do it
            self._reshard()
        return made[0]

    def before_backward(self, last: bool) -> None:
        """Called before each backward pass of a step: what waits for the last one is sent, or given back, with it."""
        if self.replicas > 1:  # between the groups of HSDP
            self._root.set_requires_all_reduce(last)
        if self._stage < 3:
            self._root.set_reshard_after_backward(last)
        if self._stage == 1:
            self._root.set_requires_gradient_sync(last)

    def average(self, _parameters: Sequence[nn.Parameter]) -> None:
        """Moves the gradients, which are means over the ranks by now, to `trained`."""
        for name, whole in self._wholes.items():
            self.trained[name].grad = None if whole.grad is None else _local(whole.grad)
            whole.grad = None

    def norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The norm of all shards' gradients from that of this rank's."""
        total = gradient_norm(parameters).detach().to(self._device).double().square()
        dist.all_reduce(total, group=self._group)
        return total.sqrt()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, by a way that a thread may use while the model trains."""
        return gather_objects(value, self._everyone)

    @contextmanager
    def rewriting(self) -> Generator[None]:
        """Inside, which may be within `run`, the values of `trained` may be changed."""
        self._reshard()
        yield
        self._root.unshard()

    @contextmanager
    def whole(self, frozen: bool) -> Generator[None]:
        """Inside, the model of rank 0 has whole weights in the host's memory: the trained ones, and the `frozen` ones too if wanted.

        They are gathered tensor by tensor, so that nobody ever holds more than one copy beside the shards. Nobody may call the model.
        """
        self._reshard()
        with replaced(self._model, self._gathered, frozen=frozen):
            yield

    def _gathered(self, parameter: Any) -> torch.Tensor | None:
        """The whole tensor on rank 0, of one that lies in shards."""
        if self.replica or not isinstance(parameter, DTensor):
            return None
        local, rows = _local(parameter).cpu(), self._rows(parameter.shape[0])
        padded = local.new_zeros(rows, *local.shape[1:])
        padded[: local.shape[0]] = local
        parts = gather_parts(padded, self._hosts, self.shards, first=self.shard == 0)
        return torch.cat(parts)[: parameter.shape[0]] if parts else None

    def _rows(self, rows: int) -> int:
        """Of a shard that is full."""
        return -(-rows // self.shards)

    def _stretch(self, rows: int) -> slice:
        """This rank's, of so many rows."""
        full = self._rows(rows)
        start = min(self.shard * full, rows)
        return slice(start, min(start + full, rows))

    def _part(self, whole: Any) -> Part:
        stretch = self._stretch(whole.shape[0])
        part = Part(tuple(whole.shape), stretch.start, stretch.stop)
        assert part.stop - part.start == _local(whole).shape[0]
        return part

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()
        # While the root runs it would rather stay whole.
        self._root.set_reshard_after_forward(True, recurse=False)
        self._root.reshard()
        self._root.set_reshard_after_forward(False, recurse=False)


def _local(tensor: Any) -> torch.Tensor:
    """This rank's part of a DTensor, in the same memory."""
    return tensor.detach().to_local()
