"""The random states of a process, in and out: dropout after a resume is the dropout there would have been."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["capture", "restore", "untouched"]


def capture() -> dict[str, Any]:
    """The states of Python, NumPy and torch (with its accelerator's), as plain values and uint8 tensors."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Takes back what `capture` gave. An accelerator's state is left alone where there is none now."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = np.asarray(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}})
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def untouched() -> Iterator[None]:
    """What happens inside draws no random number from the run: evaluating more often does not change the training."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
