"""Runs that several processes train together, started by torchrun: `ranks.py CASES.json` with a list of cases.

A case is {"settings": of the run, "stop": step after which a signal comes, "broken": rank that cannot write its part of a checkpoint,
"spread": only rank 0 may read the model's weights, "together": all ranks write checkpoints, however small}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from burnish.core.errors import CheckpointError, Interrupted
from burnish.engine import backend, checkpoint
from burnish.engine.events import Callback, State
from burnish.engine.step import StepResult
from burnish.models import load
from burnish.run import Run


class StopAfter(Callback):
    """A signal in the middle of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: State, result: StepResult) -> None:
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def train(case: dict[str, Any]) -> None:
    """Trains one case to its end, or to where it is stopped."""
    callbacks = [StopAfter(case["stop"])] if "stop" in case else []
    blind = patch.object(load, "_load", side_effect=AssertionError("this rank reads weights"))
    with blind if case.get("spread") and dist.get_rank() else nullcontext():
        try:
            Run.from_config(case["settings"], callbacks=callbacks).train()
        except Interrupted:
            assert callbacks


def refuse_to_write(case: dict[str, Any]) -> None:
    """One rank's disk is full from the second checkpoint on: every rank hears of it."""
    write, written = checkpoint.write_tensors, 0

    def full(path: Path, tensors: Any) -> dict[str, Any]:
        nonlocal written
        written += 1
        if dist.get_rank() == case["broken"] and written > 2:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    checkpoint.write_tensors = full
    try:
        Run.from_config(case["settings"]).train()
        heard = ""
    except CheckpointError as error:
        heard = str(error)
    checkpoint.write_tensors = write
    Path(case["settings"]["output"], f"heard-{dist.get_rank()}").write_text(heard)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in json.loads(Path(sys.argv[1]).read_text()):
        with patch.object(backend, "_SHARE", 1) if case.get("together") else nullcontext():
            (refuse_to_write if "broken" in case else train)(case)
        dist.barrier()
    dist.destroy_process_group()
