"""Garbage collection while much is imported.

torch and transformers make about a million objects that all stay. Looking through them over and over, as Python does while objects
are made, takes a fifth of the time that they take to be imported.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def paused(*, keep: bool = False) -> Generator[None]:
    """Collects no garbage inside.

    Args:
        keep: What exists at the end is never looked through again. For a process of our own: garbage that is there by then stays, too.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if keep:
            gc.freeze()
            atexit.register(gc.unfreeze)  # at the end some libraries take what is still there for leaked, and say so
        if was_on:
            gc.enable()
