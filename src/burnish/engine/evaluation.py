"""The held-out data: loss and perplexity, and what follows from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from burnish.config.sections import Evaluation
from burnish.data.types import Batch
from burnish.engine import rng
from burnish.engine.backend import Backend
from burnish.engine.events import State
from burnish.engine.optim import averaged_weights
from burnish.engine.step import begin_step
from burnish.objectives.base import Objective

__all__ = ["early_stop", "evaluate", "judge"]


@torch.no_grad()
def evaluate(
    policy: Any,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    backend: Backend,
    optimizer: torch.optim.Optimizer,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The objective's loss on the held-out data, as one mean over its whole weight, however it is cut into batches and ranks.

    The model is in evaluation mode meanwhile, draws no random number from the run, and holds the weights to judge (`averaged_weights`).

    Args:
        policy: With `train()` and `eval()`.
        objective: The objective of the run.
        batches: The held-out micro-batches of this rank.
        backend: Devices and precision.
        optimizer: Of the run.
        cancelled: Asked before every batch.

    Returns:
        `eval_loss`, `eval_perplexity` (of the plain negative log-likelihood, where the objective tells it as `nll`), `eval_tokens`
        (trained ones), `eval_seconds`, and the objective's metrics with `eval_` before their name; None when it was cancelled.
    """
    began = time.perf_counter()
    sums: dict[str, list[torch.Tensor]] = {"loss": []}
    counts = {"loss": 0.0, "tokens": 0.0}
    policy.eval()
    try:
        with rng.untouched(), averaged_weights(optimizer):
            for batch in begin_step(batches, objective, policy, backend):
                if cancelled():
                    return None
                with backend.autocast():
                    loss = backend.compute(partial(objective, policy, batch))
                sums["loss"].append(loss.sum)
                counts["loss"] += batch.weight
                counts["tokens"] += len(batch.targets)
                for key, (amount, count) in loss.metrics.items():
                    sums.setdefault(f"own.{key}", []).append(amount)
                    counts[f"own.{key}"] = counts.get(f"own.{key}", 0.0) + count
    finally:
        policy.train()
    totals = {key: (_total(sums.get(key, [])), count) for key, count in counts.items()}
    return _means(backend.sums(totals), time.perf_counter() - began)


def judge(state: State, loss: float, config: Evaluation) -> bool:
    """Notes an eval loss in `state`; True where it is the lowest so far.

    Early stopping waits for an improvement of more than `min_delta`, which is a stricter thing than a new lowest loss.
    """
    if math.isfinite(loss) and (state.reference is None or loss < state.reference - config.min_delta):
        state.reference, state.unimproved = loss, 0
    else:
        state.unimproved += 1
    state.stop = early_stop(state, config) or state.stop
    if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
        state.best_loss, state.best_step = loss, state.step
        return True
    return False


def early_stop(state: State, config: Evaluation) -> str | None:
    """Why the run is to end here, by `evaluation.patience`; None where it is not."""
    if config.patience is None or state.unimproved < config.patience:
        return None
    return f"the eval loss has not improved for {state.unimproved} evaluations"


def _total(amounts: list[torch.Tensor]) -> float:
    # Added in float64 on the host: thousands of float32 sums would lose digits, and not every device has float64.
    return torch.stack([amount.detach().float() for amount in amounts]).cpu().double().sum().item() if amounts else 0.0


def _means(totals: dict[str, tuple[float, float]], seconds: float) -> dict[str, float]:
    own = {key.removeprefix("own."): amount / count for key, (amount, count) in totals.items() if key.startswith("own.") and count}
    amount, weight = totals["loss"]
    loss = amount / weight if weight else math.nan
    return {
        "eval_loss": loss,
        **({"eval_perplexity": _perplexity(own["nll"])} if "nll" in own else {}),
        "eval_tokens": int(totals["tokens"][1]),
        "eval_seconds": round(seconds, 6),
        **{f"eval_{key}": value for key, value in own.items()},
    }


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
