"""Prints answers while they come."""

from __future__ import annotations

import re
import shutil
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WORDS = re.compile(r"\n|[^\S\n]+|\S+")
NARROWEST = 40  # columns of text below which wrapping does more harm than good


class Screen:
    """Writes to a terminal or a file.

    In a terminal, labelled answers are wrapped at its width with the label's column kept free, and control characters (which a model may
    make, and which could move the cursor or worse) are shown as a replacement mark. In a file nothing is wrapped or replaced.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._terminal = stream.isatty()
        self._indent = 0
        self._column = 0
        self._word = ""  # in a terminal: what is held back until it is known whether it fits the line

    def heading(self, text: str) -> None:
        """A line that answers stand under."""
        self._console.print(Text(self._safe(text), style="bold"))

    def label(self, name: str, width: int) -> None:
        """Begins an answer with the name of who gives it, in a column of `width`."""
        self._indent = self._column = width + 4
        self._console.print(Text(f"  {name:<{width}}  ", style="cyan"), end="")
        self._stream.flush()

    def write(self, piece: str) -> None:
        """The next piece of the answer."""
        if self._indent:
            piece = self._laid_out(piece)
        self._stream.write(self._safe(piece))
        self._stream.flush()

    def end(self) -> None:
        """Ends the answer's line."""
        self._stream.write(self._safe(self._placed(self._word)) + "\n")
        self._stream.flush()
        self._indent = self._column = 0
        self._word = ""

    def _laid_out(self, piece: str) -> str:
        """What can be written now of the text so far: all but a last word that may still grow."""
        words = _WORDS.findall(self._word + piece)
        self._word = words.pop() if words else ""
        return "".join(self._placed(word) for word in words)

    def _placed(self, word: str) -> str:
        """The word, on a new line where it does not fit the present one."""
        if word == "\n":
            self._column = 0
            return word
        width, room, lead = cell_len(word), self._room(), ""
        if room and self._column > self._indent and self._column + width > room:
            if word.isspace():
                return ""
            self._column, lead = 0, "\n"
        if self._column == 0:  # only now, so that empty lines stay empty
            self._column, lead = self._indent, lead + " " * self._indent
        self._column += width
        return lead + word

    def _room(self) -> int | None:
        columns = shutil.get_terminal_size().columns
        return columns if self._terminal and columns - self._indent >= NARROWEST else None

    def _safe(self, text: str) -> str:
        return _CONTROL.sub("\ufffd", text) if self._terminal else text
