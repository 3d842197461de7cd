"""What a check across keys is: a contradiction of the run file in one sentence, and the keys that it hangs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from burnish.config.base import Strict
from burnish.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Check:
    """A condition on several keys: called with a run, it returns what contradicts what as a sentence, or None.

    Attributes:
        keys: The keys it speaks of, the one to point at first.
        condition: The function itself.
    """

    keys: tuple[str, ...]
    condition: Callable[[RunConfig], str | None]

    def __call__(self, run: RunConfig) -> str | None:
        """What contradicts what, or None."""
        return self.condition(run)


def check(*keys: str) -> Callable[[Callable[[RunConfig], str | None]], Check]:
    """Makes a function a check of these keys."""
    return lambda condition: Check(keys, condition)


def changed(section: Strict, *keys: str) -> list[str]:
    """Those of the keys whose value is not the default."""
    fields = type(section).model_fields
    return [key for key in keys if getattr(section, key) != fields[key].default]


def joined(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def them(words: list[str]) -> str:
    """The pronoun for so many."""
    return "it" if len(words) == 1 else "them"
