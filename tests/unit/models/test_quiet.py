from __future__ import annotations

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

from burnish.models.quiet import quiet


def test_silence_ends_with_the_block_even_after_an_error() -> None:
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="x"), quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        raise ValueError("x")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bar)


def test_downloads_keep_their_bar_and_no_other() -> None:
    bars = are_progress_bars_disabled()
    with quiet(downloads=True):
        assert not logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == bars
    with quiet():
        assert are_progress_bars_disabled()
    assert are_progress_bars_disabled() == bars
