"""Rows -> tokenised examples: what one process does with a chunk of rows. Nothing here depends on how many processes there are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from burnish.core.errors import BurnishError, DataError, RowError, Where
from burnish.data.cache import ExampleBlock, run_lengths
from burnish.data.formats import Format
from burnish.data.sources.row import Row
from burnish.data.tree import cut, is_tree, leading_weight, loss_weight, paths, trained_counts, usable
from burnish.data.types import BatchKind, Completion, Conversation, Example, Item, Judged, Pair, Stepwise, Text

Overlong = Literal["truncate", "drop", "split", "error"]

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 20


class Renderer(Protocol):
    """What the pipeline needs of `data.render.Renderer`."""

    def render(self, item: Item, /, *, where: Where | None = None, notes: Counter[str] | None = None) -> Example:
        """Token ids and weights of an item. `notes` counts what the template left out and the like."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything that decides the outcome of `render`."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """A row to prepare, and the number of the source that it came from."""

    source: int
    row: Row


class Fate(IntEnum):
    """What became of a row."""

    KEPT = 0
    EMPTY = 1
    MALFORMED = 2
    DROPPED = 3
    FULLY_MASKED = 4
    MASKED_BY_TRUNCATION = 5
    DUPLICATE = 6


@dataclass(slots=True)
class Chunk:
    """What became of the rows of a chunk, in order. R rows, E examples."""

    fates: npt.NDArray[np.uint8]  # [R]
    overlong: npt.NDArray[np.bool_]  # [R]
    rendered: npt.NDArray[np.int64]  # [R] tokens before anything was cut
    truncated: npt.NDArray[np.int64]  # [R] tokens cut off
    masked_pieces: npt.NDArray[np.int64]  # [R] tokens in pieces that are left out because no token of theirs is trained
    identities: list[bytes]  # [R] 16 bytes, equal for rows that mean the same; b"" for malformed rows
    reasons: dict[int, str]  # row of the chunk -> why it is malformed
    notes: Counter[str]  # what rendering left out and the like, see `data.render.NOTES`
    block: ExampleBlock


@dataclass(slots=True)
class _Prepared:
    """One row's part of a chunk."""

    fate: Fate
    examples: tuple[Example, ...] = ()
    overlong: bool = False
    rendered: int = 0
    truncated: int = 0
    masked_pieces: int = 0
    identity: bytes = b""
    reason: str = ""


class Progress(Protocol):
    """Told which row of the chunk is worked on, so that a crash can be put down to a row."""

    def __call__(self, place: int, /) -> None:
        """`place` counts from 0 within the chunk."""
        ...


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Convert, render, apply the length limit. Picklable: it is sent to worker processes once.

    Args:
        formats: The format of each source.
        renderer: Turns items into tokens.
        max_length: Longest example in tokens.
        overlong: What happens to longer ones: keep the head, leave the row out, cut into consecutive pieces, or stop.
        skip_malformed: Count malformed rows instead of stopping at the first.
        kind: What the objective compares. For judged answers, a pair is taken apart into a good and a bad one.
    """

    formats: Sequence[Format]
    renderer: Renderer
    max_length: int
    overlong: Overlong
    skip_malformed: bool
    kind: BatchKind = "tokens"

    def run(self, tasks: Sequence[Task], progress: Progress | None = None) -> Chunk:
        """Prepares the rows of a chunk.

        Raises:
            RowError: at the first malformed row, unless these are skipped; the message names file and row.
            DataError: at the first overlong row if that is an error, and whatever else rendering raises, with the row's place.
        """
        prepared: list[_Prepared] = []
        notes: Counter[str] = Counter()
        for place, task in enumerate(tasks):
            if progress is not None:
                progress(place)
            prepared.append(self._row(task, notes))
        return _chunk(prepared, notes)

    def item(self, task: Task) -> Item | None:
        """The item that a row means, None for an empty one.

        Raises:
            RowError: the row is malformed.
        """
        if task.row.fault is not None:
            raise task.row.fault
        item = self.formats[task.source].convert(task.row)
        return None if item is None or is_blank(item) else item

    def identity_of(self, task: Task) -> bytes:
        """The row's identity without rendering it, b"" where it has none."""
        try:
            item = self.item(task)
        except RowError:
            return b""
        return b"" if item is None else identity(item)

    def render(self, item: Item, *, where: Where | None = None, notes: Counter[str] | None = None) -> list[Example]:
        """The examples of an item, before the length limit.

        Raises:
            RowError: see `data.render.Renderer.render`, which it comes from.
            TemplateError: likewise.
        """
        parts = _judged(item) if self.kind == "judged" and isinstance(item, Pair) else [item]
        return [self.renderer.render(part, where=where, notes=notes) for part in parts]

    def fit(self, example: Example) -> tuple[Example, ...]:
        """The pieces of an example that go into the data: itself if it fits, else what `overlong` says.

        A tree is as long as its longest path; it is cut at the end of each, and never split.

        Raises:
            DataError: it is too long and `overlong` is "error".
        """
        length = max(paths(example))
        if length <= self.max_length:
            return (example,)
        if self.overlong == "error":
            ways = "truncate, drop or split" if self.kind == "tokens" else "truncate or drop"
            raise DataError(
                f"the example has {length:,} tokens, more than data.max_length = {self.max_length:,}",
                hint=f"Raise data.max_length, or set data.overlong to {ways}.",
            )
        if is_tree(example):
            return (cut(example, self.max_length, whole=self.kind == "steps"),) if self.overlong == "truncate" else ()
        starts = {"drop": [], "truncate": [0], "split": range(0, length, self.max_length)}[self.overlong]
        return tuple(
            Example(example.input_ids[start : start + self.max_length], example.weights[start : start + self.max_length])
            for start in starts
        )

    def _row(self, task: Task, notes: Counter[str]) -> _Prepared:
        try:
            item = self.item(task)
            if item is None:
                return _Prepared(Fate.EMPTY)
            rendered = self.render(item, where=task.row.where(), notes=notes)
            if not all(len(example.input_ids) for example in rendered):
                return _Prepared(Fate.EMPTY)
            return replace(_together([self._fitted(example) for example in rendered]), identity=identity(item))
        except BurnishError as error:
            if self.skip_malformed and isinstance(error, RowError):
                return _Prepared(Fate.MALFORMED, reason=error.message)
            if isinstance(error, RowError) and error.hint is None:
                error.hint = "Mend the row, or set data.malformed: skip to leave such rows out and count them."
            raise _placed(error, task.row) from error
        except Exception as error:
            error.add_note(f"burnish was preparing {task.row.file}, row {task.row.number}")
            raise

    def _fitted(self, example: Example) -> _Prepared:
        pieces = self.fit(example)
        rendered = len(example.input_ids)
        overlong = max(paths(example)) > self.max_length
        if not pieces:
            return _Prepared(Fate.DROPPED, overlong=True, rendered=rendered)
        trained = tuple(piece for piece in pieces if usable(piece))
        if trained:
            kept = sum(len(piece.input_ids) for piece in pieces)
            masked = kept - sum(len(piece.input_ids) for piece in trained)
            return _Prepared(Fate.KEPT, trained, overlong, rendered, rendered - kept, masked)
        lost = overlong and usable(example)
        return _Prepared(Fate.MASKED_BY_TRUNCATION if lost else Fate.FULLY_MASKED, (), overlong, rendered)


def chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Cuts a stream of rows into chunks, bounded in rows and in characters so that memory stays flat whatever the rows are like."""
    chunk: list[Task] = []
    size = 0
    for task in tasks:
        chunk.append(task)
        size += _characters(task.row.fields)
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def trained_tokens(example: Example) -> int:
    """How many tokens of an example are trained; the first one of a root never is, since nothing comes before it."""
    return sum(trained_counts(example))


def identity(item: Item) -> bytes:
    """Sixteen bytes that are equal for items with equal content (a hash of their whole text, so a chance collision is out of reach)."""
    return hashlib.blake2b(repr(item).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def is_blank(item: Item) -> bool:
    """Whether there is nothing in an item but white space."""
    match item:
        case Conversation():
            return not any(m.content.strip() or (m.reasoning or "").strip() or m.tool_calls for m in item.messages)
        case Completion():
            return not (item.prompt.strip() or item.completion.strip())
        case Pair():
            return is_blank(item.chosen) and is_blank(item.rejected)
        case Judged():
            return is_blank(item.answer)
        case Stepwise():
            return not any(step.strip() for step in item.steps)
        case Text():
            return not item.text.strip()
        case _:
            return not item.input_ids


def _judged(pair: Pair) -> list[Item]:
    """The two answers of a pair, each by itself."""
    return [Judged(pair.chosen, True, pair.weight), Judged(pair.rejected, False, pair.weight)]


def _together(parts: Sequence[_Prepared]) -> _Prepared:
    """What became of a row that makes several examples: kept where one of them is."""
    best = min(parts, key=lambda part: part.fate)
    if len(parts) == 1:
        return best
    lost = sum(part.rendered for part in parts if part.fate != best.fate)
    return _Prepared(
        best.fate,
        tuple(example for part in parts for example in part.examples),
        any(part.overlong for part in parts),
        sum(part.rendered for part in parts),
        sum(part.truncated for part in parts),
        sum(part.masked_pieces for part in parts) + (lost if best.fate is Fate.KEPT else 0),
    )


def _placed(error: BurnishError, row: Row) -> BurnishError:
    """The error with the row's file and number, where it names none itself."""
    if error.where is not None and error.where.row is not None and error.where.file is not None:
        return error
    line, field = (error.where.line, error.where.field) if error.where else (None, None)
    kind = type(error) if isinstance(error, DataError) else RowError
    return kind(error.message, where=Where(row.file, line, row.number, field), hint=error.hint)


def _characters(value: Any) -> int:
    """The size of a JSON-like value, roughly."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = list(cast("Mapping[str, Any]", value).values())
    if isinstance(value, list | tuple):
        return sum(map(_characters, cast("Sequence[Any]", value))) + 1
    return 1


def _chunk(prepared: list[_Prepared], notes: Counter[str]) -> Chunk:
    return Chunk(
        fates=np.array([row.fate for row in prepared], np.uint8),
        overlong=np.array([row.overlong for row in prepared], bool),
        rendered=np.array([row.rendered for row in prepared], np.int64),
        truncated=np.array([row.truncated for row in prepared], np.int64),
        masked_pieces=np.array([row.masked_pieces for row in prepared], np.int64),
        identities=[row.identity for row in prepared],
        reasons={place: row.reason for place, row in enumerate(prepared) if row.fate is Fate.MALFORMED},
        notes=notes,
        block=_block([(place, example) for place, row in enumerate(prepared) for example in row.examples]),
    )


def _block(numbered: list[tuple[int, Example]]) -> ExampleBlock:
    examples = [example for _, example in numbered]
    runs = [run_lengths(example.weights) for example in examples]
    return ExampleBlock(
        input_ids=_joined([example.input_ids for example in examples], np.int32),
        lengths=np.array([len(example.input_ids) for example in examples], np.int32),
        run_lengths=_joined([lengths for lengths, _ in runs], np.int32),
        run_weights=_joined([values for _, values in runs], np.float32),
        runs=np.array([len(lengths) for lengths, _ in runs], np.int32),
        trained=np.array([trained_tokens(example) for example in examples], np.int32),
        weights=np.array([loss_weight(example) for example in examples], np.float64),
        leading=np.array([leading_weight(example) for example in examples], np.float64),
        ends=np.array([end for example in examples for end in example.ends], np.int32),
        parents=np.array([parent for example in examples for parent in example.parents], np.int32),
        segments=np.array([len(example.ends) for example in examples], np.int32),
        values=np.array([value for example in examples for value in example.values], np.float32),
        value_counts=np.array([len(example.values) for example in examples], np.int32),
        rows=np.array([place for place, _ in numbered], np.int32),
    )


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    empty: npt.NDArray[Any] = np.zeros(0, dtype)
    return np.concatenate([empty, *parts]).astype(dtype, copy=False)
