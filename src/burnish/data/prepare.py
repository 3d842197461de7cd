"""Rows on disk -> tokenised, cached examples and the account of what became of every row.

    open the sources -> choose their formats -> mix -> [convert -> render -> length limit] in worker processes -> deduplicate -> cache
                                                                                          cache -> hold out -> train, eval, account

What stands in the cache depends on the data and the settings alone, never on the number of workers. Holding out a fraction is only a view
of the cache, so another fraction or seed costs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from burnish.config.sections import Data, Source
from burnish.core.errors import DataError, Where
from burnish.core.log import console, info, warn
from burnish.core.plugins import is_reference, split_reference
from burnish.data import formats
from burnish.data.account import Account, Lengths, Packing, SourceAccount
from burnish.data.cache import Cache, EntryWriter, Examples, Store
from burnish.data.mix import mix
from burnish.data.order import hashed
from burnish.data.packing import best_fit_decreasing, fullness
from burnish.data.pipeline import Pipeline, Renderer, Task, chunks
from burnish.data.progress import bar, expected_rows
from burnish.data.sources import RowSource, open_source
from burnish.data.sources.row import Row
from burnish.data.tally import Tally
from burnish.data.types import BatchKind
from burnish.data.workers import prepared

_SAMPLE_ROWS = 100  # rows that the format is detected from


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data ready for training, and the account of it."""

    train: Examples
    eval: Examples | None
    account: Account


@dataclass(frozen=True, slots=True)
class OpenSet:
    """Opened sources for one kind of objective, each with its first rows and its format."""

    kind: BatchKind
    settings: Sequence[Source]
    sources: Sequence[RowSource]
    samples: Sequence[Sequence[Row]]
    formats: Sequence[formats.Format]

    def account(self) -> Account:
        """An account in which nothing has been read."""
        return Account([SourceAccount(source.name, kind.name) for source, kind in zip(self.sources, self.formats, strict=True)])

    def tasks(self, data: Data, seed: int) -> Iterator[Task]:
        """The rows of all sources in the order that `data.mix` says."""
        each = [_Tasks(number, source) for number, source in enumerate(self.sources)]
        return iter(mix(each, [source.weight for source in self.settings], data.mix, seed))


@dataclass(frozen=True, slots=True)
class _Tasks:
    """The rows of a source as tasks; each iteration begins anew."""

    number: int
    source: RowSource

    def __iter__(self) -> Iterator[Task]:
        return (Task(self.number, row) for row in self.source.rows())


def prepare(
    data: Data, renderer: Renderer, *, seed: int, kind: BatchKind = "tokens", progress: bool = True, base: Path = Path()
) -> Prepared:
    """Prepares training and held-out data as the `data` section says.

    Args:
        data: The section of the run file.
        renderer: Turns items into tokens.
        kind: What the objective compares, and so which rows it can use.
        seed: Decides samples, the mixing of sources, and what is held out.
        progress: Show a bar on the console.
        base: The run file's folder, for formats in files of the user's own.

    Raises:
        SourceError, FormatError, RowError, TemplateError: see there; nothing is left behind half-written.
        DataError: when nothing is left to train on or to hold out; the message says why.
    """
    maker = _Maker(data, renderer, seed, kind, progress, base)
    train = maker.load(data.train, "train")
    if data.eval is None:
        return Prepared(train.whole(), None, _finished(train.account, train.whole(), data))
    if not isinstance(data.eval, list):
        kept, held_out = hold_out(train.store, data.eval, seed)
        views = Examples(train.store, kept, fingerprint=train.content), Examples(train.store, held_out, fingerprint=train.content)
        move_to_eval(train.account, views[1])
        return Prepared(*views, _finished(train.account, views[0], data))
    held = maker.load(data.eval, "eval")
    account = _finished(train.account, train.whole(), data)
    account.evaluation = _finished(held.account, held.whole(), data)
    both = np.isin(held.store.identities, train.store.identities)
    account.eval_rows_also_in_train = len(np.unique(held.store.turns[both]))
    return Prepared(train.whole(), held.whole(), account)


def prepare_eval(
    data: Data, renderer: Renderer, *, seed: int, kind: BatchKind = "tokens", progress: bool = True, base: Path = Path()
) -> tuple[Examples, Account] | None:
    """The held-out data alone, for training data that is streamed; None where the run has none.

    Raises:
        DataError: as `prepare`, and when a fraction is asked for, which only whole data can give.
    """
    if data.eval is None:
        return None
    if not isinstance(data.eval, list):
        raise DataError(
            f"data.eval = {data.eval:g} is a fraction, which cannot be held out of streamed rows",
            hint="Give data.eval a source of its own, or leave out data.streaming.",
        )
    held = _Maker(data, renderer, seed, kind, progress, base).load(data.eval, "eval")
    return held.whole(), _finished(held.account, held.whole(), data)


def open_set(
    settings: Sequence[Source], kind: BatchKind, *, seed: int, part: str = "train", streaming: bool = False, base: Path = Path()
) -> OpenSet:
    """Opens sources and chooses their formats, and says what was chosen.

    Raises:
        SourceError: a source cannot be found or read.
        FormatError: the format is unknown or ambiguous.
    """
    prefer = ("train",) if part == "train" else ("validation", "test")
    opened = [open_source(source, seed=seed, streaming=streaming, prefer=prefer) for source in settings]
    samples = [list(islice(source.rows(), _SAMPLE_ROWS)) for source in opened]
    chosen = [formats.choose(setting, sample, base=base, kind=kind) for setting, sample in zip(settings, samples, strict=True)]
    for source, format in zip(opened, chosen, strict=True):
        info(f"data.{part}: {source.describe()}: {format.describe()}")
    return OpenSet(kind, settings, opened, samples, chosen)


def pipeline_of(data: Data, opened: OpenSet, renderer: Renderer) -> Pipeline:
    """The pipeline that the `data` section asks for.

    Raises:
        DataError: answers that are compared would be split.
    """
    if opened.kind != "tokens" and data.overlong == "split":
        raise DataError("data.overlong: split cuts answers that are to be compared whole", hint="Write truncate, drop or error.")
    skip = data.malformed == "skip"
    return Pipeline(opened.formats, renderer, max_length=data.max_length, overlong=data.overlong, skip_malformed=skip, kind=opened.kind)


def cache_folder(data: Data) -> Path:
    """Where tokenised rows are kept."""
    return Path(data.cache).expanduser() if data.cache else Path.home() / ".cache" / "burnish" / "data"


def hold_out(store: Store, fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Splits examples into those to train on and those to hold out: places in the store, in order.

    Rows are ordered by a hash of their content, and the first ones are held out. So equal rows and pieces of one row are always on the
    same side, the choice does not depend on the order of the rows, and the number held out is exact but for such ties.

    Raises:
        DataError: when one side would be empty.
    """
    hashes = hashed(store.identities, seed)
    first_of_row = np.concatenate([[True], store.turns[1:] != store.turns[:-1]])
    of_rows = hashes[first_of_row]
    wanted = int(fraction * len(of_rows) + 0.5)
    if wanted < 1:
        least = f"Give at least {1 / len(of_rows):.2g}, or" if len(of_rows) > 1 else "Give"
        raise DataError(
            f"data.eval = {fraction:g} of the {len(of_rows):,} {'rows' if len(of_rows) > 1 else 'row'} left after cleaning holds out none",
            hint=f"{least} a file of its own for data.eval.",
        )
    held_out = hashes <= np.partition(of_rows, wanted - 1)[wanted - 1]
    if held_out.all():
        raise DataError(
            f"data.eval = {fraction:g} of {len(of_rows):,} rows leaves nothing to train on (equal rows stay together)",
            hint="Give a smaller fraction, or a file of its own for data.eval.",
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def move_to_eval(account: Account, held_out: Examples) -> None:
    """Enters examples that were counted as kept as held out instead."""
    for number, source in enumerate(account.sources):
        mine = held_out.sources == number
        total, trained = (int(column[mine].sum(dtype=np.int64)) for column in (held_out.lengths, held_out.trained))
        rows = len(np.unique(held_out.turns[mine]))
        source.rows.kept -= rows
        source.rows.eval += rows
        source.tokens.total -= total
        source.tokens.trained -= trained
        source.tokens.masked -= total - trained
        source.tokens.eval += total
    account.examples -= len(held_out)


def check_something_is_left(account: Account, data: Data, part: str) -> None:
    """Makes sure that there is a row to use.

    Raises:
        DataError: when there is none; the message says what became of the rows, the hint what to do about the commonest fate.
    """
    rows = account.rows
    if rows.kept:
        return
    names = ", ".join(source.name for source in account.sources)
    where = Where(names)
    if not rows.read:
        raise DataError(f"data.{part} has no rows", where=where)
    if rows.masked_by_truncation:
        raise DataError(
            f"none of the {rows.read:,} rows has a trained token left: {rows.masked_by_truncation:,} are cut at data.max_length = "
            f"{data.max_length:,} before the answer begins",
            where=where,
            hint="Raise data.max_length.",
        )
    if rows.fully_masked:
        raise DataError(
            f"no token of the {rows.fully_masked:,} rows is trained: data.train_on = {data.train_on!r} selects nothing in them",
            where=where,
            hint="Look at a row with `burnish data RUN.yaml --row 1`; check data.train_on and the roles of the source.",
        )
    fates = {"dropped as longer than data.max_length": rows.dropped, "malformed": rows.malformed, "empty": rows.empty}
    counts = ", ".join(f"{count:,} {name}" for name, count in fates.items() if count)
    first = account.malformed[0] if account.malformed else None
    reason = f"; the first malformed one is row {first.row} of {first.file}: {first.reason}" if first else ""
    raise DataError(f"none of the {rows.read:,} rows can be used: {counts}{reason}", where=where)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A cache entry in use."""

    content: str
    store: Store
    account: Account

    def whole(self) -> Examples:
        return Examples(self.store, fingerprint=self.content)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Gets tokenised rows from the cache, or makes them."""

    data: Data
    renderer: Renderer
    seed: int
    kind: BatchKind
    progress: bool
    base: Path

    def load(self, settings: Sequence[Source], part: str) -> _Loaded:
        """The tokenised rows of some sources."""
        opened = open_set(settings, self.kind, seed=self.seed, part=part, base=self.base)
        data = self.data
        folder = cache_folder(data)
        cache = Cache(folder, warn)
        key = self._key(opened)
        entry = cache.open(key)
        if entry is not None:
            info(f"data.{part}: {len(entry.store):,} tokenised examples reused from {folder / key}")
        else:
            with cache.lock(key, on_wait=lambda: info("another process is tokenising the same data; waiting for it")):
                entry = cache.open(key, quiet=True)
                if entry is None:
                    with cache.write(key) as writer:
                        writer.finish(self._tokenise(opened, part, writer).to_json())
                    entry = cache.open(key)
        if entry is None:
            raise DataError(f"the tokenised data in {folder / key} cannot be read back", hint="Look at the disk, or set data.cache.")
        return _Loaded(entry.content, entry.store, Account.from_json(entry.account))

    def _tokenise(self, opened: OpenSet, part: str, writer: EntryWriter) -> Account:
        """Prepares all rows and writes the examples; returns the account."""
        data = self.data
        tally = Tally(opened.account(), deduplicate=data.deduplicate)
        turn = 0
        with bar(console, shown=self.progress) as display:
            work = display.add_task(f"tokenising data.{part}", total=expected_rows(opened.sources, opened.samples))
            for tasks, raw in prepared(chunks(opened.tasks(data, self.seed)), pipeline_of(data, opened, self.renderer), data.workers):
                chunk = tally.enter(tasks, raw)
                writer.add(
                    chunk.block,
                    files=[task.row.file for task in tasks],
                    numbers=np.array([task.row.number for task in tasks], np.int64),
                    sources=np.array([task.source for task in tasks], np.int32),
                    turns=np.arange(turn, turn + len(tasks)),
                    identities=np.array([int.from_bytes(identity[:8], "little") for identity in chunk.identities], np.uint64),
                )
                turn += len(tasks)
                display.update(work, advance=len(tasks))
        check_something_is_left(tally.account, data, part)
        return tally.account

    def _key(self, opened: OpenSet) -> str:
        """Names the content of a cache entry: equal keys mean equal examples."""
        seeded = len(opened.sources) > 1 or any(source.sample for source in opened.settings)
        own = [source.format for source in opened.settings if is_reference(source.format)]
        parts = {
            "code": _code_version(),
            "kind": self.kind,
            "packages": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")},
            "sources": [source.fingerprint() for source in opened.sources],
            "settings": [source.model_dump() for source in opened.settings],
            "formats": [kind.describe() for kind in opened.formats],
            "own_formats": [hashlib.sha256(split_reference(name, self.base)[0].read_bytes()).hexdigest() for name in own],
            "renderer": self.renderer.fingerprint(),
            "options": self.data.model_dump(include={"max_length", "overlong", "deduplicate", "malformed", "mix"}),
            "seed": self.seed if seeded else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _finished(account: Account, examples: Examples, data: Data) -> Account:
    """The account with its summaries of the examples.

    Raises:
        RuntimeError: a row or token was lost or counted twice, which would be a fault of ours.
    """
    if not (account.rows.balanced and account.tokens.balanced):
        raise RuntimeError(f"the account of the data does not add up: {account.rows}, {account.tokens}")
    account.lengths = Lengths.of(examples.lengths)
    if data.packing == "auto":
        room = max(data.max_length, int(examples.lengths.max()))  # a pair may be longer than any of its answers
        bins = len(best_fit_decreasing(examples.lengths, room))
        account.packing = Packing(room, bins, round(fullness(examples.lengths, bins, room), 4))
    return account


def _code_version() -> str:
    """A hash of the code that rows pass through, so that no cache outlives a change of it."""
    folder = Path(__file__).parent
    state = hashlib.sha256()
    for file in sorted(path for suffix in ("*.py", "*.jinja") for path in folder.rglob(suffix)):
        state.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return state.hexdigest()
