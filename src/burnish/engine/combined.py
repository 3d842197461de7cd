"""Optimisers made of others: one for each kind of parameter, or one for each parameter that acts as soon as its gradient is final."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from burnish.core.errors import ConfigError, TrainingError, Where

__all__ = ["Combined", "InBackward", "Witness", "refuse_in_backward"]

Group = dict[str, Any]


class Combined(torch.optim.Optimizer):
    """Several optimisers over parameters of their own that act as one: one step, one list of groups, one state."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share_groups()

    def _share_groups(self) -> None:
        # The groups are the parts' own dictionaries: a learning rate set here is set there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closures here
        """One step of each part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' own states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


class InBackward(Combined):
    """Updates each parameter within the backward pass, as soon as its gradient is final, and forgets the gradient.

    The gradients of the whole model are never there at once: of N trained elements that saves 4 N bytes at the end of the backward pass,
    where only one tensor's gradient is left. The result is that of an ordinary step, bit for bit, since AdamW and its like update
    every element by itself, and so do the others by tensors.

    What needs all gradients before the first update cannot be had: clipping by the global norm, several micro-batches or processes in a
    step, and going back when the gradient turns out not to be finite (a tensor whose gradient is not finite is updated with a gradient
    of zero, and the step is reported as skipped).

    Args:
        groups: The parameters.
        build: Makes the optimiser of one group; called for every parameter.
    """

    def __init__(self, groups: list[Group], build: Callable[[list[Group]], torch.optim.Optimizer]) -> None:
        members = [(group, number) for group in groups for number in range(len(group["params"]))]
        super().__init__([build([_only(group, number)]) for group, number in members])
        self._norms: dict[nn.Parameter, torch.Tensor] = {}
        self._armed = False
        self.hooks = [self._watch(group["params"][number], part) for (group, number), part in zip(members, self.parts, strict=True)]

    def begin(self) -> None:
        """Allows the one backward pass of a step. Learning rates must be set by now.

        Raises:
            TrainingError: this step has had its backward pass.
        """
        if self._armed or self._norms:
            self.refuse_more()
        self._armed = True

    def refuse_more(self) -> NoReturn:
        """Says that a step must not have several micro-batches.

        Raises:
            TrainingError: always.
        """
        raise TrainingError(
            "the optimiser updates within the backward pass, so a step has one micro-batch, and this one has more",
            hint="raise train.micro_batch_tokens, lower train.batch_size, or set train.optimizer.in_backward: false",
        )

    def finish(self) -> dict[nn.Parameter, torch.Tensor]:
        """Ends the step and tells the norm of every parameter's gradient."""
        found, self._norms, self._armed = self._norms, {}, False
        return found

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closures here
        """Not to be called: the backward pass has done it."""
        raise TrainingError("the optimiser updates within the backward pass; call begin() before it and finish() after it")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do but for gradients that were made without `begin`."""
        super().zero_grad(set_to_none=True)

    def release(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self.hooks:
            hook.remove()

    def _watch(self, parameter: nn.Parameter, part: torch.optim.Optimizer) -> Any:
        @torch.no_grad()
        def update(final: torch.Tensor) -> None:
            if not self._armed or final.grad is None:
                return  # a backward pass that is nobody's step
            if parameter in self._norms:
                raise TrainingError("a parameter got its gradient twice in one step, which an update within the backward pass cannot have")
            norm = torch.linalg.vector_norm(final.grad, dtype=torch.float32)
            self._norms[parameter] = norm
            final.grad.masked_fill_(~norm.isfinite(), 0)
            part.step()
            final.grad = None

        return parameter.register_post_accumulate_grad_hook(update)


class Witness:
    """Stands for a parameter before `engine.guard`: its gradient is gone by then, but not what was seen of it.

    Args:
        parameter: The parameter, before the first update.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.grad: torch.Tensor | None = None
        self._before = torch.count_nonzero(parameter.detach())

    def detach(self) -> torch.Tensor:
        """How many elements were not zero before the update that is looked at."""
        return self._before

    def note(self, norms: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Takes the gradient's norm for the gradient."""
        self.grad = norms.get(self.parameter)

    def settle(self) -> None:
        """Makes now the state before the next update."""
        self.grad, self._before = None, torch.count_nonzero(self.parameter.detach())


def refuse_in_backward(kind: str, clip: float | None) -> None:
    """Says what cannot be had together with updates within the backward pass.

    Raises:
        ConfigError: clipping is on, or the optimiser counts steps for all parameters at once.
    """
    if clip is not None:
        raise ConfigError(
            f"clipping by the global norm ({clip:g}) needs all gradients, and with in_backward each is gone once it is used",
            where=Where(field="train.clip"),
            hint="set train.clip: null, or train.optimizer.in_backward: false",
        )
    if kind in ("adamw_schedule_free", "paged_adamw", "paged_adamw_8bit"):
        raise ConfigError(
            f"'{kind}' works on all parameters at once and cannot update within the backward pass",
            where=Where(field="train.optimizer.in_backward"),
            hint="use adamw or adamw_8bit",
        )


def _only(group: Group, number: int) -> Group:
    """The group with one of its parameters."""
    return {**group, "params": [group["params"][number]], **({"names": [group["names"][number]]} if "names" in group else {})}
