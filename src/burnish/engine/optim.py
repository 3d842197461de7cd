"""Optimisers by name, and the groups of parameters they work on.

Every group carries `peak_lr`: the schedule multiplies it, so groups with a rate of their own rise and fall with the rest.
"""
# torch._foreach_* (one kernel for a list of tensors) has no public name
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from burnish.config.sections import Optimizer as OptimizerConfig
from burnish.config.sections import RateGroup, Train
from burnish.core.errors import ConfigError, DependencyError, Where
from burnish.engine.combined import Combined, InBackward, refuse_in_backward
from burnish.engine.flat import FlatAdamW

__all__ = [
    "Combined",
    "FlatAdamW",
    "InBackward",
    "Lion",
    "averaged_weights",
    "build_optimizer",
    "parameter_groups",
    "set_learning_rate",
    "use_final_weights",
]

Group = dict[str, Any]
Builder = Callable[[list[Group], OptimizerConfig], torch.optim.Optimizer]


def build_optimizer(
    named_parameters: Mapping[str, nn.Parameter], train: Train, *, in_backward: bool = False, parted: bool = False
) -> torch.optim.Optimizer:
    """The optimiser that the run file names, over parameter groups with their own rates and weight decay.

    Args:
        named_parameters: The trained parameters by full name; their order is the order of the groups.
        train: The section `train`.
        in_backward: Update each parameter within the backward pass (see `engine.combined.InBackward`).
        parted: The parameters are parts, which averages and norms tell from whole ones, and may not be moved: so no flat buffers.

    Raises:
        ConfigError: a pattern of `train.rates` matches nothing, an option means nothing to this optimiser, the device lacks it, or
            `in_backward` is asked for together with clipping or with an optimiser that cannot do it.
        DependencyError: the optimiser's package is not installed.
    """
    config = train.optimizer
    build, options = _OPTIMIZERS[config.kind]
    build = _plain_adamw if parted and build is _adamw else build
    _refuse_options_without_effect(config, options)
    groups = parameter_groups(named_parameters, train)
    if in_backward:
        refuse_in_backward(config.kind, train.clip)
        optimizer = InBackward(groups, lambda part: build(part, config))
    else:
        optimizer = build(groups, config)
    set_learning_rate(optimizer, 1.0)
    return optimizer


def parameter_groups(named_parameters: Mapping[str, nn.Parameter], train: Train) -> list[Group]:
    """Parameters with the same learning rate and weight decay, together.

    The first pattern of `train.rates` that is found in a name decides. Elsewhere the rate is `train.learning_rate`, times
    `train.lora_plus_ratio` for LoRA's B matrices (LoRA+, 2402.12354), and the decay is `train.weight_decay` for matrices, 0 for vectors.
    """
    patterns = [re.compile(rate.match) for rate in train.rates]
    used: set[int] = set()
    groups: dict[tuple[float, float], Group] = {}
    for name, parameter in named_parameters.items():
        number = next((n for n, pattern in enumerate(patterns) if pattern.search(name)), None)
        rate = train.rates[number] if number is not None else None
        if number is not None:
            used.add(number)
        key = _rate_and_decay(name, parameter, train, rate)
        group = groups.setdefault(key, {"params": [], "names": [], "peak_lr": key[0], "lr": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    _refuse_unused(train, used, named_parameters)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Sets every group to its peak rate times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters hold the weights to judge and to export.

    Only schedule-free optimisers tell them from the weights that are trained: they evaluate at an average (2405.15682). The trained
    weights come back bit for bit afterwards, which the package's own switch, an interpolation there and back, does not promise.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]  # schedule-free only
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, trained)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def use_final_weights(optimizer: torch.optim.Optimizer) -> None:
    """Leaves the weights to judge and to export in the parameters, at the end of training (see `averaged_weights`), and nothing else."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]  # schedule-free only
    if isinstance(optimizer, FlatAdamW | InBackward):
        optimizer.release()


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, 2302.06675, algorithm 2): the sign of an interpolated momentum, with decoupled weight decay.

    update = sign(b1 m + (1 - b1) g);  p = (1 - lr wd) p - lr update;  m = b2 m + (1 - b2) g
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closures here
        """One update of every parameter that has a gradient, a few kernels for all of a group's tensors at once."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            momenta = [self.state[p]["exp_avg"] for p in parameters]
            beta1, beta2 = group["betas"]
            update = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(update)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, update, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)


def _rate_and_decay(name: str, parameter: nn.Parameter, train: Train, rate: RateGroup | None) -> tuple[float, float]:
    learning_rate = train.learning_rate
    if train.lora_plus_ratio is not None and _is_lora_b(name):
        learning_rate *= train.lora_plus_ratio
    weight_decay = train.weight_decay if parameter.ndim >= 2 else 0.0
    if rate is not None:
        learning_rate = learning_rate if rate.learning_rate is None else rate.learning_rate
        weight_decay = weight_decay if rate.weight_decay is None else rate.weight_decay
    return learning_rate, weight_decay


def _is_lora_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


def _refuse_unused(train: Train, used: set[int], named_parameters: Mapping[str, nn.Parameter]) -> None:
    names = list(named_parameters)
    for number, rate in enumerate(train.rates):
        if number not in used:
            raise ConfigError(
                f"'{rate.match}' decides about no trained parameter: it matches none, or earlier patterns take them all",
                where=Where(field=f"train.rates[{number}].match"),
                hint=f"trained parameters are named like '{names[0]}'" if names else "no parameter is trained",
            )
    if train.lora_plus_ratio is not None and not any(_is_lora_b(name) for name in names):
        raise ConfigError(
            "LoRA+ gives LoRA's B matrices a rate of their own, and this run trains none",
            where=Where(field="train.lora_plus_ratio"),
            hint="add an adapter, or use train.rates",
        )


def _refuse_options_without_effect(config: OptimizerConfig, options: frozenset[str]) -> None:
    fields = OptimizerConfig.model_fields
    for option in ("betas", "eps", "momentum"):
        if option not in options and getattr(config, option) != fields[option].default:
            users = [kind for kind, (_, used) in _OPTIMIZERS.items() if option in used]
            raise ConfigError(
                f"'{option}' has no effect on {config.kind}; it belongs to {', '.join(users)}",
                where=Where(field=f"train.optimizer.{option}"),
            )


def _devices(groups: list[Group]) -> set[str]:
    return {p.device.type for group in groups for p in group["params"]}


def _package(name: str, kind: str, extra: str) -> Any:
    # An optional package: it is looked for when its optimiser is asked for.
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DependencyError(
            f"the optimiser '{kind}' needs the package {name}, which is not installed",
            where=Where(field="train.optimizer"),
            hint=f"pip install 'burnish[{extra}]'",
        ) from None


def _adamw(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Flat buffers for adapters, torch's own for whole models.

    An adapter's hundreds of small tensors are worth one buffer. Flat gradients stay in memory between steps, which is nothing for an
    adapter and as much as the weights for a whole model, whose tensors are large enough to be fast one by one.
    """
    if _is_adapter(groups):
        return FlatAdamW(groups, betas=config.betas or (0.9, 0.999), eps=config.eps)
    return _plain_adamw(groups, config)


def _plain_adamw(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    betas, eps = config.betas or (0.9, 0.999), config.eps
    # Fused: one kernel for all tensors of a group, on the CPU too.
    fused = _devices(groups) <= {"cpu", "cuda", "mps", "xpu"}
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused)


def _is_adapter(groups: list[Group]) -> bool:
    parameters = [p for group in groups for p in group["params"]]
    # One parameter alone gains nothing: that is how `InBackward` asks.
    return len(parameters) > 1 and any("lora_" in name for group in groups for name in group["names"])


def _adamw_8bit(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    # bitsandbytes where it is installed: what runs were measured with, and its state stays readable. Ours needs no package.
    if _is_there("bitsandbytes"):
        return _bitsandbytes("AdamW8bit")(groups, config)
    return FlatAdamW(groups, betas=config.betas or (0.9, 0.999), eps=config.eps, bits=8, flat_gradients=_is_adapter(groups))


def _is_there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _adafactor(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    # The run's learning rate is the rate (1804.04235, section 9 without relative steps): with updates scaled by the parameter's own
    # size LoRA's B, which starts at zero, would hardly move.
    # Imported when it is asked for, because half of transformers' trainer comes with it.
    package = _package("transformers.optimization", config.kind, "optim")
    return package.Adafactor(groups, lr=groups[0]["lr"], scale_parameter=False, relative_step=False, warmup_init=False)


def _lion(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    return Lion(groups, betas=config.betas or (0.9, 0.99))


def _sgd(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=config.momentum)


_NOT_HIDDEN = re.compile(r"embed|lm_head|wte|wpe")


def _muon(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for the hidden layers' matrices, AdamW for vectors, embeddings and the head, as its authors advise.

    The update is scaled to the size of AdamW's (2502.16982, section 2.2), so that one learning rate suits both.
    """

    def is_hidden(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and not _NOT_HIDDEN.search(name)

    hidden = _part(groups, is_hidden)
    rest = _part(groups, lambda name, parameter: not is_hidden(name, parameter))
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(torch.optim.Muon(hidden, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(_adamw(rest, config))
    return Combined(parts)


def _part(groups: list[Group], wanted: Callable[[str, nn.Parameter], bool]) -> list[Group]:
    parts: list[Group] = []
    for group in groups:
        members = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if wanted(n, p)]
        if members:
            parts.append({**group, "names": [n for n, _ in members], "params": [p for _, p in members]})
    return parts


def _adamw_schedule_free(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    package = _package("schedulefree", config.kind, "optim")
    optimizer = package.AdamWScheduleFree(groups, betas=config.betas or (0.9, 0.999), eps=config.eps)
    optimizer.train()
    return optimizer


def _bitsandbytes(name: str) -> Builder:
    def build(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
        if name.startswith("Paged") and "cuda" not in _devices(groups):
            raise ConfigError(
                f"'{config.kind}' pages its state between a GPU and the host, and this run has no GPU; found device: "
                f"{', '.join(sorted(_devices(groups))) or 'none'}",
                where=Where(field="train.optimizer"),
                hint=f"use {config.kind.removeprefix('paged_')}",
            )
        package = _package("bitsandbytes", config.kind, "quant")
        return getattr(package.optim, name)(groups, betas=config.betas or (0.9, 0.999), eps=config.eps)

    return build


_ADAM = frozenset({"betas", "eps"})
_OPTIMIZERS: dict[str, tuple[Builder, frozenset[str]]] = {
    # name: (how it is built, which options of train.optimizer it knows)
    "adamw": (_adamw, _ADAM),
    "adamw_8bit": (_adamw_8bit, _ADAM),
    "paged_adamw": (_bitsandbytes("PagedAdamW"), _ADAM),
    "paged_adamw_8bit": (_bitsandbytes("PagedAdamW8bit"), _ADAM),
    "adafactor": (_adafactor, frozenset()),
    "lion": (_lion, frozenset({"betas"})),
    "muon": (_muon, _ADAM | {"momentum"}),
    "sgd": (_sgd, frozenset({"momentum"})),
    "adamw_schedule_free": (_adamw_schedule_free, _ADAM),
}
