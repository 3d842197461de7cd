"""Silence for work on local files that takes a moment."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet(*, downloads: bool = False) -> Generator[None]:
    """Inside, transformers prints no warnings and no bars; with `downloads`, the hub's own library keeps its bars."""
    level, bar, downloading = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's too
    if downloads and downloading:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
