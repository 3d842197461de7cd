"""Puts fast modules in the place of a model's own, each proven on the spot.

    find       the slots of this family (models/families.py): norms, linear layers, feed-forwards, attentions, layers
    watch      the model runs on a dozen tokens, and what each slot is called with is kept
    prove      a copy of the module runs on that with its own forward and with the replacement, forward and backward
    install    the replacement becomes the `forward` of this instance; no class is touched

A replacement is refused when it is further from the truth than the module that it replaces: the truth is the same module in a wider type.
Then the plain module stays, and the report says why. So a new release of transformers can make training slower, and never wrong.

Modules of one layer differ from those of the next in their weights only, so one of each kind is proven: a kind is a class with its shapes,
types and settings. A layer is proven with its own attention and feed-forward inside, for the norms and additions that it replaces, and
refused where one of these norms is. At the end the whole model runs once more on the same tokens, and must give what it gave before.
"""

# transformers, PEFT and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from burnish.models import fused
from burnish.models.families import FAMILIES, Family

Forward = Callable[..., Any]
"""A replacement: called like the module's own `forward`, with the module first."""

_SLACK = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""What a replacement may be off beyond twice the plain module's own error, relative to the size of what is compared.

In double precision it is the models' own norms that are off: they compute in single precision whatever they are given."""

_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


_PLAIN = frozenset({bool, int, float, str, type(None)})
"""Types of the attributes that are settings of a module."""


@dataclass(slots=True)
class Slot:
    """How many modules of one kind of slot there are, how many are replaced, and why the others are not."""

    found: int = 0
    replaced: int = 0
    refused: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True)
class KernelReport:
    """What patching came to, by slot."""

    slots: dict[str, Slot] = field(default_factory=dict[str, Slot])
    reason: str = ""  # why nothing was tried

    def line(self) -> str:
        """One line for people."""
        if self.reason:
            return f"kernels: the model's own ({self.reason})"
        parts = [f"{name} {slot.replaced}/{slot.found}" for name, slot in self.slots.items()]
        why = [f"{name}: {reason}" for name, slot in self.slots.items() for reason in slot.refused]
        return f"kernels: fast, each proven against the model's own: {', '.join(parts)}" + (f"; refused: {'; '.join(why)}" if why else "")


@dataclass(slots=True)
class _Place:
    """One module that could be replaced."""

    slot: str
    module: nn.Module
    forward: Forward
    kind: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """What a module was called with."""

    inputs: tuple[Any, ...]
    options: Mapping[str, Any]


def patch(model: Any, rehearse: Callable[[], torch.Tensor], rounding: torch.dtype | None = None) -> KernelReport:
    """Replaces what can be replaced in `model`, a transformers model with or without adapters in it.

    Args:
        model: Patched in place, instance by instance.
        rehearse: Runs the model on a few tokens and returns its hidden states [T, H]; called before and after.
        rounding: The type that it rounds to on the way; default: that of the hidden states.
    """
    family = FAMILIES.get(model.config.get_text_config(decoder=True).model_type)
    if family is None:
        return KernelReport(reason=f"no fast modules for {model.config.model_type}")
    places = list(_places(model, family))
    calls, before = _watch(places, rehearse)
    rounding = rounding or before.dtype
    allowed = 4 * _distance(_rehearse_otherwise_rounded(model, rehearse, rounding), before) + _SLACK.get(rounding, 1e-2)
    verdicts = {place.kind: _verdict(place, calls.get(place.kind)) for place in _firsts(places)}
    refused_norms = {place.module for place in places if place.slot == "norm" and verdicts[place.kind]}
    report = KernelReport()
    for place in places:
        slot = report.slots.setdefault(place.slot, Slot())
        slot.found += 1
        why = verdicts[place.kind]
        if not why and place.slot == "layer" and not refused_norms.isdisjoint(place.module.children()):
            why = "one of its norms is refused"
        if why:
            slot.refused[why] = slot.refused.get(why, 0) + 1
        else:
            _install(place.module, place.forward)
            slot.replaced += 1
    if not (off := _distance(rehearse(), before)) <= allowed:
        for place in places:
            unpatch(place.module)
        return KernelReport(reason=f"together they are off by {off:.1e}, allowed is {allowed:.1e}")
    return report


def unpatch(module: nn.Module) -> None:
    """Gives one module its own forward back."""
    if isinstance(vars(module).get("forward"), MethodType):
        del module.forward


def _install(module: nn.Module, forward: Forward) -> None:
    vars(module)["forward"] = MethodType(forward, module)


def _places(model: nn.Module, family: Family) -> Iterator[_Place]:
    inside: set[nn.Module] = set()
    for _, module in model.named_modules():
        found = fused.replacement(module, family) if module not in inside else None
        if found is not None and "forward" not in vars(module):  # somebody else's forward is left alone
            slot, forward = found
            if slot == "experts":  # PEFT wraps experts once for each adapted weight: the outermost stands for all of them
                inside.update(module.modules())
            yield _Place(slot, module, forward, (slot, *_kind(module)))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What modules that run the same code have in common: class, parts, shapes, types, settings. Not the weights' values."""
    parts = tuple((name, type(part), _settings(part)) for name, part in module.named_modules())
    weights = tuple((name, tuple(p.shape), p.dtype, p.requires_grad, p.device) for name, p in module.named_parameters())
    return type(module), parts, weights


def _settings(module: nn.Module) -> tuple[Any, ...]:
    return tuple((k, v) for k, v in vars(module).items() if type(v) in _PLAIN and k not in ("layer_idx", "training"))


def _firsts(places: list[_Place]) -> list[_Place]:
    return list({place.kind: place for place in reversed(places)}.values())


def _watch(places: list[_Place], rehearse: Callable[[], torch.Tensor]) -> tuple[dict[tuple[Any, ...], _Call], torch.Tensor]:
    """What one module of each kind is called with, and what the model gives."""
    calls: dict[tuple[Any, ...], _Call] = {}

    def keep(kind: tuple[Any, ...]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls.setdefault(kind, _Call(_detached(inputs), _detached(options)))

        return hook

    handles = [place.module.register_forward_pre_hook(keep(place.kind), with_kwargs=True) for place in _firsts(places)]
    try:
        return calls, rehearse()
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value


def _verdict(place: _Place, call: _Call | None) -> str:
    """Why the replacement is refused, or nothing."""
    if call is None:
        return "the model does not call it"
    try:
        return _compare(_livened(place.module), place.forward, call)
    except Exception as error:  # whatever a replacement, a copy or the model's own code raises: the plain module stays
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _livened(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose trained weights are all at work: a fresh adapter's B is zero and would hide everything behind it."""
    made = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad and not parameter.detach().any():
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(noise.to(parameter.dtype))
    return made


def _compare(module: nn.Module, forward: Forward, call: _Call) -> str:
    expected = _outcome(module, call)
    dtype = expected["output"].dtype
    truth = _truth(module, call, dtype)
    _install(module, forward)  # the same weights serve both: a layer is large
    found = _outcome(module, call)
    slack = _SLACK.get(dtype, 1e-2)
    if found.keys() != expected.keys():
        return f"it has another set of gradients: {', '.join(sorted(expected.keys() ^ found.keys()))}"
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return f"its {name} has shape {list(found[name].shape)}, expected {list(value.shape)}"
        reference = truth[name] if truth is not None else value
        scale = reference.double().norm().clamp_min(1e-30)
        own = ((value.double() - reference.double()).norm() / scale).item()
        theirs = ((found[name].double() - reference.double()).norm() / scale).item()
        allowed = 2 * own + (slack if truth is not None else 4 * slack)
        if not theirs <= allowed:  # also where it is not a number
            return f"its {name} is off by {theirs:.1e}, allowed is {allowed:.1e}"
    return ""


def _truth(plain: nn.Module, call: _Call, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The same in a wider type, or nothing where there is none (quantised weights, double precision itself)."""
    wide = _WIDER.get(dtype)
    if wide is None or any(not p.is_floating_point() for p in plain.parameters()):
        return None
    cast = _Call(_widened(call.inputs, wide), _widened(call.options, wide))
    made = copy.deepcopy(plain).to(wide)
    for part in made.modules():
        config: Any = vars(part).get("config")
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # the copy's own config: the grouped product knows no double precision
    with torch.autocast(next(plain.parameters()).device.type, enabled=False):
        return _outcome(made, cast)


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_widened(item, dtype) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Mapping):
        return {key: _widened(item, dtype) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value


def _outcome(module: nn.Module, call: _Call) -> dict[str, torch.Tensor]:
    """Output, gradient of the hidden states, and gradient of each trained weight, for one fixed direction."""
    inputs, options = list(call.inputs), dict(call.options)
    hidden = _hidden_states(inputs, options)
    leaf = hidden.detach().clone().requires_grad_()
    if inputs:
        inputs[0] = leaf
    else:
        options["hidden_states"] = leaf
    module.zero_grad()
    with torch.enable_grad():
        output = module(*inputs, **options)
        several = len(output) if isinstance(output, tuple) else 0
        output = output[0] if isinstance(output, tuple) else output
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output)
        output.backward(direction)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    named = {f"gradient of {name}": value for name, value in gradients.items()}
    return {"output": output.detach(), "number of outputs": torch.tensor(several), "input gradient": _some(leaf.grad), **named}


def _some(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None, "the output does not depend on the input"
    return gradient


def _hidden_states(inputs: list[Any], options: Mapping[str, Any]) -> torch.Tensor:
    return inputs[0] if inputs else options["hidden_states"]


def _rehearse_otherwise_rounded(model: Any, rehearse: Callable[[], torch.Tensor], rounding: torch.dtype) -> torch.Tensor:
    """The whole model with its embeddings off by their last bit: how far that moves it is what depth makes of rounding."""
    generator = torch.Generator().manual_seed(2)

    def nudge(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        epsilon = torch.finfo(rounding if rounding in _WIDER else torch.float32).eps
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + epsilon * signs)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        return rehearse()
    finally:
        handle.remove()


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()
