"""Silence for work on local files that takes a moment."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet(*, progress: bool = False) -> Generator[None]:
    """Inside, transformers prints no warnings, and no bars either unless `progress` (for downloads)."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
