"""One data file, on disk or at a URL: its kind, its bytes, its hash."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, Literal, cast
from urllib.parse import urlsplit

import zstandard

from burnish.core.errors import BurnishError, SourceError, Where
from burnish.data.sources.remote import is_url, open_url, remote_fault, shown_name
from burnish.data.sources.streams import ZstdReader

Kind = Literal["json", "jsonl", "csv", "tsv", "parquet", "arrow", "text"]
KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 1 << 20


def suffixes(path: str) -> tuple[str, str]:
    """(suffix that tells the kind, suffix that tells the compression), in lower case, `""` where there is none."""
    name = PurePosixPath(urlsplit(path).path if is_url(path) else path)
    outer = name.suffix.lower()
    return (PurePosixPath(name.stem).suffix.lower(), outer) if outer in COMPRESSIONS else (outer, "")


@dataclass(frozen=True, slots=True)
class File:
    """A file of rows. `shown` is its name in messages."""

    path: str
    shown: str

    @classmethod
    def at(cls, path: str) -> File:
        """The file at a local path or URL."""
        return cls(path, shown_name(path))

    @property
    def kind(self) -> Kind:
        """What the suffix says the file holds.

        Raises:
            SourceError: for an unknown suffix.
        """
        kind, _ = suffixes(self.path)
        if kind not in KINDS:
            raise SourceError(
                f"the suffix '{kind}' is unknown; known are {', '.join(KINDS)}, for text also with .gz or .zst",
                where=Where(self.shown),
            )
        return KINDS[kind]

    def open(self) -> BinaryIO:
        """The bytes, decompressed. Use within `reading`.

        Raises:
            SourceError, DependencyError: when the file cannot be opened.
        """
        raw = self.raw()
        match suffixes(self.path)[1]:
            case ".gz":
                return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
            case ".zst":
                return io.BufferedReader(ZstdReader(raw), _BLOCK)
            case _:
                return raw

    def raw(self) -> BinaryIO:
        """The bytes as they are stored."""
        if not is_url(self.path):
            with self.reading():
                return open(self.path, "rb")  # the caller closes it
        return open_url(self.path)

    @contextmanager
    def reading(self) -> Generator[None]:
        """Turns what goes wrong while the bytes are read into a SourceError that names the file."""
        where = Where(self.shown)
        try:
            yield
        except BurnishError:
            raise
        except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
            raise SourceError(f"the compressed data is damaged or cut short ({error})", where=where) from None
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror or error}", where=where) from None
        except Exception as error:
            if is_url(self.path):
                raise remote_fault(error, self.path) from None
            raise

    def head(self, size: int) -> bytes:
        """The first `size` bytes, decompressed."""
        with self.reading(), self.open() as stream:
            return stream.read(size)

    def digest(self) -> bytes:
        """SHA-256 of the stored bytes and of the file's name (which says how they are read, and stands in every message)."""
        state = hashlib.sha256(os.path.basename(self.shown).encode() + b"\0")
        with self.reading(), self.raw() as stream:
            while block := stream.read(_BLOCK):
                state.update(block)
        return state.digest()
