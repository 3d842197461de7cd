"""C kernels for CPUs, compiled once by the system's compiler.

Each is the twin of a plain torch function of this package, on CPU tensors in bf16 and fp32, without autograd. `ready()` says whether
they can be called: there is a compiler, torch's OpenMP can be shared, and every kernel agrees with torch on a tiny input. Where they
cannot, `why_not()` says why, and everything runs in plain torch.

bf16 results are rounded where torch rounds its separate operations, to nearest even. So they are torch's bit for bit wherever no sum
over a row and no exponential is involved, and otherwise but for a rare last bit.
"""

from __future__ import annotations

from functools import cache

from burnish.kernels.native import check
from burnish.kernels.native.build import BuildError
from burnish.kernels.native.ops import (
    Activation,
    AttentionOptions,
    adamw_flat,
    attention_backward,
    attention_forward,
    glu_backward,
    glu_forward,
    head_chunk,
    rms_norm_backward,
    rms_norm_forward,
    rope_apply,
    takes,
)

__all__ = [
    "Activation",
    "AttentionOptions",
    "BuildError",
    "adamw_flat",
    "attention_backward",
    "attention_forward",
    "glu_backward",
    "glu_forward",
    "head_chunk",
    "ready",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_apply",
    "takes",
    "why_not",
]


def ready() -> bool:
    """Whether the C kernels can be called. The first call compiles or loads them (a second or two, later milliseconds); never raises."""
    return why_not() is None


@cache
def why_not() -> str | None:
    """Why the C kernels cannot be called, in one sentence without a full stop; None where they can."""
    try:
        wrong = check.faults()
    except (BuildError, OSError) as error:
        return str(error)
    return f"the compiled kernels do not agree with torch: {', '.join(wrong)}" if wrong else None
