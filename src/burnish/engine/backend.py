"""The one door to accelerate: which devices there are, in which precision they compute, and how ranks and trackers are spoken to.

A single process pays nothing: every collective returns its argument.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from burnish.config.sections import Parallel
from burnish.core.errors import ConfigError, TrainingError, Where
from burnish.core.log import set_rank
from burnish.engine.backend_collectives import average_gradients, gather_objects, gradient_norm, largest
from burnish.engine.backend_context import ContextGroup
from burnish.engine.backend_fsdp import Sharding
from burnish.engine.backend_tensor import Cut, TensorGroup
from burnish.engine.backend_trackers import Trackers, start_trackers
from burnish.engine.grid import Grid
from burnish.engine.parts import Held, Part, Writing
from burnish.kernels.allocator import keep_freed_memory
from burnish.kernels.dispatch import cpu_has_fast_bf16

__all__ = ["Backend", "LossScale", "Precision", "Trackers", "resolve_precision"]

T = TypeVar("T")
Precision = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Backend:
    """The devices of this run as one process sees them.

    Args:
        precision: Type of the matrix products; `auto` is bfloat16 where the device computes it fast, else float32.
        parallel: How the work is shared out.
        cpu: Stay on the CPU even where there is an accelerator.
        timeout: `parallel.timeout`: seconds after which the watchdog ends a run that hangs. A collective itself gives up later.
        deterministic: Let torch use only algorithms that give the same bits every time, in this process from now on.

    Raises:
        ConfigError: the device lacks the precision, or the strategy does not fit the number of processes.
        TrainingError: a launcher started several processes and they do not see each other.
    """

    def __init__(
        self,
        *,
        precision: Precision = "auto",
        parallel: Parallel | None = None,
        cpu: bool = False,
        timeout: float = 1800.0,
        deterministic: bool = False,
    ) -> None:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
            torch.use_deterministic_algorithms(True)
        # What the launcher promised. On CPUs accelerate forms a group only when told that CPUs are meant.
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        # A rank may rightly wait for long, while another one saves; who hangs is found by engine/watchdog.py, not by this time-out.
        self._patience = timedelta(seconds=4 * timeout + 60)
        patience = {"timeout": self._patience} if asked > 1 else {}
        state = PartialState(cpu=cpu or not _has_accelerator(), **patience)
        self.device = torch.device(state.device or "cpu")
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        if self.world_size != asked:
            raise TrainingError(
                f"the launcher started {asked} processes, but this one sees {self.world_size}: they would train {asked} separate models",
                hint="start them with torchrun or accelerate launch on devices of one kind",
            )
        self._parallel = parallel or Parallel()
        self.strategy = _strategy(self._parallel, self.world_size)
        self.grid = Grid(self.rank, self.world_size, context=self._parallel.context, tensor=self._parallel.tensor)
        self.reason = ""
        self.load_device = self.device
        self.spreads = False
        """Rank 0 alone reads the weights, into the host's memory, and sends each rank its part. Known after `settle`."""
        self._sharding: Sharding | None = None
        self._context: ContextGroup | None = None
        self._tensor: TensorGroup | None = None
        self.held: Held | None = None
        """What is known of weights of which each rank has a part, once it is so."""
        self.compute_dtype = resolve_precision(precision, self.device)
        self.loss_scale = LossScale() if self.compute_dtype == torch.float16 else None
        set_rank(self.rank)
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which micro-batches are this rank's: ranks that work on the same ones have the same number."""
        return self.grid.data_rank

    @property
    def data_world_size(self) -> int:
        """Ranks, or groups of them, that have micro-batches of their own."""
        return self.grid.data_world_size

    @property
    def coupled(self) -> bool:
        """Whether ranks wait for each other within a micro-batch, so that none can leave it alone."""
        return self.sharded or self.grid.model_ranks > 1

    @property
    def storage_dtype(self) -> torch.dtype:
        """Type of the frozen weights, where `model.dtype` leaves it to the precision."""
        return self.compute_dtype

    @property
    def threads(self) -> int:
        """CPU threads of this process."""
        return torch.get_num_threads()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: matrix products in the compute type, trained weights stay float32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def seed(self, seed: int, *, per_rank: bool = False) -> None:
        """Seeds Python, NumPy and torch: `per_rank` for what must differ between ranks (dropout), without it for what must not.

        Ranks that share layers compute the same outside them, and count as one.
        """
        seed += self.rank // self.grid.tensor if per_rank else 0
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def settle(self, weights: float, rest: float, room: float, *, cuttable: bool = True) -> None:
        """Decides what `auto` stands for, by what has to fit on each device, and where weights are loaded to.

        Args:
            weights: Bytes of the whole model as it is stored.
            rest: Bytes of all gradients and the optimiser's state.
            room: Free bytes of this device.
            cuttable: Whether shards would make it smaller: quantised weights stay whole.
        """
        room = _ROOM * min(self.gather(room))
        if self.grid.tensor > 1:
            self.strategy = "ddp"
            if weights > room:  # there they are cut
                self.load_device = torch.device("cpu")
        if self.strategy == "auto":
            fits = weights + rest <= room
            self.strategy = "ddp" if fits or not cuttable else "fsdp"
            size = f"{_gib(weights + rest)} of weights, gradients and optimiser state"
            self.reason = f"{size} {'fit into' if fits else 'exceed'} {_gib(room)}"
        self.spreads = self.sharded and cuttable and (self._parallel.offload or weights > room)
        if self.spreads:
            self.load_device = torch.device("cpu")

    @property
    def local_processes(self) -> int:
        """Processes of this run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model.

        Raises:
            ConfigError: the ranks cannot be cut into groups of `parallel.shards`.
        """
        if not self.sharded:
            return 1
        if self.strategy != "hsdp":
            return self.world_size
        shards = self._parallel.shards or self.local_processes
        if self.world_size % shards:
            raise ConfigError(
                f"{self.world_size} processes cannot be cut into groups of {shards}",
                where=Where(field="parallel.shards"),
                hint="take a divisor",
            )
        return shards

    @property
    def reads_weights(self) -> bool:
        """Whether this rank reads the model's weights; one that does not has them on the meta device until `shard`."""
        return self.is_main or not self.spreads

    def freed_by_shards(self, model: nn.Module) -> float:
        """Bytes of this device that a model will no longer take once it is cut into shards."""
        held = sum(p.nbytes for p in model.parameters() if p.device == self.device and p.dtype.itemsize > 1)
        return held * (1 - 1 / self.shards)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of every weight."""
        return self.strategy in ("fsdp", "hsdp", "zero1", "zero2")

    @property
    def parted(self) -> bool:
        """Whether each rank holds a part of weights: in shards, or as a share of every layer."""
        return self.sharded or self.grid.tensor > 1

    @property
    def sharding(self) -> Sharding | None:
        """The shards, once there are any."""
        return self._sharding

    @property
    def layout(self) -> dict[str, Part]:
        """Which part of each trained weight this rank has; of one that is not in it, it has all."""
        return self.held.layout if self.held is not None else {}

    def share_context(self, policy: Any, *, verify: bool = True) -> None:
        """Lets the policy share the tokens of each micro-batch with the other ranks of its group, where the run file says so.

        Raises:
            ConfigError: the model cannot be computed in parts. `verify` looks whether it can, on the device.
        """
        if self.grid.context == 1:
            return
        self._context = self._context or ContextGroup(self.grid, self._patience)
        policy.share_context(self._context, verify=verify)

    def share_layers(self, policy: Any, *, trains: bool = True, kernels: bool = False) -> None:
        """Leaves each rank of a group its part of the policy's layers, where the run file says so.

        Args:
            policy: With whole weights.
            trains: Whether this is the policy that is trained, whose parameters become those of rank 0.
            kernels: Use fast modules.

        Raises:
            ConfigError: the layers cannot be shared.
        """
        if self.grid.tensor == 1:
            return
        if trains:
            self._broadcast(policy.model)
        self._tensor = self._tensor or TensorGroup(self.grid, self._patience)
        cuts = policy.share_layers(self._tensor, self.device, kernels=kernels)
        if trains:
            self.held = Cut(policy.model, cuts, self._tensor, self.grid, self.device)

    def shard(self, policy: Any) -> None:
        """Cuts the policy's model into shards, where the strategy says so. Called once, when the model is complete.

        Raises:
            ConfigError: the model has to be called a different number of times on each rank.
        """
        if not self.sharded:
            return
        if self.spreads:
            policy.take_findings(self.from_main(policy.findings))
        if not policy.anatomy.packed:
            raise ConfigError(
                "this model is computed one segment at a time, which ranks that gather its weights together cannot do",
                where=Where(field="parallel.strategy"),
                hint="use ddp",
            )
        if not self.spreads:
            self._broadcast(policy.model)
        options = {"offload": self._parallel.offload, "reshard": self._parallel.reshard, "spread": self.spreads}
        stage = {"zero1": 1, "zero2": 2}.get(self.strategy, 3)
        self.held = self._sharding = Sharding(policy.model, policy.layers, self.device, shards=self.shards, stage=stage, **options)
        policy.hold_shards(self._sharding)

    def compute(self, call: Callable[[], T]) -> T:
        """Calls `call`, which calls a policy: whoever computes with a model does it in here, on all ranks equally often."""
        return call() if self._sharding is None else self._sharding.run(call)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Makes the trained parameters of all ranks those of rank 0. Called once, before the first step.

        The gradients meet in `average_gradients`. So the model stays the same object, and a policy may call any part of it (the body
        without the head), which a wrapper around `forward` would not see.
        """
        if self.held is None:
            self._broadcast(model)
        return model

    def _broadcast(self, model: nn.Module) -> None:
        if self.world_size > 1:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    shared = parameter.data.to(self.device)
                    dist.broadcast(shared, src=0)
                    parameter.data.copy_(shared)

    def before_backward(self, last: bool) -> None:
        """Called before each backward pass; `last` of its step."""
        if self._sharding is not None:
            self._sharding.before_backward(last)

    def norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The norm of all gradients, from those that `average_gradients` left on this rank."""
        return gradient_norm(parameters) if self.held is None else self.held.norm(parameters)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each value over the ranks, where these hold parts of the same things."""
        return values if self.held is None else largest(values.to(self.device))

    def whole(self, *, frozen: bool) -> AbstractContextManager[None]:
        """Inside, the model on rank 0 has its weights whole: the trained ones, and the `frozen` ones too if wanted."""
        return nullcontext() if self.held is None else self.held.whole(frozen)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks, in one collective per type.

        A parameter without gradient on this rank (an expert that saw no token) counts as zero.
        """
        if self.held is not None:
            self.held.average(parameters)
        elif self.world_size > 1:
            average_gradients(parameters, self.world_size)

    def writing(self, size: float) -> Writing | None:
        """The ranks that write checkpoints together, with `size` bytes of weights on this rank; None where the first one does it alone.

        All ranks take part, once.
        """
        writers = min(self.world_size, int(size) // _SHARE)
        return Copies(self.rank, writers) if self.held is None and writers > 1 else self.held

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """`value` of rank 0."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def sums(self, values: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """(sum, count) pairs added over the ranks, key by key; a rank may lack a key. Of ranks with the same micro-batches one counts."""
        if self.world_size == 1:
            return dict(values)
        total: dict[str, tuple[float, float]] = {}
        for share in self.gather(dict(values))[:: self.grid.model_ranks]:
            for key, (amount, count) in share.items():
                before = total.get(key, (0.0, 0.0))
                total[key] = (before[0] + amount, before[1] + count)
        return total

    def any(self, flag: bool) -> bool:
        """True where any rank says so: a signal reaches one rank, and all must act on it in the same step."""
        return bool(self.union(int(flag)))

    def union(self, flags: int) -> int:
        """The bits, of the lowest eight, that any rank has set."""
        if self.world_size == 1:
            return flags
        bits = torch.tensor([flags >> place & 1 for place in range(8)], dtype=torch.int32, device=self.device)
        dist.all_reduce(bits, op=dist.ReduceOp.MAX)
        return sum(bit << place for place, bit in enumerate(bits.tolist()))

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def trackers(self, kinds: Sequence[str], *, name: str, folder: Path, config: Mapping[str, Any]) -> Trackers:
        """Starts the trackers of `track` (those besides `csv`, which is always written); the run is called `name` in them.

        Raises:
            DependencyError: a tracker's package is not installed, or it refuses to start. Nothing has been trained by then.
        """
        return start_trackers(kinds, name=name, folder=folder, config=config, active=self.is_main)


class Copies:
    """Ranks that each hold all weights, and write a checkpoint together, each its share of it.

    Args:
        rank: This process.
        writers: How many of them write, from the first one on.
    """

    def __init__(self, rank: int, writers: int) -> None:
        self.is_main = rank == 0
        self.shard, self.shards, self.replica = rank % writers, writers, rank // writers
        self.layout: dict[str, Part] = {}
        self._everyone: Any = dist.new_group(backend="gloo")  # of its own, for the thread that saves

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, by a way that a thread may use while the model trains."""
        return gather_objects(value, self._everyone)


class LossScale:
    """Dynamic loss scaling for float16 (1710.03740, section 3.2): the scale halves on overflow and doubles after many good steps."""

    def __init__(self, scale: float = 2.0**16, *, growth_interval: int = 2000) -> None:
        self.scale = scale
        self.growth_interval = growth_interval
        self.good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Adjusts the scale after a step."""
        if not finite:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the matrix products on `device`.

    Raises:
        ConfigError: the device cannot compute in the type that was asked for.
    """
    if precision != "auto":
        if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(
                f"{torch.cuda.get_device_name(device)} has no bfloat16, expected float16, float32 or auto",
                where=Where(field="train.precision"),
            )
        return _DTYPES[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu_has_fast_bf16()
    return torch.bfloat16 if fast else torch.float32


_SHARE = 1 << 26
"""Bytes of weights that are worth another rank's writing."""
_ROOM = 0.85
"""Share of a device's free memory that weights, gradients and optimiser state may fill."""


def _strategy(parallel: Parallel, processes: int) -> str:
    if processes == 1:
        return "none"
    if parallel.strategy == "none":
        raise ConfigError(f"'none' means one process, found {processes}", where=Where(field="parallel.strategy"))
    return "fsdp" if parallel.strategy == "zero3" else parallel.strategy


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
