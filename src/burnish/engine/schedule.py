"""How the learning rate moves: a pure function of the step, so that a schedule has no state to save and none to lose.

The multiplier of step `s` (counted from 0) of `total`, with `w` steps of warm-up, is

    (s + 1) / (w + 1)                 while s < w:  never zero, so no step is wasted, and 1 is reached at s = w
    floor + (1 - floor) x decay(x)    afterwards, where x = (s - w) / (total - w) runs from 0 to just under 1
"""

from __future__ import annotations

import math
from collections.abc import Callable

from burnish.config.base import Duration
from burnish.config.sections import Schedule, Train
from burnish.core.errors import ConfigError, Where

__all__ = ["due", "effective", "learning_rate", "total_steps", "warmup_steps"]


def learning_rate(
    schedule: Schedule, step: int, total: int, *, steps_per_epoch: float = math.inf, tokens_per_step: float = math.inf
) -> float:
    """The share of the peak learning rate at `step` (from 0) of `total`.

    Args:
        schedule: The section `train.schedule`.
        step: Optimiser steps done so far.
        total: Optimiser steps of the whole run.
        steps_per_epoch: Needed only where the warm-up is given in epochs.
        tokens_per_step: Needed only where the warm-up is given in tokens.
    """
    warmup = warmup_steps(schedule, total, steps_per_epoch=steps_per_epoch, tokens_per_step=tokens_per_step)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.kind == "inverse_sqrt":
        # Scaled so that the warm-up meets the curve; without one the first step stands for it (Vaswani et al., 1706.03762, eq. 3).
        reference = max(warmup, 1)
        return max(schedule.floor, math.sqrt(reference / (step - warmup + reference)))
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return schedule.floor + (1 - schedule.floor) * _DECAYS[schedule.kind](progress, schedule)


def warmup_steps(schedule: Schedule, total: int, *, steps_per_epoch: float = math.inf, tokens_per_step: float = math.inf) -> int:
    """The warm-up in steps, at most all of them: a fraction below 1 is a share of `total`, a whole number is steps."""
    warmup = schedule.warmup
    if isinstance(warmup, Duration):
        steps = warmup.steps(steps_per_epoch=steps_per_epoch, tokens_per_step=tokens_per_step)
    elif warmup < 1:
        steps = round(warmup * total)
    else:
        steps = round(warmup)
    return max(0, min(steps, total))


def effective(schedule: Schedule, optimizer: str) -> Schedule:
    """The schedule that an optimiser wants: schedule-free methods replace the decay by averaging and keep only the warm-up."""
    return schedule.model_copy(update={"kind": "constant"}) if optimizer.endswith("schedule_free") else schedule


def total_steps(train: Train, *, steps_per_epoch: float | None, tokens_per_step: float) -> int:
    """The optimiser steps of the whole run, from `train.steps`, `train.tokens` or `train.epochs` (one epoch where none is given).

    Raises:
        ConfigError: the length is given in epochs, but the data is a stream whose length nobody knows.
    """
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        amount = Duration.parse(f"{train.tokens}tok")
        return amount.steps(steps_per_epoch=math.inf, tokens_per_step=tokens_per_step)
    if steps_per_epoch is None or not math.isfinite(steps_per_epoch):
        raise ConfigError(
            "the length of streamed data is not known, so the run's length cannot be given in epochs",
            where=Where(field="train.epochs"),
            hint="set train.steps or train.tokens",
        )
    return max(1, round((train.epochs or 1.0) * steps_per_epoch))


def _wsd(progress: float, schedule: Schedule) -> float:
    # Warm-up, stable, decay (2404.06395): flat, then straight down over the last `decay` share of the steps after the warm-up.
    return min(1.0, (1.0 - progress) / schedule.decay)


_DECAYS: dict[str, Callable[[float, Schedule], float]] = {
    "constant": lambda progress, schedule: 1.0,
    "linear": lambda progress, schedule: 1.0 - progress,
    "cosine": lambda progress, schedule: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "polynomial": lambda progress, schedule: (1.0 - progress) ** schedule.power,
    "wsd": _wsd,
}


def due(every: Duration | None, step: int, *, steps_per_epoch: float | None, tokens_per_step: float, key: str) -> bool:
    """Whether something that happens `every` so often happens after `step`: a multiple of `every` lies in the step just done.

    So `0.5ep` of a 3-step epoch is due after steps 2, 3, 5, 6: each time as early as whole steps allow, without drifting.

    Raises:
        ConfigError: `every` counts epochs and nobody knows how long one is; `key` names the setting.
    """
    if every is None:
        return False
    if every.unit == "ep" and steps_per_epoch is None:
        raise ConfigError(
            f"the length of streamed data is not known, so '{every}' never comes", where=Where(field=key), hint="write it in st or tok"
        )
    period = every.value * {"st": 1.0, "ep": steps_per_epoch or math.inf, "tok": 1.0 / tokens_per_step}[every.unit]
    return math.floor(step / period + 1e-9) > math.floor((step - 1) / period + 1e-9)
