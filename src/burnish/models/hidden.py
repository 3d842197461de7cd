"""Packages that others import only to look, kept out of their sight."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def hidden(package: str) -> Generator[None]:
    """Inside, `package` seems not to be installed, unless it has been imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]  # what the import system takes as "not there"
    try:
        yield
    finally:
        del sys.modules[package]
