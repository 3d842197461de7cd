"""Where rows come from: `open_source` turns one source of the run file into rows, read lazily with flat memory.

    one file        JSON, JSON Lines, CSV, TSV, Parquet, Arrow, Feather, text; text kinds also as .gz and .zst
    folder, glob    many of them, sorted into splits by their names
    URL             the same through fsspec: https, s3, gs, hf ...
    owner/name      a data set of the Hugging Face hub

Then, in this order: the split expression chooses rows, and `limit` takes the first of them or a seeded sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np

from burnish.config.sections import Source
from burnish.core.errors import SourceError, Where, did_you_mean
from burnish.data.order import permutation
from burnish.data.sources.columnar import read_columnar
from burnish.data.sources.delimited import read_delimited
from burnish.data.sources.documents import read_documents
from burnish.data.sources.file import File, Kind
from burnish.data.sources.find import find
from burnish.data.sources.hub import hub_splits
from burnish.data.sources.json_rows import read_json
from burnish.data.sources.remote import shown_name
from burnish.data.sources.row import Row
from burnish.data.sources.splits import Slice, canonical, parse_split

__all__ = ["Row", "RowSource", "open_source"]

_READERS: Mapping[Kind, Callable[[File], Iterator[Row]]] = {
    "json": read_json,
    "jsonl": read_json,
    "csv": read_delimited,
    "tsv": read_delimited,
    "parquet": read_columnar,
    "arrow": read_columnar,
    "text": read_documents,
}


class Split(Protocol):
    """One split of a data set, whole."""

    def rows(self) -> Iterator[Row]:
        """All rows, in order; every call begins anew."""
        ...

    def fingerprint(self) -> bytes:
        """Changes with the content."""
        ...


@dataclass(frozen=True, slots=True)
class FileSplit:
    """The files of one split, in order of their names."""

    files: tuple[File, ...]

    def rows(self) -> Iterator[Row]:
        """All rows of all files."""
        for file in self.files:
            yield from _READERS[file.kind](file)

    def fingerprint(self) -> bytes:
        """The hashes of all files."""
        return b"".join(file.digest() for file in self.files)


@dataclass(frozen=True)
class RowSource:
    """The rows of one source, as `open_source` makes it. Opening reads no row; each call of `rows` begins anew."""

    config: Source
    seed: int
    splits: Mapping[str, Split]
    slices: Sequence[Slice]
    """With the names filled in."""
    left_out: Sequence[str] = ()
    streaming: bool = False
    _totals: dict[str, int] = field(default_factory=dict[str, int], repr=False, compare=False)

    @property
    def name(self) -> str:
        """What the run file calls it, without secrets that a URL may hold."""
        return shown_name(self.config.path)

    def rows(self) -> Iterator[Row]:
        """The rows, lazily.

        Raises:
            SourceError: when a file cannot be read, or when there is no row at all.
        """
        limit = self.config.limit
        chosen = self._sliced()
        if limit is not None:
            chosen = self._sampled(chosen, limit) if self.config.sample else islice(chosen, limit)
        some = False
        for row in chosen:
            some = True
            yield row
        if not some:
            raise self._empty()

    def fingerprint(self) -> str:
        """A hash of the content and of what is chosen from it: equal fingerprints mean equal rows. Reads every byte of the files."""
        state = hashlib.sha256()
        for split in self._used():
            state.update(split.fingerprint())
        limited = (self.config.limit, self.config.sample, self.seed if self.config.sample else None)
        state.update(repr((tuple(self.slices), limited)).encode())
        return state.hexdigest()

    def describe(self) -> str:
        """One line for the log: what is read, which rows of it, and what is left out."""
        text = self.name
        if self.config.name:
            text += f":{self.config.name}"
        if self.config.split is not None or len(self.splits) > 1:
            text += f", split {self.config.split or self.slices[0].name}"
        files = [file for split in self._used() if isinstance(split, FileSplit) for file in split.files]
        if len(files) > 1:
            text += f", {len(files)} files"
        if self.config.limit is not None:
            text += f", {'a sample of ' if self.config.sample else 'the first '}{self.config.limit} rows"
        if self.left_out:
            text += f"; left out, since no split: {', '.join(self.left_out)}"
        return text

    def _used(self) -> list[Split]:
        return [self.splits[name] for name in dict.fromkeys(str(part.name) for part in self.slices)]

    def _sliced(self) -> Iterator[Row]:
        for part in self.slices:
            start, stop = part.range(self._total(str(part.name)) if part.needs_total else None)
            yield from islice(self.splits[str(part.name)].rows(), start, stop)

    def _sampled(self, rows: Iterator[Row], limit: int) -> Iterator[Row]:
        """`limit` rows that the seed decides, in their own order."""
        self._refuse_streaming("a sample")
        total = sum(1 for _ in self._sliced())
        wanted = np.zeros(total, bool)
        wanted[permutation(total, self.seed)[:limit]] = True
        return (row for row, take in zip(rows, wanted, strict=True) if take)

    def _total(self, name: str) -> int:
        if name not in self._totals:
            self._refuse_streaming(f"the split '{self.config.split}'")
            self._totals[name] = sum(1 for _ in self.splits[name].rows())
        return self._totals[name]

    def _refuse_streaming(self, what: str) -> None:
        if self.streaming:
            raise SourceError(
                f"{what} needs the number of rows, which is unknown while streaming",
                where=Where(self.name),
                hint="Use a limit or a slice like 'train[:1000]', or leave out 'streaming: true'.",
            )

    def _empty(self) -> SourceError:
        where = Where(self.name)
        if any(part.start or part.stop for part in self.slices):
            return SourceError(f"the split '{self.config.split}' chooses no row", where=where)
        return SourceError("is empty: there is not a single row in it", where=where)


def open_source(source: Source, *, seed: int, streaming: bool = False, prefer: Sequence[str] = ("train",)) -> RowSource:
    """Finds a source and decides which split is meant; reads no row yet.

    Args:
        source: A source of the run file, its path relative to the working directory.
        seed: Decides a sample.
        streaming: Rows of the hub are read as they arrive, nothing is downloaded whole.
        prefer: The splits to take where the source names none, best first; the only split there is, is taken in any case.

    Raises:
        SourceError: when nothing is there, or the split is unknown.
        DependencyError: when the address needs a package that is not installed.
    """
    slices = parse_split(source.split, shown_name(source.path))
    path = _local_path(source)
    found = find(path, split_given=any(part.name for part in slices))
    if found is None:
        splits: Mapping[str, Split] = dict(hub_splits(source.path, source.name, source.revision, streaming=streaming))
    else:
        splits = {name: FileSplit(files) for name, files in found.splits.items()}
        _refuse_hub_keys(source, path)
    one_file = found is not None and found.one_file
    named = [Slice(_choose(part.name, splits, prefer, source, one_file=one_file), part.start, part.stop) for part in slices]
    return RowSource(source, seed, splits, named, found.left_out if found else (), streaming)


def _local_path(source: Source) -> str:
    """The path, with the subset as the folder below it that it is in a local copy of a hub data set."""
    below = os.path.join(os.path.expanduser(source.path), source.name or "")
    return below if source.name and os.path.isdir(below) else source.path


def _refuse_hub_keys(source: Source, path: str) -> None:
    key = "revision" if source.revision else "name" if source.name and path == source.path else None
    if key:
        raise SourceError(
            f"'{getattr(source, key)}' is the {'revision' if key == 'revision' else 'subset'} of a hub data set, but this is a local one",
            where=Where(shown_name(source.path), field=key),
            hint=f"Leave out '{key}:'.",
        )


def _choose(name: str | None, splits: Mapping[str, Split], prefer: Sequence[str], source: Source, *, one_file: bool) -> str:
    if name is None:
        return next((choice for choice in prefer if choice in splits), None) or _only(splits, source)
    choice = next((known for known in (name, canonical(name)) if known in splits), None)
    if choice is not None:
        return choice
    if one_file and name == "train":  # `train[:100]` of a file that is called test.jsonl
        return next(iter(splits))
    raise SourceError(f"there is no split '{name}': {did_you_mean(name, splits)}", where=Where(shown_name(source.path), field="split"))


def _only(splits: Mapping[str, Split], source: Source) -> str:
    if len(splits) == 1:
        return next(iter(splits))
    raise SourceError(
        f"several splits are there ({', '.join(splits)}), and none of them is meant by itself",
        where=Where(shown_name(source.path), field="split"),
        hint=f"Write 'split: {next(iter(splits))}'.",
    )
