"""Tensor parallelism: ranks share the weights of every layer (Megatron-LM, 1909.08053, section 3).

Attention and feed-forward, the blocks of a layer, are each a product with matrices that are cut by their outputs, something that goes head
by head or element by element, and a product with one that is cut by its inputs. So each of N ranks computes its part of the middle:

    x ─ spread ─▶ q k v, gate up: 1 / N of the outputs ─ attention, activation ─▶ o, down: 1 / N of the inputs ─ total ─▶ y

    spread      x as it is; in the backward pass the sum of all ranks' gradients
    total       the sum of all ranks' parts; in the backward pass the gradient as it is

Everything outside the blocks is whole, and computed by every rank: embeddings, norms, residual stream, head. Of an adapter, B is cut with
the outputs and A with the inputs; the other matrix of each pair stays whole, and a rank has a part of its gradient.

Which matrices are cut how is told by transformers' plan for the family. Nothing is taken on trust: whatever else a block has in it is
refused, and afterwards the model must give the hidden states, and the gradients of its embeddings, that it gave before.
"""

# transformers and PEFT are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import gcd
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import nn

from burnish.core.errors import ConfigError, Where
from burnish.models.adapters import projection
from burnish.models.anatomy import Anatomy
from burnish.models.context import sizes_that_do

__all__ = ["Cuts", "Group", "cut", "refuse_layers"]

_OUTPUTS, _INPUTS, _NORM = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""How transformers says it of a linear layer, and of a norm over single heads."""


class Group(Protocol):
    """The ranks that share layers (satisfied by `engine.backend_tensor.TensorGroup`)."""

    rank: int
    """This rank's place."""
    size: int
    """How many they are, N."""

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, which all ranks have; the gradients of all ranks are added."""
        ...

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, the same on each; the gradient is passed on."""
        ...


@dataclass(slots=True)
class Cuts:
    """What was cut, by the names of the model's parameters."""

    dims: dict[str, int] = field(default_factory=dict[str, int])
    """Of which each rank has a part: the dimension that is cut."""
    partial: set[str] = field(default_factory=set[str])
    """Which are whole on every rank, where each has a part of their gradient."""


def refuse_layers(anatomy: Anatomy, size: int, processes: int = 0) -> None:
    """Looks whether `size` ranks, of a run of so many `processes`, can share the layers of a model, before its weights are there.

    Raises:
        ConfigError: its family has no plan that is known here, or its heads or features cannot be cut into so many equal parts.
    """
    units = {path: (count, kind) for block in _blocks(anatomy) for path, count, kind in block.units()}
    if odd := next((path for path, (count, _) in units.items() if count % size), None):
        count, kind = units[odd]
        raise ConfigError(
            f"{size} devices cannot share the layers of {type(anatomy.whole).__name__} equally: {odd} has {count} {kind}",
            where=_WHERE,
            hint=sizes_that_do(gcd(*(count for count, _ in units.values())), processes),
        )


def cut(model: nn.Module, anatomy: Anatomy, group: Group) -> Cuts:
    """Leaves this rank's part of every layer in `model`, which is `anatomy.whole` or an adapted model around it, in place.

    Raises:
        ConfigError: something in a block is not known here: another kind of layer or of adapter, a parameter, dropout.
    """
    refuse_layers(anatomy, group.size)
    names = {parameter: name for name, parameter in model.named_parameters()}
    cuts = Cuts()
    for block in _blocks(anatomy):
        known = {parameter for norm in block.norms for parameter in norm.parameters()}
        cuts.partial |= {names[parameter] for parameter in known}
        for path, layer in (*block.outputs.items(), *block.inputs.items()):
            known |= _cut_linear(path, layer, group, names, cuts, by_outputs=path in block.outputs)
        if strange := next((names[p] for p in block.module.parameters() if p not in known), None):
            raise _refused(f"{strange} is not in the plan of its family")
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in block.module.modules()) or _dropped(block.module):
            raise _refused(f"there is dropout in {block.path}, which would differ from that on one device")
        _share(block.module, group)
    return cuts


@dataclass(frozen=True, slots=True)
class _Block:
    """An attention or a feed-forward: its linear layers by the side that is cut, and its norms over single heads."""

    path: str
    module: Any
    outputs: dict[str, Any]
    inputs: dict[str, Any]
    norms: list[nn.Module]

    def units(self) -> Iterator[tuple[str, int, str]]:
        """What each layer that is cut by outputs has of what stays together: heads, or single features."""
        width = getattr(self.module, "head_dim", None)
        for path, layer in self.outputs.items():
            count = _base(layer).out_features // (width or 1)
            yield path, count, f"{'head' if width else 'feature'}{'s' if count > 1 else ''}"


_WHERE = Where(field="parallel.tensor")


def _blocks(anatomy: Anatomy) -> list[_Block]:
    """All blocks of a model, in order.

    Raises:
        ConfigError: transformers has no plan for the family, or one with other ways of cutting.
    """
    name = type(anatomy.whole).__name__
    plan: dict[str, str] = anatomy.whole.config.get_text_config(decoder=True).base_model_tp_plan or {}
    ways = [(re.compile(re.escape(key).replace(r"\*", r"[^.]+")), way) for key, way in plan.items() if key.startswith("layers.")]
    modules: dict[str, Any] = dict(anatomy.backbone.named_modules())
    found: dict[str, dict[str, str]] = {}
    for path in modules:
        if way := next((way for pattern, way in ways if pattern.fullmatch(path)), None):
            if way not in (_OUTPUTS, _INPUTS, _NORM):
                raise _refused(f"the layers of {name} have {path}, which is not simply cut by its outputs or inputs")
            found.setdefault(path.rpartition(".")[0], {})[path] = way
    if not found:
        raise _refused(f"transformers knows no way to cut the layers of {name}")
    blocks: list[_Block] = []
    for path, parts in found.items():
        by_way = {way: {part: modules[part] for part, theirs in parts.items() if theirs == way} for way in (_OUTPUTS, _INPUTS, _NORM)}
        if not by_way[_OUTPUTS] or len(by_way[_INPUTS]) != 1:
            raise _refused(f"the layers of {name} have {path}, which does not go from layers cut by outputs to one cut by inputs")
        blocks.append(_Block(path, modules[path], by_way[_OUTPUTS], by_way[_INPUTS], list(by_way[_NORM].values())))
    return blocks


def _cut_linear(path: str, layer: Any, group: Group, names: dict[nn.Parameter, str], cuts: Cuts, *, by_outputs: bool) -> set[nn.Parameter]:
    """Cuts a linear layer and its adapter; returns all parameters of it."""
    found, base = projection(layer), _base(layer)
    if found is None or type(base) is not nn.Linear or (found.lora is not None and found.lora.magnitude is not None):
        raise _refused(f"{path} is no plain linear layer, with a plain LoRA adapter or none")
    side = 0 if by_outputs else 1
    parts: list[tuple[Any, int]] = [(base.weight, side)]
    whole: list[Any] = []
    if found.lora is not None:
        a, b = found.lora.a, found.lora.b
        parts.append((b, 0) if by_outputs else (a, 1))
        whole.append(a if by_outputs else b)
    if found.bias is not None and by_outputs:
        parts.append((found.bias, 0))
    elif found.bias is not None:
        whole.append(found.bias)
        if group.rank:  # it is added once
            vars(base)["forward"] = MethodType(_without_bias, base)
    for parameter, dim in parts:
        each = parameter.shape[dim] // group.size
        parameter.data = parameter.data.narrow(dim, group.rank * each, each).clone()
        cuts.dims[names[parameter]] = dim
    cuts.partial |= {names[parameter] for parameter in whole}
    base.out_features, base.in_features = base.weight.shape
    return {parameter for parameter, _ in parts} | set(whole)


def _share(block: nn.Module, group: Group) -> None:
    """Puts `spread` before a block and `total` behind it."""

    def enter(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (group.spread(inputs[0]), *inputs[1:]), options
        return inputs, {**options, "hidden_states": group.spread(options["hidden_states"])}

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (group.total(output[0]), *output[1:]) if isinstance(output, tuple) else group.total(output)

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave)


def _without_bias(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, layer.weight)


def _base(layer: Any) -> Any:
    """The linear layer under an adapter."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _dropped(block: Any) -> bool:
    return bool(getattr(block, "attention_dropout", 0.0))


def _refused(why: str) -> ConfigError:
    return ConfigError(f"the layers cannot be shared: {why}", where=_WHERE, hint="leave parallel.tensor out")
