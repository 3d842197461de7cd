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

import zstandard

from burnish.core.errors import BurnishError, SourceError, Where
from burnish.data.sources.remote import is_url, open_url, path_of, remote_fault, shown_name
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
    name = PurePosixPath(path_of(path))
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

    @contextmanager
    def open(self, *, stored: bool = False) -> Generator[BinaryIO]:
        """The bytes, decompressed (or as they are `stored`), for a `with` block.

        Raises:
            SourceError, DependencyError: when the file cannot be opened, or, also from within the block, when it cannot be read on.
        """
        where = Where(self.shown)
        try:
            with open_url(self.path) if is_url(self.path) else open(self.path, "rb") as raw:
                yield raw if stored else self._decompressed(raw)
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

    def _decompressed(self, raw: BinaryIO) -> BinaryIO:
        match suffixes(self.path)[1]:
            case ".gz":
                return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
            case ".zst":
                return io.BufferedReader(ZstdReader(raw), _BLOCK)
            case _:
                return raw

    def head(self, size: int) -> bytes:
        """The first `size` bytes, decompressed."""
        with self.open() as stream:
            return stream.read(size)

    def digest(self) -> bytes:
        """SHA-256 of the stored bytes and of the file's name (which says how they are read, and stands in every message)."""
        state = hashlib.sha256(os.path.basename(self.shown).encode() + b"\0")
        with self.open(stored=True) as stream:
            while block := stream.read(_BLOCK):
                state.update(block)
        return state.digest()
