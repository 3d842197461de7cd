"""One optimiser step: add up micro-batches, then update.

The gradient of a step is that of  sum over all micro-batches and ranks of loss.sum / step_weight,  whatever the cut into micro-batches
and ranks was. Each micro-batch is divided by the weight of the *whole step*, which the loader knows in advance; ranks average their
gradients, so the local share is multiplied by their number first. Ranks that share micro-batches count as one (`engine.grid`).
"""
# torch._foreach_* (one kernel for a list of tensors) has no public name
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from burnish.config.sections import Recovery
from burnish.core.errors import ConfigError, TrainingError, Where
from burnish.data.types import Batch
from burnish.engine.backend import Backend
from burnish.engine.combined import InBackward, Witness, refuse_in_backward
from burnish.engine.flat import FlatAdamW
from burnish.engine.guard import GradientGuard
from burnish.engine.optim import set_learning_rate
from burnish.engine.spikes import Spikes
from burnish.objectives.base import Loss, Objective, StepObjective, Totals

__all__ = ["StepResult", "Stepper", "begin_step", "is_out_of_memory"]


Fault = Literal["non_finite", "spike"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step did, over all ranks."""

    step: int  # from 1: steps done, this one included
    loss: float  # per unit of weight (per token for SFT), before the update
    grad_norm: float  # global norm before clipping
    learning_rate: float  # of the groups without a rate of their own
    tokens: int  # computed
    trained_tokens: int  # predictions with a loss
    examples: int
    fault: Fault | None = None  # why the weights stayed as they were
    metrics: dict[str, float] = field(default_factory=dict[str, float])  # the objective's own, as means
    roll_back: bool = False  # the run is to go back to an older state, see `Recovery`

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were."""
        return self.fault is not None


def begin_step(batches: Iterable[Batch], objective: Objective, policy: Any, backend: Backend) -> Iterable[Batch]:
    """The micro-batches of a step on the device, after an objective that wants to see all of them first has seen them."""
    moved = (batch.to(backend.device) for batch in batches)
    if not isinstance(objective, StepObjective):
        return moved
    whole = list(moved)
    with backend.autocast():
        if backend.world_size == 1 or backend.coupled:
            backend.compute(lambda: objective.begin_step(policy, whole, backend.sums))
        else:
            _together(backend, lambda totals: objective.begin_step(policy, whole, totals))
    return whole


class _NoMemoryElsewhere(MemoryError):
    """Memory has run out on another rank."""


def _together(backend: Backend, call: Callable[[Totals], None]) -> None:
    """Calls what adds up over the ranks: where memory runs out on one of them, it does so on all, and none waits for a sum."""

    def agree(failed: bool) -> None:
        if backend.any(failed) and not failed:
            raise _NoMemoryElsewhere("out of memory on another rank")

    def totals(values: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        agree(False)
        return backend.sums(values)

    try:
        call(totals)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and not isinstance(error, _NoMemoryElsewhere):
            agree(True)
        raise
    agree(False)


class Stepper:
    """Accumulates micro-batches and updates the parameters.

    Args:
        backend: Devices and precision.
        optimizer: From `engine.optim.build_optimizer`.
        named_parameters: The trained parameters by full name.
        learning_rate: The peak rate, and `multiplier` its share at a step (counted from 0).
        clip: Largest global gradient norm, or None.
        recovery: What to do about losses and gradients that are not finite, and about spikes.
    """

    def __init__(
        self,
        backend: Backend,
        optimizer: torch.optim.Optimizer,
        named_parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        multiplier: Callable[[int], float] = lambda step: 1.0,
        clip: float | None = 1.0,
        recovery: Recovery | None = None,
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.parameters = list(named_parameters.values())
        self.learning_rate = learning_rate
        self.multiplier = multiplier
        self.clip = clip
        self.recovery = recovery or Recovery()
        self.spikes = Spikes(self.recovery.spike) if self.recovery.spike else None
        self._witnesses: dict[str, Any] = {}
        if isinstance(optimizer, InBackward):
            self._refuse_what_needs_all_gradients()
            self._witnesses = {name: Witness(parameter) for name, parameter in named_parameters.items()}
        self.guard = GradientGuard(self._witnesses or named_parameters, over_ranks=backend.largest)
        self.step = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._sums = _Sums()

    def accumulate(self, loss: Loss, batch: Batch) -> None:
        """Adds the gradient of one micro-batch.

        Raises:
            TrainingError: the step trains nothing, so that there is nothing to divide by, the loss depends on no trained parameter, or
                the optimiser updates within the backward pass and the step has several micro-batches.
        """
        if not batch.step_weight > 0:
            raise TrainingError(f"a step must train something, found a total weight of {batch.step_weight}")
        share = self.backend.data_world_size / batch.step_weight
        scale = self.backend.loss_scale.scale if self.backend.loss_scale else 1.0
        if isinstance(self.optimizer, InBackward):
            self._begin_in_backward(batch)
        self.backend.before_backward(batch.last)
        if loss.sum.requires_grad:
            (loss.sum * (share * scale)).backward()
        elif batch.weight or self.backend.coupled:  # a placeholder of a rank without examples may be cut off
            raise TrainingError(
                "the loss depends on no trained parameter", hint="check the adapter's targets and what the objective returns"
            )
        self._sums.add(loss, batch)

    def update(self) -> StepResult:
        """Clips, checks and applies the gradient, and starts the next step with none.

        A gradient that is not finite never reaches the optimiser, nor does a spike: the step is skipped and counted. There is one
        transfer from the device, for what the log needs anyway.

        Raises:
            TrainingError: micro-batches are missing, too many steps in a row were skipped or the first one was not to be, or trained
                parameters got no gradient (see `engine.guard`), or memory ran out.
        """
        scale = self.backend.loss_scale.scale if self.backend.loss_scale else 1.0
        with _memory(f"while the gradients of step {self.step + 1} were averaged"):
            norm, sums = self._sums.collect(self._gradient_norm(), self.backend)
        norm /= scale
        loss = self._mean_loss(sums.pop("loss", (0.0, 0.0)))
        fault = self._fault(loss, norm)
        multiplier = self.multiplier(self.step)
        if fault is None:
            with _memory(f"in the update of step {self.step + 1}, which may be done by half"):
                self._apply(norm, scale, multiplier)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        roll_back = self._count_skips(fault, loss, norm)
        return StepResult(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            learning_rate=self.learning_rate * multiplier,
            tokens=int(sums["tokens"][0]),
            trained_tokens=int(sums["trained_tokens"][0]),
            examples=int(sums["examples"][0]),
            fault=fault,
            roll_back=roll_back,
            metrics={key[7:]: amount / count for key, (amount, count) in sums.items() if key.startswith("metric.") and count},
        )

    @property
    def repeatable(self) -> bool:
        """Whether a step can be given up before `update`: nothing has touched the weights by then."""
        return not isinstance(self.optimizer, InBackward)

    def abandon(self) -> None:
        """Forgets the micro-batches that were accumulated, so that the step can begin again."""
        self.optimizer.zero_grad(set_to_none=True)
        self._sums = _Sums()

    def calm_down(self) -> None:
        """Forgets the steps that were skipped, after the run went back to an older state."""
        self._skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """JSON-able: what a step remembers beyond the optimiser's own state."""
        scale = self.backend.loss_scale
        return {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            **({"losses": self.spikes.state()} if self.spikes else {}),
            "loss_scale": [scale.scale, scale.good_steps] if scale else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self.step = state["step"]
        self.skipped = state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        if self.spikes:
            self.spikes.restore(state.get("losses", []))
        if self.backend.loss_scale and state["loss_scale"]:
            self.backend.loss_scale.scale, self.backend.loss_scale.good_steps = state["loss_scale"]

    def _mean_loss(self, total: tuple[float, float]) -> float:
        amount, weight = total
        if not weight or not math.isclose(weight, self._sums.step_weight or weight, rel_tol=1e-4):
            raise TrainingError(
                f"the micro-batches of this step weigh {weight:g} together, expected the announced {self._sums.step_weight:g}",
                hint="accumulate every micro-batch of a step before update()",
            )
        return amount / weight

    def _gradient_norm(self) -> torch.Tensor:
        """Averages the gradients over the ranks; their norm, with the loss scale still in it."""
        if isinstance(self.optimizer, InBackward):
            norms = self.optimizer.finish()
            for witness in self._witnesses.values():
                witness.note(norms)
            return get_total_norm(norms.values())
        if isinstance(self.optimizer, FlatAdamW) and self.optimizer.flat_gradients:
            self.backend.average_gradients(self.optimizer.flat_parameters())
            return self.optimizer.gradient_norm()
        self.backend.average_gradients(self.parameters)
        return self.backend.norm(self.parameters)

    @torch.no_grad()
    def _apply(self, norm: float, scale: float, multiplier: float) -> None:
        factor = 1.0 / scale
        if self.clip is not None and norm > self.clip:
            factor *= self.clip / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
        if not self.guard.done:
            self.guard.look()
        if isinstance(self.optimizer, InBackward):
            for witness in [] if self.guard.done else self._witnesses.values():
                witness.settle()
            return
        set_learning_rate(self.optimizer, multiplier)
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.step(grad_scale=factor)
            return
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)
        self.optimizer.step()

    def _begin_in_backward(self, batch: Batch) -> None:
        assert isinstance(self.optimizer, InBackward)
        if not batch.last:
            self.optimizer.refuse_more()
        set_learning_rate(self.optimizer, self.multiplier(self.step))
        self.optimizer.begin()

    def _refuse_what_needs_all_gradients(self) -> None:
        """An update within the backward pass comes before clipping, averaging and a look for overflow.

        Raises:
            ConfigError: one of them is on.
        """
        refuse_in_backward("", self.clip)
        reasons = {
            "several processes average their gradients": self.backend.world_size > 1,
            "float16 looks for overflow": self.backend.loss_scale is not None,
        }
        for reason, applies in reasons.items():
            if applies:
                raise ConfigError(
                    f"{reason} before the update, and with in_backward that has happened by then",
                    where=Where(field="train.optimizer.in_backward"),
                    hint="set it to false",
                )

    def _fault(self, loss: float, norm: float) -> Fault | None:
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return "non_finite"
        if self.spikes is None:
            return None
        if self.spikes.is_one(loss):
            return "spike"
        self.spikes.add(loss)
        return None

    def _count_skips(self, fault: Fault | None, loss: float, norm: float) -> bool:
        """Counts a step that was skipped; True where the run is to go back.

        Raises:
            TrainingError: the run is not to go on.
        """
        scale = self.backend.loss_scale
        adapting = scale is not None and scale.scale > 1.0  # an overflow only means that the scale was too high
        if scale is not None:
            scale.update(finite=fault != "non_finite")
        if fault is None:
            self._skipped_in_a_row = 0
            return False
        self.skipped += 1
        if fault == "non_finite" and adapting and math.isfinite(loss):
            return False
        self._skipped_in_a_row += 1
        action = self.recovery.non_finite if fault == "non_finite" or self.recovery.spike is None else self.recovery.spike.action
        if action == "rollback":
            return fault == "spike" or self._skipped_in_a_row >= self.recovery.patience
        if action == "stop" or self._skipped_in_a_row >= self.recovery.patience:
            what = "the gradient was not finite" if fault == "non_finite" else "the loss was far above those before"
            count = self._skipped_in_a_row
            raise TrainingError(
                f"{what} for {count} {'step' if count == 1 else 'steps'} in a row (step {self.step}: loss {loss}, "
                f"gradient norm {norm}); the weights are those of step {self.step - count}",
                hint="lower train.learning_rate, lengthen the warm-up, or use train.precision=float32",
            )
        return False


class _Sums:
    """What a step adds up: kept on the device until one transfer brings all of it to the host."""

    def __init__(self) -> None:
        self.step_weight = 0.0
        self._keys: list[str] = []
        self._tensors: list[torch.Tensor] = []
        self._host: dict[str, tuple[float, float]] = {}

    def add(self, loss: Loss, batch: Batch) -> None:
        self.step_weight = batch.step_weight
        self._push("loss", loss.sum, batch.weight)
        for key, (amount, count) in loss.metrics.items():
            self._push(f"metric.{key}", amount, count)
        tokens = len(batch.input_ids) if batch.examples else 0  # a placeholder's is nobody's
        for key, count in (("tokens", tokens), ("trained_tokens", len(batch.targets)), ("examples", batch.examples)):
            self._host[key] = (self._host.get(key, (0.0, 0.0))[0] + count, 1.0)

    def collect(self, norm: torch.Tensor, backend: Backend) -> tuple[float, dict[str, tuple[float, float]]]:
        """The gradient norm as a number, and all sums over micro-batches and ranks. Starts the next step with none."""
        values = torch.stack([norm.detach().float(), *(t.to(norm.device) for t in self._tensors)]).tolist()
        sums = dict(self._host)
        for key, value in zip(self._keys, values[1:], strict=True):
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + value, before[1])
        self._keys, self._tensors, self._host = [], [], {}
        return values[0], backend.sums(sums)

    def _push(self, key: str, amount: torch.Tensor, count: float) -> None:
        self._keys.append(key)
        self._tensors.append(amount.detach().float())
        before = self._host.get(key, (0.0, 0.0))
        self._host[key] = (before[0], before[1] + count)


@contextmanager
def _memory(when: str) -> Iterator[None]:
    """Says that memory ran out where a step cannot be repeated.

    Raises:
        TrainingError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"memory ran out {when}",
            hint="choose an optimiser with a smaller state, such as adamw_8bit, or an adapter; the same command goes on from "
            "the newest checkpoint",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left, in the words of torch and of its libraries."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
