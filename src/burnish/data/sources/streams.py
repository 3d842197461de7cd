"""Bytes to text, with the place of every byte that is wrong."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from burnish.core.errors import SourceError, Where

CHUNK = 1 << 16
_BOM = codecs.BOM_UTF8
_IMPOSTORS = (
    (b"\x1f\x8b", "gzip data; give the file the suffix .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data; give the file the suffix .zst"),
    (b"PAR1", "Parquet data; give the file the suffix .parquet"),
    (b"ARROW1", "Arrow data; give the file the suffix .arrow"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save it as CSV"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; save it as UTF-8"),
    (b"version https://git-lfs.github.com", "a Git LFS pointer instead of the data; run 'git lfs pull'"),
    (b"<!doctype html", "an HTML page instead of data; use the address of the file itself"),
    (b"<html", "an HTML page instead of data; use the address of the file itself"),
)


class ZstdReader(io.RawIOBase):
    """Reads zstd data of one or more frames, and unlike the library's own reader raises EOFError where the last one is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fed = False
        self._ready = b""

    def readable(self) -> bool:
        """A stream for reading."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # the stub's Buffer has no length
        """Fills `buffer` with decompressed bytes and returns how many; 0 is the end."""
        while not self._ready and self._fill():
            pass
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def _fill(self) -> bool:
        rest = b""
        if self._frame.eof:
            rest = self._frame.unused_data
            self._frame, self._fed = zstandard.ZstdDecompressor().decompressobj(), False
        data = rest or self._raw.read(CHUNK)
        if not data:
            if self._fed:
                raise EOFError("the last zstd frame is cut short")
            return False
        self._fed = True
        self._ready = self._frame.decompress(data)
        return True


def check_head(head: bytes, shown: str) -> None:
    """Names the usual strangers: compressed data without the suffix, UTF-16, an LFS pointer, a web page.

    Raises:
        SourceError: when the first bytes of a text file show that it is something else.
    """
    start = head[:64].lstrip()
    for magic, what in _IMPOSTORS:
        if start.startswith(magic) or start.lower().startswith(magic):
            raise SourceError(f"this is {what}", where=Where(shown))


def lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(line from 1, offset in the file, bytes with their line end); a byte order mark at the start is left out."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        bare = line.removeprefix(_BOM) if number == 1 else line
        yield number, offset + len(line) - len(bare), bare
        offset += len(line)


def decode(line: bytes, offset: int, where: Where) -> str:
    """The text of one line.

    Raises:
        SourceError: for bytes that are no UTF-8, and for NUL bytes (a torn or binary file).
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, offset + error.start, where) from None
    if "\0" in text:
        raise _nul(offset + line.index(b"\0"), where)
    return text


def decoded(stream: BinaryIO, shown: str) -> Iterator[str]:
    """The text of a whole stream in pieces, for what has no lines to go by.

    Raises:
        SourceError: as `decode`, with the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, offset = 1, 0
    while True:
        chunk = stream.read(CHUNK)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            known: bytes = error.object
            line += known[: error.start].count(b"\n")
            raise _not_utf8(error, offset + len(chunk) - len(known) + error.start, Where(shown, line=line)) from None
        if b"\0" in chunk:
            raise _nul(offset + chunk.index(b"\0"), Where(shown, line=line + chunk[: chunk.index(b"\0")].count(b"\n")))
        if not chunk:
            return
        line, offset = line + chunk.count(b"\n"), offset + len(chunk)
        if text:
            yield text


def _not_utf8(error: UnicodeDecodeError, offset: int, where: Where) -> SourceError:
    byte = error.object[error.start]
    return SourceError(
        f"the text is not UTF-8: byte 0x{byte:02x} at offset {offset} of the file",
        where=where,
        hint="Save the file as UTF-8 (iconv -f latin1 -t utf-8 converts Latin-1).",
    )


def _nul(offset: int, where: Where) -> SourceError:
    return SourceError(f"a NUL byte at offset {offset} of the file: torn, binary or UTF-16, where UTF-8 text is expected", where=where)
