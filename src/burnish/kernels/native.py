"""C kernels for CPUs, compiled once by the system's compiler."""

from __future__ import annotations


def ready() -> bool:
    """Whether the C kernels can be called."""
    return False
