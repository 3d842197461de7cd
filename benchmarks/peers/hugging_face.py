"""Measuring a Hugging Face Trainer, whichever tool it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from benchmarks.peers.job import StepLog

Count = Callable[[dict[str, Any]], tuple[int, int]]
"""Model inputs of a step -> (real tokens, trained tokens)."""


class Measured(TrainerCallback):
    """Tells the log when steps begin and end. `seen` is filled by the trainer that `measured` makes."""

    def __init__(self, log: StepLog) -> None:
        self.log = log
        self.seen: tuple[int, int, torch.Tensor] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.seen is not None
        tokens, trained, loss = self.seen
        self.log.step(tokens, trained, float(loss))


def measured(trainer: type, watch: Measured, count: Count) -> type:
    """`trainer`, with its steps counted and its rows taken in the order in which they stand."""

    class InOrder(trainer):  # pyright: ignore[reportGeneralTypeIssues]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            tokens, trained = count(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            watch.seen = (tokens, trained, loss.detach())
            return loss

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    InOrder.__name__ = trainer.__name__
    return InOrder


def count_inputs(inputs: dict[str, Any]) -> tuple[int, int]:
    """Of a padded batch with a two-dimensional mask, or a flat one without."""
    mask = inputs.get("attention_mask")
    tokens = inputs["input_ids"].numel() if mask is None else int((mask != 0).sum())
    return tokens, int((inputs["labels"][:, 1:] != -100).sum())
