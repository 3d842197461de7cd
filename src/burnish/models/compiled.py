"""torch.compile, layer by layer, where it is faster and agrees: a trial, not a belief.

Compiling takes from seconds to minutes and pays back in some places only: it fuses what plain modules leave apart, and the fast modules of
models/patch.py leave little apart. So both are timed on this machine, on tokens of the size that the run will compute: the model as it
is, and the model's own layers compiled. The compiled ones stay where they are faster and give the same hidden states and gradients.

Attention over segments stays outside what is compiled (its structure changes with every batch). Sizes are dynamic, so that batches of other
lengths compile nothing anew.
"""

# torch and transformers are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from burnish.models.activations import layers_of
from burnish.models.forest import NAME, attend
from burnish.models.patch import unpatch

_ROUNDS = 3
_FASTER = 1.03
"""How much faster compiled layers must be to stay: less is noise."""
_AGREE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far hidden states and gradients may be off, relative to their size: what another order of rounding does in a deep model."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Seconds of a forward and backward pass, and what came of the comparison."""

    before: float
    after: float
    reason: str  # why the compiled layers were not kept, or nothing

    def line(self) -> str:
        """One line for people."""
        if not self.after:
            return f"compile: not used, {self.reason}"
        times = f"{1000 * self.after:.0f} ms against {1000 * self.before:.0f} ms"
        return f"compile: layers compiled, {times}" if not self.reason else f"compile: not used, {self.reason} ({times})"


def try_compile(model: Any, run: Callable[[], torch.Tensor], *, backend: str = "inductor") -> Trial:
    """Compiles the layers of `model` and keeps that where it is faster and agrees; else leaves the model as it was.

    Args:
        model: A transformers model, patched or not, in training mode.
        run: Runs it on a typical micro-batch and returns the hidden states.
        backend: torch.compile's.
    """
    layers = layers_of(model)
    parts = [module for layer in layers for module in layer.modules()]
    patched = {module: vars(module)["forward"] for module in parts if "forward" in vars(module)}
    expected, before = _outcome(model, run)
    for module in parts:
        unpatch(module)
    AttentionInterface.register(NAME, torch.compiler.disable(attend))
    torch.compiler.reset()  # what was compiled for another model's layers may not be taken for these
    try:
        for layer in layers:
            layer.compile(dynamic=True, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, about code that nobody here can change
            found, after = _outcome(model, run)
        reason = _doubt(found, expected, before, after)
    except Exception as error:  # whatever the compiler raises: it is not needed
        after, reason = 0.0, f"it fails ({type(error).__name__})"
    if reason:
        for layer in layers:
            layer._compiled_call_impl = None
        for module, forward in patched.items():
            vars(module)["forward"] = forward
        AttentionInterface.register(NAME, attend)
    return Trial(before, after, reason)


def _doubt(found: list[torch.Tensor], expected: list[torch.Tensor], before: float, after: float) -> str:
    """Why the compiled layers are not kept, or nothing."""
    for mine, truth in zip(found, expected, strict=True):
        off = ((mine - truth).double().norm() / truth.double().norm().clamp_min(1e-30)).item()
        if not off <= _AGREE.get(expected[0].dtype, 5e-2):
            return f"it does not agree, off by {off:.1e}"
    return "" if after * _FASTER < before else "it is not faster"


def _outcome(model: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """Hidden states and gradients, and the median seconds of a pass after the first one."""
    times: list[float] = []
    results: list[torch.Tensor] = []
    for _ in range(_ROUNDS + 1):
        model.zero_grad(set_to_none=True)
        _wait()
        began = time.perf_counter()
        hidden = run()
        hidden.float().square().mean().backward()
        _wait()
        times.append(time.perf_counter() - began)
        results = [hidden.detach(), *(p.grad.detach().clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return results, statistics.median(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
