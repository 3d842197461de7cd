"""Text of a data set made fit to be seen.

Such text is never trusted: control characters can move a terminal's cursor, recolour it or rename its window, and marks that turn the
direction of writing can make a line read as something else. All of them are shown as symbols.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import accumulate, pairwise


def plain(text: str) -> str:
    """A text with its control characters as symbols and its line ends as `⏎`, on one line."""
    return "".join("⏎" if character == "\n" else _symbol(character) for character in text)


def visible(tokens: Sequence[str]) -> list[str]:
    """The tokens with white space and control characters to be seen: line ends, tabs, and spaces that do not just part two words."""
    whole = "".join(tokens)
    drawn = [_drawn(whole, place) for place in range(len(whole))]
    ends = accumulate(map(len, tokens), initial=0)
    return ["".join(drawn[start:end]) for start, end in pairwise(ends)]


def _drawn(text: str, place: int) -> str:
    character = text[place]
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    if character == " ":
        lonely = 0 < place < len(text) - 1 and not text[place - 1].isspace() and not text[place + 1].isspace()
        return " " if lonely else "·"
    return _symbol(character)


def _symbol(character: str) -> str:
    """The character itself, or what stands for it."""
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"‹U+{ord(character):04X}›"
    return character
