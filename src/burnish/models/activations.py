"""Activations: what a forward pass keeps for the backward pass, and how much of it is computed again instead.

A layer can be run in three ways. Each later one keeps less and computes more:

    keep     everything that the backward pass wants
    mlp      the feed-forward's inside is computed again: its two wide tensors are most of what a layer keeps
    layer    only the layer's input is kept, and the whole layer is computed again

`measure` runs the model on a few tokens in each way and counts the bytes that autograd holds, so it is right for any family, adapter and
kernel. `plan` then takes for each layer the first way, and goes to the next only for as many layers as memory asks for: the bytes won per
recomputed operation are best for `mlp`, so all layers go there before any goes on to `layer`. `apply` sets the model up.

Recomputing is exact: the same operations on the same numbers, with the random state of dropout put back.
"""

# transformers, PEFT and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from burnish.core.errors import ModelError
from burnish.models.offload import storages

Way = Literal["keep", "mlp", "layer"]
WAYS: tuple[Way, ...] = ("keep", "mlp", "layer")


@dataclass(frozen=True, slots=True)
class Costs:
    """What one layer keeps, in bytes per token, run in each way; `outside` is what is kept outside the layers."""

    keep: float
    mlp: float
    layer: float
    outside: float
    layers: int

    def of(self, way: Way) -> float:
        """Bytes per token and layer."""
        return {"keep": self.keep, "mlp": self.mlp, "layer": self.layer}[way]

    def total(self, ways: Sequence[Way]) -> float:
        """Bytes per token of the whole model. A recomputed layer is whole once more while its gradient is computed: counted once."""
        again = max((self.keep - self.of(way) for way in ways), default=0.0)
        return self.outside + sum(self.of(way) for way in ways) + again


def plan(costs: Costs, tokens: int, budget: float) -> list[Way]:
    """The way of each layer: as little recomputed as fits `budget` bytes with `tokens` tokens at once.

    Where nothing fits, all layers are recomputed: the least there is.
    """
    ways: list[Way] = ["keep"] * costs.layers
    for way in ("mlp", "layer"):
        for i in range(costs.layers):
            if tokens * costs.total(ways) <= budget:
                return ways
            ways[i] = way
    return ways


def describe(ways: Sequence[Way], tokens: int, needed: float, budget: float) -> str:
    """One line for people: what is done with each layer, and the bytes that it needs of those that are free."""
    size = f"{needed / 2**30:.1f} GiB for {tokens} tokens at once"
    if needed > budget:
        size += f", more than the {budget / 2**30:.1f} GiB that are free"
    again = [f"{what} of {ways.count(way)} layers" for way, what in (("mlp", "feed-forwards"), ("layer", "all")) if way in ways]
    chosen = f"computed again in the backward pass are {' and '.join(again)}" if again else "all kept for the backward pass"
    return f"activations: {chosen}, {size}"


def layers_of(model: Any) -> list[Any]:
    """The layers of a transformers model whose activations can be recomputed.

    Raises:
        ModelError: The model's code has no checkpointing.
    """
    found = [module for module in model.modules() if hasattr(module, "gradient_checkpointing") and hasattr(module, "self_attn")]
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"activations of {type(model).__name__} cannot be checkpointed, expected train.checkpoint_activations: off")
    return found


def apply(model: Any, ways: Sequence[Way] | Way, *, tile: int | None = None) -> None:
    """Sets every layer to its way.

    Args:
        model: A transformers model.
        ways: One way for all layers, or one for each.
        tile: Compute feed-forwards in pieces of this many tokens, each recomputed: their wide tensors then exist for one piece at a
            time, forward and backward. For very long examples.

    Raises:
        ModelError: The model's code has no checkpointing.
    """
    layers = layers_of(model)
    chosen: list[Way] = [ways] * len(layers) if isinstance(ways, str) else list(ways)  # pyright: ignore[reportAssignmentType]
    if not layers:  # a model whose layers we do not know: all of it or nothing, by its own switch
        _by_its_own_switch(model, (bool(chosen) and chosen[0] == "layer") or ways == "layer")
        return
    _by_its_own_switch(model, "layer" in chosen)
    for layer, way in zip(layers, chosen, strict=True):
        layer.gradient_checkpointing = way == "layer"
        feed_forward = getattr(layer, "mlp", None)
        if feed_forward is not None:
            _wrap(feed_forward, recompute=way == "mlp", tile=tile)


def measure(model: Any, run: Callable[[], Any], tokens: int) -> Costs:
    """Counts what autograd keeps in each way.

    Args:
        model: A transformers model in training mode.
        run: A function that runs it on `tokens` tokens, with gradients, and returns the hidden states.
        tokens: How many it runs on.
    """
    layers = layers_of(model)
    kept: dict[Way, float] = {}
    for way in WAYS:
        apply(model, way)
        kept[way] = kept_bytes(model, run, tokens)
    apply(model, "keep")
    # What is kept outside the layers is the same in every way, and a recomputed layer keeps its input: one hidden state.
    width = model.config.get_text_config(decoder=True).hidden_size
    one = width * next(iter(model.parameters())).element_size()
    outside = max(0.0, kept["layer"] - len(layers) * one)
    per = {way: (kept[way] - outside) / len(layers) for way in WAYS}
    return Costs(per["keep"], per["mlp"], per["layer"], outside, len(layers))


def kept_bytes(model: Any, run: Callable[[], Any], tokens: int) -> float:
    """Bytes per token that autograd keeps as the model is set up now; arguments as for `measure`."""
    return _bytes_kept(run, storages(model)) / tokens


def free_memory(device: torch.device) -> float:
    """Bytes that may still be taken on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return _free_host_memory()


def _free_host_memory() -> float:
    """What Linux says is available, within the limit of the control group; elsewhere, no limit is known."""
    found = float("inf")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(float(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
            found = min(found, float(limit.read()) - float(used.read()))
    except (OSError, StopIteration, ValueError):  # no such file, or "max": no limit
        pass
    return found


def _bytes_kept(run: Callable[[], Any], weights: Collection[int]) -> float:
    """Bytes of distinct storages that autograd saves during `run`, other than weights."""
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address is counted for two
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return float(sum(size for size, _ in kept.values()))


def _by_its_own_switch(model: Any, on: bool) -> None:
    """Transformers' switch without what its public form adds: gradients of frozen embeddings, which only reentrant checkpoints need."""
    model._set_gradient_checkpointing(enable=on, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))


def _wrap(feed_forward: nn.Module, *, recompute: bool, tile: int | None) -> None:
    """Puts recomputation around a feed-forward, or takes it away; whatever its forward was stays underneath."""
    current = vars(feed_forward).get("forward")
    inner = getattr(current, "__wrapped__", current)
    vars(feed_forward).pop("forward", None)
    if inner is not None:
        vars(feed_forward)["forward"] = inner
    if recompute or tile:
        vars(feed_forward)["forward"] = _Recomputed(feed_forward, inner, tile)


class _Recomputed:
    """A feed-forward's forward that keeps its input only, in one piece or in tiles of rows."""

    def __init__(self, module: nn.Module, inner: Any, tile: int | None) -> None:
        self.__wrapped__ = inner
        self._module, self._tile = module, tile

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.__wrapped__ or MethodType(type(self._module).forward, self._module)
        if not (self._module.training and torch.is_grad_enabled()):
            return inner(x)
        pieces = x.split(self._tile, dim=-2) if self._tile else (x,)
        made: list[Any] = [checkpoint(inner, piece, use_reentrant=False) for piece in pieces]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-2)
