"""A format and a renderer that are as simple as can be. Worker processes import them too, so they stand in a module of their own."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass

import numpy as np

from burnish.core.errors import RowError, TemplateError, Where
from burnish.data.sources.row import Row
from burnish.data.types import Completion, Example, Item, Text


@dataclass(frozen=True)
class Words:
    """A format: `text`, or `prompt` and `completion`."""

    name: str = "words"

    def convert(self, row: Row) -> Item | None:
        if "text" in row.fields:
            return Text(row.fields["text"])
        if "prompt" not in row.fields:
            raise RowError("the field 'prompt' is missing", where=row.where("prompt"))
        return Completion(row.fields["prompt"], row.fields["completion"])

    def describe(self) -> str:
        return self.name


@dataclass(frozen=True)
class Letters:
    """A renderer: a token for each letter, the completion's trained."""

    def render(self, item: Item, *, where: Where | None = None, notes: Counter[str] | None = None) -> Example:
        prompt, completion = ("", item.text) if isinstance(item, Text) else (item.prompt, item.completion)  # type: ignore[union-attr]
        if "die" in completion:
            os.kill(os.getpid(), signal.SIGKILL)
        if "print" in completion:
            print("a library that talks")
        if "boom" in completion:
            raise TemplateError("the template is broken")
        if "bug" in completion:
            raise ZeroDivisionError("a bug")
        if notes is not None and "note" in completion:
            notes["noted"] += 1
        ids = np.array([ord(letter) for letter in prompt + completion], np.int32)
        return Example(ids, np.array([0.0] * len(prompt) + [1.0] * len(completion), np.float32))

    def fingerprint(self) -> str:
        return "letters"
