"""What every driver shares: the job it is given, and the one way in which steps are measured.

A driver is one process: `python -m benchmarks.peers.NAME_sft JOB.json`, run by the tool's own interpreter from the repository root. It
imports nothing of burnish but this package (the tools live in environments of their own) and prints JSON lines among whatever the tool
prints:

    {"event": "ready", "seconds": 6.1}                                      since the process was started, at the first step
    {"step": 1, "seconds": 2.5, "tokens": 811, "trained_tokens": 420, "loss": 1.93}
    {"event": "end", "gpu_memory": null, "versions": {...}}

A step's seconds run from the end of the step before it to its own end (the first: from `ready`), so that loading the batch, the update,
and the tool's own logging count. Tokens are real ones, without padding; trained tokens are those with a loss.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run of one tool."""

    model: str  # a Hugging Face folder
    litgpt: str  # the same model as LitGPT wants it
    rows: str  # a JSON list of {"instruction", "input": "", "output"}, or of ShareGPT's ranking rows
    folder: str  # where the run may write
    form: str  # "stock" or "best"
    precision: str  # "float32" or "bfloat16"
    steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    rank: int
    alpha: int
    seed: int
    system: str  # the system prompt that the model's template puts in front by itself
    started: float  # time.monotonic() when the process was started

    @property
    def best(self) -> bool:
        """Whether the tool runs with its best settings instead of its defaults."""
        return self.form == "best"

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bf16."""
        return self.precision == "bfloat16"

    def read_rows(self) -> list[dict[str, str]]:
        """The Alpaca rows, in order."""
        return json.loads(Path(self.rows).read_text(encoding="utf-8"))


def read_job() -> Job:
    """The job named on the command line."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


class StepLog:
    """Prints one line a step."""

    def __init__(self, job: Job) -> None:
        self._started = job.started
        self._last = 0.0
        self._steps = 0

    def begin(self) -> None:
        """The first step begins now; later calls do nothing."""
        if self._last:
            return
        self._last = time.perf_counter()
        self._print(event="ready", seconds=time.monotonic() - self._started)

    def step(self, tokens: int, trained_tokens: int, loss: float) -> None:
        """A step has just ended."""
        now = time.perf_counter()
        self._steps += 1
        self._print(step=self._steps, seconds=now - self._last, tokens=tokens, trained_tokens=trained_tokens, loss=loss)
        self._last = now

    def end(self, *packages: str) -> None:
        """The run is over. `packages` are the distributions whose versions matter."""
        import torch

        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self._print(event="end", gpu_memory=memory, versions={name: importlib.metadata.version(name) for name in ("torch", *packages)})

    def _print(self, **line: Any) -> None:
        # A line of its own even where a progress bar has left the cursor somewhere.
        sys.stdout.write(f"\n{json.dumps(line)}\n")
        sys.stdout.flush()
