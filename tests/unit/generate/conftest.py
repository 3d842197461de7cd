"""A tokenizer, and a renderer of a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from burnish.data.types import Message


class LineRenderer:
    """`user: hello` and so on, one line a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = (2,)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        lines = [f"{message.role}: {message.content}\n" for message in messages]
        return self.tokenizer.encode("".join(lines) + "assistant:", add_special_tokens=False)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def renderer(tokenizer: PreTrainedTokenizerBase) -> LineRenderer:
    return LineRenderer(tokenizer)
