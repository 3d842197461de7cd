"""AdamW whose parameters, gradients and moments lie in a few flat buffers.

An adapter is hundreds of small tensors. One by one, a step is some 1200 small operations: a norm for each gradient, a scaling, the
update. Here the parameters of a device and type are views of one buffer, and so are their gradients and moments. A step is a norm of one
tensor and one pass of `kernels.adamw`.

    buffer      | group 0: q_proj.A | q_proj.B | ... | group 1: ... |      each parameter begins at a multiple of 256 elements
    parameter.data, parameter.grad, state["exp_avg"], ...                  views of it in the parameter's shape

What can be done to parameters and gradients from outside stays allowed; every step, and whoever asks for the buffers, looks first:

- A gradient that is a tensor of its own (somebody set it to None, and autograd made a new one) is copied into the buffer.
- A parameter without a gradient counts as one with a zero gradient, as it does in data parallel training. torch.optim.AdamW would pass it
  over; here its moments and its decay go on.
- A parameter that has left the buffer (`model.to(device)`, a deep copy) makes the buffers anew, where it is now.

`zero_grad` zeroes the buffers and leaves the views in place, whatever `set_to_none` says.

Flat gradients stay in memory between steps. For a whole model, where that is as much as the weights, `flat_gradients=False` leaves them to
autograd and gathers them buffer by buffer during a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from burnish.kernels.adamw import BLOCK, Quantised, Segment, adamw, adamw_8bit, quantise
from burnish.kernels.dispatch import Impl

__all__ = ["FlatAdamW"]

_MOST = 1 << 26
"""Elements of one buffer. While buffers are made, one of them is in memory twice."""

_SMALL = 4096
"""Parameters with fewer elements keep fp32 moments beside 8-bit ones: norms and biases, which are few and sensitive."""

_CODES = ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales")


@dataclass(slots=True)
class _Slot:
    """Where a parameter lies."""

    parameter: nn.Parameter
    number: int  # among all parameters, in the order of the groups
    group: int
    start: int
    stop: int  # rounded up to a whole block
    data: torch.Tensor
    grad: torch.Tensor | None
    address: int = 0  # of the data

    @property
    def end(self) -> int:
        return self.start + self.parameter.numel()


@dataclass(slots=True)
class _Buffer:
    """The parameters of one device, type and kind of moments."""

    flat: nn.Parameter  # with .grad, where gradients are flat
    bits: Literal[8, 32]
    moments: list[torch.Tensor] = field(default_factory=list[torch.Tensor])  # exp_avg, exp_avg_sq; or codes and scales
    master: torch.Tensor | None = None
    slots: list[_Slot] = field(default_factory=list[_Slot])

    def gathered(self) -> torch.Tensor:
        """All gradients; where they are not flat, a copy of them for one step."""
        if self.flat.grad is not None:
            return self.flat.grad
        grad = torch.zeros_like(self.flat)
        for slot in self.slots:
            if slot.parameter.grad is not None:
                _as(grad, slot).copy_(slot.parameter.grad)
        return grad


@dataclass(frozen=True, slots=True)
class _Options:
    bits: Literal[8, 32]
    master_weights: bool
    flat_gradients: bool
    impl: Impl


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) in one pass over flat buffers. Numerics, groups and state are those of `torch.optim.AdamW`.

    The state has torch's keys, one tensor for each parameter: `step`, `exp_avg`, `exp_avg_sq`. With fp32 moments a state written by
    either is read by the other. 8-bit moments have codes and scales of their own (see `kernels.adamw`) in place of the two; they take
    over fp32 moments when such a state is loaded.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        bits: Of each moment. 8: 2.03 bytes of state for each element instead of 8.
        master_weights: Half precision parameters have a master copy in fp32, which is what is updated, and moments in fp32. Without it
            their moments are in half precision too, as torch has it. The master is read from the parameters at the first step; after
            that, loading a state is the way to change it.
        flat_gradients: Gradients lie in the buffers too.
        impl: Who computes the step, see `kernels.dispatch`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: Literal[8, 32] = 32,
        master_weights: bool = False,
        flat_gradients: bool = True,
        impl: Impl = "auto",
    ) -> None:
        # The keys of torch's AdamW, so that it takes our groups for its own.
        also = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": True}
        self._options = _Options(bits, master_weights, flat_gradients, impl)
        self._buffers: list[_Buffer] = []
        self._stale = True
        self._steps = torch.zeros(0)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled_weight_decay": True, **also}
        super().__init__(params, defaults)
        self._settle()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; they join the buffers at the next step."""
        super().add_param_group(param_group)
        self._stale = True

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_scale: float = 1.0) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter. `grad_scale` is a factor on all gradients, as clipping and loss scaling need it."""
        self._settle()
        self._steps += 1
        steps = [int(step) for step in self._steps.tolist()]
        impl = self._options.impl
        for buffer in self._buffers:
            self._begin_master(buffer)
            segments = self._segments(buffer, steps)
            param, shadow = (buffer.flat.data, None) if buffer.master is None else (buffer.master, buffer.flat.data)
            grad, moments = buffer.gathered(), buffer.moments
            if buffer.bits == 8:
                adamw_8bit(param, grad, Quantised(*moments), segments, grad_scale=grad_scale, shadow=shadow, impl=impl)
            else:
                adamw(param, grad, moments[0], moments[1], segments, grad_scale=grad_scale, shadow=shadow, impl=impl)
        # The kernels write to the buffers behind the parameters' backs.
        torch.autograd.graph.increment_version([slot.parameter for buffer in self._buffers for slot in buffer.slots])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes flat gradients, which stay views of the buffers: `set_to_none` has no effect on them."""
        if not self._options.flat_gradients:
            super().zero_grad(set_to_none)
            return
        if self._stale:
            self._settle()
        for buffer in self._buffers:
            buffer.gathered().zero_()
            for slot in buffer.slots:
                slot.parameter.grad = slot.grad

    @property
    def flat_gradients(self) -> bool:
        """Whether the gradients lie in the buffers."""
        return self._options.flat_gradients

    def flat_parameters(self) -> list[nn.Parameter]:
        """The buffers, each with its flat gradients as `.grad`: for what is done to all at once (a norm, an average over ranks)."""
        self._settle()
        return [buffer.flat for buffer in self._buffers]

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """The norm of all flat gradients, on the first buffer's device.

        By rows, then of the rows' norms: torch's norm of a long vector on a CPU adds up in fp32 (2e-4 off at 5 M elements).
        """
        grads = [parameter.grad for parameter in self.flat_parameters() if parameter.grad is not None]
        if not grads:
            return torch.zeros(())
        device = grads[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        rows = [
            torch.linalg.vector_norm(grad.view(-1, BLOCK), dim=1, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads
        ]
        return torch.linalg.vector_norm(torch.cat([norms.to(device, wide) for norms in rows]))

    def release(self) -> None:
        """Gives every parameter memory of its own again, and no gradient. For the end of training; a further step makes new buffers."""
        for buffer in self._buffers:
            for slot in buffer.slots:
                if _lies_in(slot):
                    slot.parameter.data = slot.data.clone()
                slot.parameter.grad = None
        self._stale = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, or torch's AdamW did.

        Raises:
            ValueError: other parameters, the state of another optimiser, or of AMSGrad.
        """
        groups = state_dict["param_groups"]
        if any(group.get("amsgrad") or group.get("maximize") for group in groups):
            raise ValueError("the state is of AdamW with amsgrad or maximize, which this one has not")
        numbers = [number for group in groups for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        found: dict[torch.Tensor, dict[str, Any]] = {}
        for number, parameter in zip(numbers, parameters, strict=False):  # unequal numbers are refused below
            if state := state_dict["state"].get(number):
                found[parameter] = _checked(state, parameter, self._bits(parameter))
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(found)
        self._settle()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers, self._steps, self._stale = [], torch.zeros(0), True

    def _bits(self, parameter: nn.Parameter) -> Literal[8, 32]:
        return 32 if parameter.numel() < _SMALL else self._options.bits

    @torch.no_grad()
    def _settle(self) -> None:
        """Brings parameters and gradients that somebody took out of the buffers back in."""
        if self._stale or not all(_lies_in(slot) for buffer in self._buffers for slot in buffer.slots):
            self._build()
        if not self._options.flat_gradients:
            return
        for buffer in self._buffers:
            for slot in buffer.slots:
                grad = slot.parameter.grad
                if grad is slot.grad or slot.grad is None:
                    continue
                if grad is None:
                    slot.grad.zero_()
                else:
                    slot.grad.copy_(grad)
                slot.parameter.grad = slot.grad

    def _build(self) -> None:
        """Makes the buffers where the parameters are now, with the moments of `self.state`."""
        self._buffers = []  # what was in them is kept by the views that are still in use
        members: dict[tuple[torch.device, torch.dtype, int], list[list[tuple[nn.Parameter, int, int]]]] = {}
        number = 0
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if not parameter.is_floating_point():
                    raise ValueError(f"only floating point parameters can be trained, found {parameter.dtype}")
                runs = members.setdefault((parameter.device, parameter.dtype, self._bits(parameter)), [[]])
                if runs[-1] and sum(_padded(p) for p, _, _ in runs[-1]) + _padded(parameter) > _MOST:
                    runs.append([])
                runs[-1].append((parameter, number, index))
                number += 1
        self._steps = torch.zeros(number)
        for (_, _, bits), runs in members.items():
            for run in runs:
                if run:
                    self._buffers.append(self._buffer(run, 8 if bits == 8 else 32))
        self._stale = False

    def _buffer(self, run: list[tuple[nn.Parameter, int, int]], bits: Literal[8, 32]) -> _Buffer:
        first = run[0][0]
        size = sum(_padded(parameter) for parameter, _, _ in run)
        flat = nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device))
        if self._options.flat_gradients:
            flat.grad = torch.zeros_like(flat)
        buffer = _Buffer(flat, bits)
        half = first.dtype in (torch.float16, torch.bfloat16)
        wide = torch.float32 if half and self._options.master_weights else first.dtype
        if half and self._options.master_weights:
            buffer.master = torch.zeros(size, device=first.device)  # filled by `_begin_master`
        if bits == 8:
            state = Quantised.zeros(size, first.device)
            buffer.moments = [state.first, state.first_scale, state.second, state.second_scale]
        else:
            buffer.moments = [torch.zeros(size, dtype=wide, device=first.device) for _ in range(2)]
        start = 0
        for parameter, number, group in run:
            slot = _Slot(parameter, number, group, start, start + _padded(parameter), *_views(flat, parameter, start))
            self._move_in(buffer, slot)
            buffer.slots.append(slot)
            start = slot.stop
        return buffer

    def _move_in(self, buffer: _Buffer, slot: _Slot) -> None:
        parameter = slot.parameter
        slot.data.copy_(parameter.data)
        parameter.data = slot.data
        if slot.grad is not None:
            if parameter.grad is not None:
                slot.grad.copy_(parameter.grad)
            parameter.grad = slot.grad
        slot.address = parameter.data_ptr()
        before: Mapping[str, Any] = self.state.get(parameter) or {}
        state: dict[str, torch.Tensor] = {"step": self._steps[slot.number]}
        if buffer.bits == 8:
            moments = Quantised(*buffer.moments).part(slot.start, slot.stop)
            state |= dict(zip(_CODES, (moments.first, moments.first_scale, moments.second, moments.second_scale), strict=True))
            before = _narrow(before, slot)
        else:
            state |= {key: _as(flat, slot) for key, flat in zip(("exp_avg", "exp_avg_sq"), buffer.moments, strict=True)}
        if buffer.master is not None and "master" in before:
            state["master"] = _as(buffer.master, slot)
        for key, value in before.items():
            if key in state:
                state[key].copy_(torch.as_tensor(value))
        self.state[parameter] = state

    def _begin_master(self, buffer: _Buffer) -> None:
        """Reads the master weights from parameters that have none yet."""
        if buffer.master is None:
            return
        for slot in buffer.slots:
            state = self.state[slot.parameter]
            if "master" not in state:
                buffer.master[slot.start : slot.stop].copy_(buffer.flat.data[slot.start : slot.stop])
                state["master"] = _as(buffer.master, slot)

    def _segments(self, buffer: _Buffer, steps: list[int]) -> list[Segment]:
        """Neighbours of one group with the same number of steps are one segment: as many as there are groups, as a rule."""
        found: list[Segment] = []
        run: tuple[int, int] | None = None
        start = 0
        for slot, following in zip(buffer.slots, [*buffer.slots[1:], None], strict=True):
            key = (slot.group, steps[slot.number])
            if key != run:
                run, start = key, slot.start
            if following is None or (following.group, steps[following.number]) != key:
                group = self.param_groups[slot.group]
                (beta1, beta2), step = group["betas"], steps[slot.number]
                found.append(Segment(start, slot.stop, float(group["lr"]), group["weight_decay"], step, beta1, beta2, group["eps"]))
        return found


def _padded(parameter: torch.Tensor) -> int:
    return max(1, -(-parameter.numel() // BLOCK)) * BLOCK


def _as(flat: torch.Tensor, slot: _Slot) -> torch.Tensor:
    """A slot's part of another buffer, in the parameter's shape."""
    return flat[slot.start : slot.end].view(slot.parameter.shape)


def _views(flat: nn.Parameter, parameter: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    part = slice(start, start + parameter.numel())
    return flat.data[part].view(parameter.shape), None if flat.grad is None else flat.grad[part].view(parameter.shape)


def _lies_in(slot: _Slot) -> bool:
    return slot.parameter.data_ptr() == slot.address


def _narrow(before: Mapping[str, Any], slot: _Slot) -> Mapping[str, Any]:
    """Moments in fp32 as codes and scales; what are codes already stays."""
    if "exp_avg" not in before:
        return before
    size = slot.stop - slot.start
    wide = [torch.zeros(size) for _ in range(2)]
    for flat, key in zip(wide, ("exp_avg", "exp_avg_sq"), strict=True):
        flat[: slot.parameter.numel()].copy_(before[key].flatten())
    state = Quantised.zeros(size, torch.device("cpu"))
    quantise(wide[0], wide[1], state)
    codes = zip(_CODES, (state.first, state.first_scale, state.second, state.second_scale), strict=True)
    return {**{key: value for key, value in before.items() if not key.startswith("exp_avg")}, **dict(codes)}


def _checked(found: Mapping[str, Any], parameter: nn.Parameter, bits: int) -> dict[str, Any]:
    """The state of one parameter, where it is one that can be taken over."""
    shapes: dict[str, tuple[int, ...]] = {"step": ()}
    if bits == 8 and "exp_avg" not in found:
        size = _padded(parameter)
        shapes |= dict(zip(_CODES, ((size,), (size // BLOCK,)) * 2, strict=True))
    else:
        shapes |= dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(parameter.shape))
    for key, shape in shapes.items():
        seen = tuple(torch.as_tensor(found[key]).shape) if key in found else None
        if seen != shape:
            raise ValueError(f"'{key}' of a parameter of shape {tuple(parameter.shape)} is {seen}, expected {shape}")
    return {key: found[key] for key in (*shapes, *(["master"] if "master" in found else []))}
