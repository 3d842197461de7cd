"""Which parts of a model an adapter goes on, by short names, by groups, or by a pattern over full names.

A name that matches nothing is an error: an adapter that silently misses a layer trains worse, and nobody sees why.
"""

# transformers, PEFT and NumPy are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from burnish.core.errors import AdapterError, did_you_mean
from burnish.core.log import info
from burnish.models.score import score_of

_GROUPS = {
    "attention": re.compile(r"(^|[._])(attn|attention|self_attn|self_attention)([._]|$)"),
    "mlp": re.compile(r"(^|[._])(mlp|ffn|feed_forward|block_sparse_moe|experts?|shared_experts?)([._]|$)"),
}
_PLAIN_NAME = re.compile(r"[\w.]+")
_EXPERT_DIMENSIONS = 3


@dataclass(frozen=True, slots=True)
class Targets:
    """What an adapter is put on.

    `modules` are names as PEFT matches them (the ends of full names), `parameters` the weights of fused experts. `smallest` is the
    smallest side of all targeted matrices, the largest rank that makes sense.
    """

    modules: list[str]
    parameters: list[str]
    transposed: bool
    smallest: int
    smallest_name: str


def find_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> Targets:
    """The targets that `all`, `attention`, `mlp`, a list of names, or one regular expression over full names stands for.

    Raises:
        AdapterError: when a name or pattern matches no linear layer.
    """
    layers = {name: layer for name, layer in _layers(model).items() if layer is not score_of(model)}
    experts = {
        name: parameter for name, parameter in model.named_parameters() if parameter.dim() == _EXPERT_DIMENSIONS and "expert" in name
    }
    names = [*layers, *experts]
    chosen = _choose(names, targets, _head_name(model))
    sides = {name: _side(layers[name]) if name in layers else min(experts[name].shape[1:]) for name in chosen}
    if isinstance(targets, str) and targets in ("all", *_GROUPS):
        sides = _without_gates(sides)
    chosen = list(sides)
    modules = [name for name in chosen if name in layers]
    smallest_name = min(sides, key=lambda name: sides[name])
    return Targets(
        modules=_shorten(modules, [name for name, _ in model.named_modules()]),
        parameters=_shorten([name for name in chosen if name in experts], [name for name, _ in model.named_parameters()], parts=3),
        transposed=any(isinstance(layers[name], Conv1D) for name in modules),
        smallest=sides[smallest_name],
        smallest_name=smallest_name,
    )


def find_whole_modules(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Checks the names of modules that are trained whole.

    Raises:
        AdapterError: when a name matches no module that has weights.
    """
    known = {name for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    for name in names:
        if not any(_ends(full, name) for full in known):
            raise AdapterError(f"adapter.save_modules: no module '{name}', {did_you_mean(name, {_last(full) for full in known})}")
    return list(names)


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)}


def _choose(names: Sequence[str], targets: str | Sequence[str], head: str | None) -> list[str]:
    linear = [name for name in names if name != head and not name.endswith(("embed_tokens", "wte", "wpe", "embed_in"))]
    if targets == "all":
        chosen = linear
    elif isinstance(targets, str) and targets in _GROUPS:
        chosen = [name for name in linear if _GROUPS[targets].search(name)]
    elif isinstance(targets, str) and not _PLAIN_NAME.fullmatch(targets):
        chosen = _by_pattern(names, targets)
    else:
        wanted = [targets] if isinstance(targets, str) else targets
        chosen = _by_name(names, wanted)
    if not chosen:
        raise AdapterError(f"adapter.targets: '{targets}' matches no linear layer, {_known(names)}")
    return chosen


def _by_pattern(names: Sequence[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"adapter.targets: '{pattern}' is not a regular expression: {error}") from error
    return [name for name in names if compiled.fullmatch(name)]


def _by_name(names: Sequence[str], wanted: Iterable[str]) -> list[str]:
    chosen: dict[str, None] = {}
    for name in wanted:
        matches = [full for full in names if _ends(full, name)]
        if not matches:
            raise AdapterError(f"adapter.targets: no linear layer '{name}', {did_you_mean(name, {_last(full) for full in names})}")
        chosen |= dict.fromkeys(matches)
    return [name for name in names if name in chosen]


def _shorten(chosen: Sequence[str], every: Sequence[str], parts: int = 1) -> list[str]:
    """The shortest ends of names (`parts` long) where they mean exactly the chosen modules, else their full names."""
    ends = sorted({".".join(name.split(".")[-parts:]) for name in chosen})
    matched = {name for name in every if any(_ends(name, end) for end in ends)}
    return ends if matched == set(chosen) else list(chosen)


def _ends(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _known(names: Iterable[str]) -> str:
    return f"known: {', '.join(sorted({_last(name) for name in names}))}"


def _head_name(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _without_gates(sides: dict[str, int]) -> dict[str, int]:
    """Layers with one output (Qwen2-MoE's gate of its shared expert) are no matrices of low rank: nobody means them by a group's name."""
    gates = [name for name, side in sides.items() if side == 1]
    if not gates or len(gates) == len(sides):
        return sides
    info(f"adapter: {len(gates)} layers with a single output get none ({', '.join(sorted({_last(name) for name in gates}))})")
    return {name: side for name, side in sides.items() if side > 1}


def _side(layer: Any) -> int:
    return min(layer.weight.shape) if _dense(layer) else _features(layer)


def _dense(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _features(layer: Any) -> int:
    """Quantised layers keep their weight in another shape, and say what it stands for."""
    return min(int(layer.in_features), int(layer.out_features))
