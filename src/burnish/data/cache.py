"""The tokenised data on disk: written once, content-addressed, memory-mapped.

A cache entry is a folder named by its key:

    <cache>/<key>/examples.arrow     Arrow IPC file: one row for each example
    <cache>/<key>/manifest.json      the checksum, what the examples are, the account
    <cache>/<key>.lock               held by the process that writes the entry

An entry is written beside its place and moved there whole, so what can be seen is complete. What can be seen and does not agree with its
manifest (a disk fault, a copy cut short) is thrown away and made again.
"""

# pyarrow has no type stubs:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from burnish.core.errors import DataError
from burnish.data.types import Example

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        # Weights are constant over long runs of tokens (a turn, a prompt), so they are stored as runs: exact, and almost free.
        ("run_lengths", pa.list_(pa.int32())),
        ("run_weights", pa.list_(pa.float32())),
        ("ends", pa.list_(pa.int32())),  # of segments; empty where the example is plain, as parents and values are
        ("parents", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float32())),
        ("trained", pa.int32()),
        ("weight", pa.float64()),
        ("leading", pa.float64()),
        ("source", pa.int32()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("turn", pa.int64()),  # the row's place in the order of reading, over all sources: equal for pieces of one row
        ("identity", pa.uint64()),
    ]
)
_TRAINED_ON = (
    "input_ids",
    "lengths",
    "run_lengths",
    "run_weights",
    "runs",
    "ends",
    "parents",
    "segments",
    "values",
    "value_counts",
    "weights",
)
"""Columns of a block that decide what is trained on."""
_BATCH_TOKENS = 1 << 20  # tokens in one record batch: the unit of writing, and all that writing holds in memory

IntArray = npt.NDArray[np.int32]


@dataclass(slots=True)
class ExampleBlock:
    """Examples laid end to end, as workers return them and the cache stores them. E examples with L tokens in all.

    `rows` says which row of the block's own list of rows an example was made from; `identity` is equal for equal rows.
    """

    input_ids: IntArray  # [L]
    lengths: IntArray  # [E]
    run_lengths: IntArray  # [R]
    run_weights: npt.NDArray[np.float32]  # [R]
    runs: IntArray  # [E] number of runs of each example
    ends: IntArray  # [S] of segments, within their example
    parents: IntArray  # [S]
    segments: IntArray  # [E] number of segments of each example; 0 where it is plain
    values: npt.NDArray[np.float32]  # [V]
    value_counts: IntArray  # [E]
    trained: IntArray  # [E]
    weights: npt.NDArray[np.float64]  # [E] what each counts in the loss
    leading: npt.NDArray[np.float64]  # [E] weight of the tokens of its first branch
    rows: IntArray  # [E]

    def examples(self) -> Iterator[Example]:
        """The examples, one by one."""
        tokens, runs, segments, values = map(_slices, (self.lengths, self.runs, self.segments, self.value_counts))
        for place in range(len(self.lengths)):
            weights = np.repeat(self.run_weights[runs[place]], self.run_lengths[runs[place]])
            ends, parents = self.ends[segments[place]], self.parents[segments[place]]
            yield _example(self.input_ids[tokens[place]], weights, ends, parents, self.values[values[place]], float(self.weights[place]))

    def select(self, keep: npt.NDArray[np.bool_]) -> ExampleBlock:
        """The examples for which `keep` [E] is true."""
        if keep.all():
            return self
        counts = (self.lengths, self.runs, self.segments, self.value_counts)
        tokens, runs, segments, values = (np.repeat(keep, count) for count in counts)
        return ExampleBlock(
            input_ids=self.input_ids[tokens],
            lengths=self.lengths[keep],
            run_lengths=self.run_lengths[runs],
            run_weights=self.run_weights[runs],
            runs=self.runs[keep],
            ends=self.ends[segments],
            parents=self.parents[segments],
            segments=self.segments[keep],
            values=self.values[values],
            value_counts=self.value_counts[keep],
            trained=self.trained[keep],
            weights=self.weights[keep],
            leading=self.leading[keep],
            rows=self.rows[keep],
        )


def run_lengths(weights: npt.NDArray[np.float32]) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Run-length coding of weights [L]: the lengths of the runs and their values."""
    starts = np.flatnonzero(np.concatenate([[True], weights[1:] != weights[:-1]]))
    return np.diff(np.append(starts, len(weights))).astype(np.int32), weights[starts]


class Store:
    """A memory-mapped file of examples. Columns that planning needs are read whole; tokens stay on disk until asked for.

    Raises:
        pyarrow.ArrowInvalid: when the file is no whole Arrow file.
    """

    def __init__(self, file: Path, files: list[str]) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self._files = files
        self._views: dict[int, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {}
        batches = [self._reader.get_batch(number) for number in range(self._reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.lengths: IntArray = self._gather([_lengths(batch.column("input_ids")) for batch in batches], np.int32)
        self.trained: IntArray = self._column(batches, "trained", np.int32)
        self.weights: npt.NDArray[np.float64] = self._column(batches, "weight", np.float64)
        self.leading: npt.NDArray[np.float64] = self._column(batches, "leading", np.float64)
        self.sources: IntArray = self._column(batches, "source", np.int32)
        self.identities: npt.NDArray[np.uint64] = self._column(batches, "identity", np.uint64)
        self.turns: npt.NDArray[np.int64] = self._column(batches, "turn", np.int64)
        self.file_numbers: IntArray = self._column(batches, "file", np.int32)
        self.row_numbers: npt.NDArray[np.int64] = self._column(batches, "row", np.int64)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """One example; its ids are a view of the mapped file."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if number not in self._views:
            self._views[number] = _views(self._reader.get_batch(number))
        place = index - int(self._starts[number])
        columns = (values[offsets[place] : offsets[place + 1]] for offsets, values in self._views[number])
        ids, runs, run_weights, ends, parents, values = columns
        return _example(ids, np.repeat(run_weights, runs), ends, parents, values, float(self.weights[index]))

    def origin(self, index: int) -> tuple[str, int]:
        """File and row number that an example was made from."""
        return self._files[int(self.file_numbers[index])], int(self.row_numbers[index])

    def _column(self, batches: list[Any], name: str, dtype: type) -> npt.NDArray[Any]:
        return self._gather([_numpy(batch.column(name)) for batch in batches], dtype)

    @staticmethod
    def _gather(parts: list[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


class Examples:
    """Some examples of a store, in order: what the loader takes.

    Args:
        store: The mapped file.
        index: Which of its examples [N]; all of them when left out.
        fingerprint: Names the content of the store: tokens, weights, order.
    """

    def __init__(self, store: Store, index: npt.NDArray[np.int64] | None = None, *, fingerprint: str = "") -> None:
        self._store = store
        self._index = np.arange(len(store)) if index is None else index
        self.fingerprint = fingerprint
        self.lengths: IntArray = store.lengths[self._index]
        self.trained: IntArray = store.trained[self._index]
        self.weights: npt.NDArray[np.float64] = store.weights[self._index]
        self.leading: npt.NDArray[np.float64] = store.leading[self._index]
        self.sources: IntArray = store.sources[self._index]
        self.identities: npt.NDArray[np.uint64] = store.identities[self._index]
        self.turns: npt.NDArray[np.int64] = store.turns[self._index]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._index)

    def __getitem__(self, index: int, /) -> Example:
        """One example.

        Raises:
            IndexError: beyond the end, so that plain iteration works.
        """
        return self._store.example(int(self._index[index]))

    def origin(self, index: int) -> tuple[str, int]:
        """File and row number that an example was made from."""
        return self._store.origin(int(self._index[index]))

    def selection(self) -> str:
        """Names which examples of the store these are."""
        return hashlib.sha256(self._index.astype(np.int64).tobytes()).hexdigest()

    def identity(self) -> str:
        """Names these examples: equal where they are the same tokens with the same weights in the same order."""
        return hashlib.sha256(f"{self.fingerprint}/{self.selection()}".encode()).hexdigest()[:32]


class Writer:
    """Writes examples into a file, a bounded number of tokens at a time."""

    def __init__(self, file: Path) -> None:
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        self._waiting: list[pa.RecordBatch] = []
        self._tokens = 0
        self._file_numbers: dict[str, int] = {}
        self._content = {name: hashlib.blake2b(digest_size=16) for name in _TRAINED_ON}

    def add(
        self,
        block: ExampleBlock,
        *,
        files: list[str],
        numbers: npt.NDArray[np.int64],
        sources: IntArray,
        turns: npt.NDArray[np.int64],
        identities: npt.NDArray[np.uint64],
    ) -> None:
        """Adds the block's examples. The arguments give file, number, source, place and identity for each of the block's rows."""
        known = self._file_numbers
        file_of_row = np.array([known.setdefault(file, len(known)) for file in files], np.int32)
        columns = [
            _lists(block.lengths, block.input_ids),
            _lists(block.runs, block.run_lengths),
            _lists(block.runs, block.run_weights),
            _lists(block.segments, block.ends),
            _lists(block.segments, block.parents),
            _lists(block.value_counts, block.values),
            _array(block.trained),
            _array(block.weights),
            _array(block.leading),
            _array(sources[block.rows]),
            _array(file_of_row[block.rows]),
            _array(numbers[block.rows]),
            _array(turns[block.rows]),
            _array(identities[block.rows]),
        ]
        for name, state in self._content.items():
            state.update(np.ascontiguousarray(getattr(block, name)).tobytes())
        self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        self._tokens += len(block.input_ids)
        if self._tokens >= _BATCH_TOKENS:
            self._flush()

    def close(self) -> list[str]:
        """Ends the file; returns the names behind the file numbers."""
        self._flush()
        self.abandon()
        return list(self._file_numbers)

    def content(self) -> str:
        """Names what has been added, as training sees it: tokens, weights and order, not where they come from or who prepared them."""
        return hashlib.blake2b(b"".join(state.digest() for state in self._content.values()), digest_size=16).hexdigest()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_batch(pa.concat_batches(self._waiting))
        self._waiting, self._tokens = [], 0


@dataclass(frozen=True, slots=True)
class Entry:
    """What a cache entry holds."""

    store: Store
    content: str
    account: dict[str, Any]


class Cache:
    """The folder of cache entries.

    Args:
        folder: Made when it is missing.
        warn: Told about a broken entry.

    Raises:
        DataError: when the folder cannot be written.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def open(self, key: str, *, quiet: bool = False) -> Entry | None:
        """The entry, or None where there is none or a broken one (which is warned about, unless `quiet`)."""
        place = self.folder / key
        if not place.exists():
            return None
        try:
            manifest = json.loads((place / "manifest.json").read_text("utf-8"))
            file = place / "examples.arrow"
            if _checksum(file) != manifest["checksum"]:
                raise ValueError("its checksum is wrong")
            return Entry(Store(file, manifest["files"]), manifest["content"], manifest["account"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            if not quiet:
                self._warn(f"the tokenised data in {place} is damaged ({error}) and is made again")
            return None

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Generator[None]:
        """Holds the right to write an entry. `on_wait` is called once when another process has it."""
        lock = filelock.FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            on_wait()
            lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def write(self, key: str) -> Generator[EntryWriter]:
        """A writer for the entry, which appears at the end of the block, or not at all. The lock must be held.

        Raises:
            DataError: when the disk cannot take it.
        """
        for leftover in self.folder.glob(f"{key}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = self.folder / f"{key}.tmp-{os.getpid()}"
        try:
            temporary.mkdir()
            with EntryWriter(temporary) as writer:
                yield writer
            shutil.rmtree(self.folder / key, ignore_errors=True)
            temporary.rename(self.folder / key)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _unwritable(self, error: OSError) -> DataError:
        reason = error.strerror or str(error)
        return DataError(f"the tokenised data cannot be written to {self.folder}: {reason}", hint="Set data.cache to another folder.")


class EntryWriter:
    """One entry while it is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer = Writer(folder / "examples.arrow")
        self.add = self._writer.add
        self._finished = False

    def finish(self, account: Mapping[str, Any]) -> None:
        """Ends the entry; to be called once, after the last block."""
        files = self._writer.close()
        self._finished = True
        checksum = _checksum(self._folder / "examples.arrow")
        manifest = {"checksum": checksum, "content": self._writer.content(), "files": files, "account": account}
        (self._folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")

    def __enter__(self) -> EntryWriter:
        """Starts the entry."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the file where `finish` was not reached."""
        if not self._finished:
            self._writer.abandon()


def _checksum(file: Path) -> int:
    """CRC-32 of a file: guards against faults, not against intent."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _array(values: npt.NDArray[Any]) -> pa.Array:
    """The numbers as Arrow sees them, not copied; `pa.array` and `to_numpy` would import pandas, just to look: half a second."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _numpy(numbers: pa.Array) -> npt.NDArray[Any]:
    """The same the other way."""
    dtype = np.dtype(numbers.type.to_pandas_dtype())
    return np.frombuffer(numbers.buffers()[1], dtype, len(numbers), numbers.offset * dtype.itemsize) if len(numbers) else np.empty(0, dtype)


def _lists(lengths: IntArray, values: npt.NDArray[Any]) -> pa.ListArray:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(_array(ends), _array(values))


def _lengths(lists: pa.ListArray) -> npt.NDArray[Any]:
    return np.diff(_numpy(lists.offsets))


def _views(batch: pa.RecordBatch) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Zero-copy views of the lists of a record batch: offsets and values of each column."""
    columns = (batch.column(name) for name in ("input_ids", "run_lengths", "run_weights", "ends", "parents", "values"))
    return [(_numpy(column.offsets), _numpy(column.values)) for column in columns]


def _slices(counts: IntArray) -> list[slice]:
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]


def _example(
    ids: IntArray,
    weights: npt.NDArray[np.float32],
    ends: IntArray,
    parents: IntArray,
    values: npt.NDArray[np.float32],
    weight: float,
) -> Example:
    """An example from its columns. A plain one has no weight of its own."""
    if not len(ends):
        return Example(ids, weights)
    return Example(ids, weights, tuple(ends.tolist()), tuple(parents.tolist()), tuple(values.tolist()), weight)
