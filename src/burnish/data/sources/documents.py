"""Plain text files: a file is a document.

A document is one row with the field `text`. Corpora that hold many documents in one file separate them by a line `<|endoftext|>`, as
GPT-2's did, and that is understood. Nothing else splits: neither line breaks nor blank lines, since a paragraph torn out of its text
would teach the model that every text begins and ends there (`data.overlong: split` cuts what is longer than `data.max_length`).

Only to keep memory flat, a document of more than a million characters becomes several rows, cut at a blank line where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

from burnish.core.errors import Where
from burnish.data.sources import streams
from burnish.data.sources.file import File
from burnish.data.sources.row import Row

SEPARATOR = "<|endoftext|>"
LARGEST = 1_000_000


def read_documents(file: File) -> Iterator[Row]:
    """The documents of a .txt or .md file.

    Raises:
        SourceError: for text that is not UTF-8.
    """
    streams.check_head(file.head(64), file.shown)
    number = 0
    for line, text in _documents(file):
        if text.strip():
            number += 1
            yield Row(file.shown, number, {"text": text.strip("\r\n")}, line)


def _documents(file: File) -> Iterator[tuple[int, str]]:
    """(first line, text) of each document or piece of one."""
    held: list[str] = []
    size, begun = 0, 1
    for line, text in _lines(file):
        ended = text.strip() == SEPARATOR
        # A piece ends at the first blank line past its size, or at any line where none comes for as long again.
        full = size > LARGEST and (not text.strip() or size > 2 * LARGEST)
        if ended or full:
            yield begun, "".join(held)
            held, size, begun = [], 0, line + ended
        if not ended:
            held.append(text)
            size += len(text)
    yield begun, "".join(held)


def _lines(file: File) -> Iterator[tuple[int, str]]:
    with file.open() as stream:
        for line, offset, raw in streams.lines(stream):
            yield line, streams.decode(raw, offset, Where(file.shown, line=line))
