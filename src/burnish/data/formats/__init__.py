"""What rows mean: `choose` finds the format of a source, and a format turns one row into one item.

A format `foo` is the module `foo.py` beside this one, with

    SHAPE                 its fields, and the columns they usually stand in
    looks_like(fields)    whether a row is of this format (for detection)
    convert(fields)       the row's meaning, None where the row is empty; RowError where it is malformed

and its name in `config.sections.FORMATS`. A format of your own is a function in a file, `format: ./my_format.py:convert`, see `OwnFormat`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from burnish.config.sections import FORMATS, Source
from burnish.core import plugins
from burnish.core.errors import FormatError, RowError, Where, did_you_mean, nearest
from burnish.data.formats.base import Binding, Fields, Shape, kind_of, listed, spelled
from burnish.data.sources.remote import shown_name
from burnish.data.sources.row import Row
from burnish.data.types import BatchKind, Completion, Conversation, Item, Judged, Pair, Stepwise, Text, Tokens

__all__ = ["BuiltInFormat", "Format", "OwnFormat", "choose"]

_ITEMS: dict[BatchKind, tuple[type[Item], ...]] = {
    "tokens": (Conversation, Completion, Text, Tokens),
    "pairs": (Pair,),
    "judged": (Judged, Pair),
    "steps": (Stepwise,),
}
"""What the rows may mean to each kind of objective. Pairs are taken apart into judged answers where these are wanted."""
_FORMATS: dict[BatchKind, tuple[str, ...]] = {
    "tokens": ("alpaca", "sharegpt", "messages", "prompt_completion", "text", "tokens"),
    "pairs": ("preference",),
    "judged": ("judged", "preference"),
    "steps": ("stepwise",),
}
_WANTED: dict[BatchKind, str] = {
    "tokens": "text to learn",
    "pairs": "two answers to each prompt, one of them preferred (chosen, rejected)",
    "judged": "answers with a label that says whether they are good, or pairs (chosen, rejected)",
    "steps": "solutions in steps with a label for each (prompt, completions, labels)",
}
_WITHOUT_SYSTEM = ("text", "tokens")


class Format(Protocol):
    """Turns rows into items. Picklable."""

    @property
    def name(self) -> str:
        """What the run file calls it."""
        ...

    def convert(self, row: Row) -> Item | None:
        """The meaning of a row; None where the row is empty.

        Raises:
            RowError: the row is malformed.
        """
        ...

    def describe(self) -> str:
        """One line for the log: the format, and which columns it uses."""
        ...


@dataclass(frozen=True, slots=True)
class _Kind:
    """A built-in format as its module holds it."""

    name: str
    shape: Shape
    looks_like: Callable[[Fields], bool]
    convert: Callable[[Fields], Item | None]

    @classmethod
    def of(cls, name: str) -> _Kind:
        module = plugins.built_in("data.formats", name)
        return cls(name, module.SHAPE, module.looks_like, module.convert)


@dataclass(frozen=True, slots=True)
class BuiltInFormat:
    """A built-in format, bound to the columns of one source."""

    kind: _Kind
    binding: Binding
    unused: tuple[str, ...] = ()
    """Columns that the format does not look at."""

    @property
    def name(self) -> str:
        """What the run file calls it."""
        return self.kind.name

    @property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        return [column for given, column in self.binding.columns.items() if given not in self.kind.shape.inner]

    @property
    def required(self) -> dict[str, str]:
        """The columns of the required fields: field -> column."""
        return {given: self.binding.columns[given] for given in self.kind.shape.required}

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns, and in them what belongs there."""
        return all(column in row.fields for column in self.required.values()) and self.kind.looks_like(Fields(row, self.binding))

    def convert(self, row: Row) -> Item | None:
        """The meaning of a row; None where the row is empty.

        Raises:
            RowError: the row is malformed.
        """
        if row.fault is not None:
            raise row.fault
        return self.kind.convert(Fields(row, self.binding))

    def describe(self) -> str:
        """`prompt_completion (question, answer; unused: id)`."""
        unused = f"; unused: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.name} ({', '.join(self.columns)}{unused})"


@dataclass(slots=True)
class OwnFormat:
    """A function of the user's: `convert(row: dict) -> item`.

    It may return an item of `burnish.data.types`, a dict that a built-in format understands (`{"messages": [...]}`, `{"prompt": ...,
    "completion": ...}`, `{"prompt": ..., "chosen": ..., "rejected": ...}`), a text, or None for an empty row. `kind` is what the objective
    compares.
    """

    name: str
    base: Path
    source: Source
    kind: BatchKind = "tokens"
    _function: Callable[[dict[str, Any]], object] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> tuple[str, Path, Source, BatchKind]:
        return self.name, self.base, self.source, self.kind  # the function belongs to a file, and is loaded from it again

    def __setstate__(self, state: tuple[str, Path, Source, BatchKind]) -> None:
        self.name, self.base, self.source, self.kind = state
        self._function = None

    def convert(self, row: Row) -> Item | None:
        """The meaning of a row; None where the row is empty.

        Raises:
            RowError: the function failed, or returned something else.
        """
        if row.fault is not None:
            raise row.fault
        try:
            value = self._load()(dict(row.fields))
        except Exception as error:  # whatever a function of the user's may raise
            raise RowError(f"{self.name} failed: {type(error).__name__}: {error}".rstrip(": "), where=row.where()) from error
        if value is None or isinstance(value, _ITEMS[self.kind]):
            return value
        if isinstance(value, get_args(Item)):
            wanted = f"the objective needs {_WANTED[self.kind]}"
            raise RowError(f"{self.name} returned a {type(value).__name__}, but {wanted}", where=row.where())
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise RowError(f"{self.name} returned {kind_of(value)}, expected an item, a dict, a text or None", where=row.where())
        made = Row(row.file, row.number, cast("dict[str, Any]", value), row.line)
        return _detect(self.source.model_copy(update={"columns": {}}), [made], self.kind).convert(made)

    def describe(self) -> str:
        """The function's place."""
        return self.name

    def _load(self) -> Callable[[dict[str, Any]], object]:
        if self._function is None:
            function = plugins.load("formats", self.name, self.base)
            if not callable(function):
                raise FormatError(f"'{self.name}' is {kind_of(function)}, expected a function")
            self._function = function
        return self._function


def choose(source: Source, sample: Sequence[Row], *, base: Path = Path(), kind: BatchKind = "tokens") -> Format:
    """The format of a source: the one that the run file names, else the only one that fits the rows.

    Args:
        source: The source of the run file.
        sample: Its first rows.
        base: The run file's folder, where `./my_format.py:convert` is looked for after the working directory.
        kind: What the objective compares.

    Raises:
        FormatError: no format fits, or several do; the message says what to write. Or the named one does not fit.
        RowError: not one row of the sample could be read.
    """
    if source.format != "auto" and source.format not in FORMATS:
        own = OwnFormat(source.format, base, source, kind)
        own._load()  # pyright: ignore[reportPrivateUsage]  # a missing file is found now, not in a worker
        return own
    whole = [row for row in sample if row.fault is None]
    if not whole:
        raise next((row.fault for row in sample if row.fault), _no_rows(source))
    if source.format != "auto" and source.format not in _FORMATS[kind]:
        fitting = " or ".join(f"'format: {name}'" for name in _FORMATS[kind])
        raise FormatError(
            f"format: {source.format} is not for this objective, which needs {_WANTED[kind]}: {fitting}", where=_where(source)
        )
    chosen = _detect(source, whole, kind) if source.format == "auto" else _named(source, whole)
    if source.system and chosen.name in _WITHOUT_SYSTEM:
        raise FormatError(f"a system prompt needs conversations, but the format is {chosen.name}", where=_where(source))
    return chosen


def _detect(source: Source, rows: Sequence[Row], kind: BatchKind = "tokens") -> BuiltInFormat:
    columns = _columns(rows)
    fits = _all_fitting(source, rows, _FORMATS[kind])
    if len(fits) == 1:
        if kind == "tokens":
            _refuse_what_is_meant_otherwise(source, fits[0], rows)
        return fits[0]
    if fits:
        raise _ambiguous(source, fits)
    others = _all_fitting(source, rows, [name for name in FORMATS if name not in _FORMATS[kind]])
    raise _of_another_kind(source, kind, others[-1]) if others and kind != "tokens" else _unknown(source, columns, _FORMATS[kind])


def _all_fitting(source: Source, rows: Sequence[Row], names: Sequence[str]) -> list[BuiltInFormat]:
    kinds = [kind for kind in map(_Kind.of, names) if set(source.columns) <= set(kind.shape.names)]
    return [way for kind in kinds for way in _fitting(_bound(kind, source, _columns(rows)), rows)]


def _of_another_kind(source: Source, kind: BatchKind, fit: BuiltInFormat) -> FormatError:
    return FormatError(f"the objective needs {_WANTED[kind]}, but the rows are {fit.describe()}", where=_where(source))


def _refuse_what_is_meant_otherwise(source: Source, fit: BuiltInFormat, rows: Sequence[Row]) -> None:
    """Columns beside a fitting format's that make its meaning doubtful: to train on would be wrong, or worse than what was meant.

    Raises:
        FormatError: the rows are preference pairs or judged, or one column is nearly that of a format which fits better.
    """
    columns = _columns(rows)
    write = f"write 'format: {fit.name}' beside the data set's path"
    if {"chosen", "rejected"} <= set(columns):
        raise _pairs(source, f"to train on the conversations alone, {write}" if _converts(fit, rows) else None)
    if "label" in fit.unused and all(isinstance(row.fields.get("label"), bool) for row in rows):
        raise FormatError(
            "the rows are judged (column 'label'), which this objective does not use; write 'objective: kto' to learn from that, "
            f"or, to train on good and bad alike, {write}",
            where=_where(source),
        )
    for kind in map(_Kind.of, _FORMATS["tokens"]):
        near = _near(kind, columns)
        known = {*near, *(name for spelling in kind.shape.spellings for name in spelling.values())}
        slips = [column for column in near.values() if column in fit.unused and column not in known]
        if slips and set(near.values()) & set(fit.columns):
            used = ", ".join(fit.required.values())
            raise FormatError(
                f"the rows fit {fit.name} ({used}), but the column '{slips[0]}' is nearly one of {kind.name}",
                where=_where(source),
                hint=f"Write 'format: {kind.name}' with 'columns: {_inline(near)}', or 'format: {fit.name}', beside the data set's path.",
            )


def _converts(fit: BuiltInFormat, rows: Sequence[Row]) -> bool:
    """Whether at least half of the rows come to something to train on."""

    def comes_to_something(row: Row) -> bool:
        try:
            return fit.convert(row) is not None
        except (RowError, FormatError):
            return False

    return 2 * sum(map(comes_to_something, rows)) >= len(rows)


def _bound(kind: _Kind, source: Source, columns: Sequence[str]) -> list[BuiltInFormat]:
    """The format in every spelling for which there are columns."""
    ways = [BuiltInFormat(kind, Binding(way, source.roles, source.system)) for way in spelled(kind.shape, source.columns, columns)]
    return [replace(way, unused=tuple(column for column in columns if column not in way.columns)) for way in ways]


def _fitting(ways: Sequence[BuiltInFormat], rows: Sequence[Row]) -> list[BuiltInFormat]:
    """Those that at least half of the rows are of (a malformed row or two must not hide what the rest is)."""
    return [way for way in ways if 2 * sum(map(way.fits, rows)) >= len(rows)]


def _named(source: Source, rows: Sequence[Row]) -> BuiltInFormat:
    kind = _Kind.of(source.format)
    name, shape = kind.name, kind.shape
    columns = _columns(rows)
    for given, column in source.columns.items():
        if given not in shape.names:
            raise FormatError(
                f"the format {name} has no field '{given}': {did_you_mean(given, shape.names)}", where=_where(source, "columns")
            )
        if column not in columns and given not in shape.inner:
            raise _no_column(source, column, columns)
    ways = _bound(kind, source, columns)
    fits = _fitting(ways, rows) if len(ways) > 1 else ways
    if len(fits) > 1:
        raise _ambiguous(source, fits)
    if not ways:
        raise FormatError(
            f"the format {name} needs the columns {listed(shape.required)}, found {listed(columns)}",
            where=_where(source),
            hint=_mapping_hint(kind, columns) or f"Say which is which: 'columns: {{{shape.required[0]}: NAME}}'.",
        )
    return (fits or ways)[0]


def _ambiguous(source: Source, fits: Sequence[BuiltInFormat]) -> FormatError:
    names = list(dict.fromkeys(fit.name for fit in fits))
    ways = " and ".join(f"{fit.name} ({', '.join(fit.required.values())})" for fit in fits)
    if len(names) > 1:
        choices = [f"'format: {name}'" for name in names]
    else:
        choices = [f"'columns: {_inline(fit.required)}'" for fit in fits]
    hint = f"Write {' or '.join(choices)} beside the data set's path."
    return FormatError(f"the rows fit more than one format: {ways}", where=_where(source), hint=hint)


def _inline(mapping: Mapping[str, str | None]) -> str:
    return "{" + ", ".join(f"{given}: {column}" for given, column in mapping.items()) + "}"


def _unknown(source: Source, columns: Sequence[str], names: Sequence[str]) -> FormatError:
    if {"chosen", "rejected"} <= set(columns) and "preference" not in names:
        return _pairs(source, f"to train on the chosen answers alone, {_CHOSEN_ALONE}" if "prompt" in columns else None)
    kinds = [_Kind.of(name) for name in names]
    absent = [column for column in source.columns.values() if column not in columns]
    if absent and not any(set(source.columns) & set(kind.shape.inner) for kind in kinds):
        return _no_column(source, absent[0], columns)
    hint = next((hint for kind in kinds if (hint := _mapping_hint(kind, columns))), None)
    needs = "; ".join(f"{kind.name}: {' + '.join(kind.shape.required)}" for kind in kinds)
    return FormatError(
        f"no format fits rows with the columns {listed(columns)}",
        where=_where(source),
        hint=hint or f"Write 'format:' and 'columns: {{field: column}}' beside the data set's path. Fields by format: {needs}.",
    )


def _no_column(source: Source, column: str, columns: Sequence[str]) -> FormatError:
    return FormatError(f"the rows have no column '{column}': {did_you_mean(column, columns)}", where=_where(source, "columns"))


def _mapping_hint(kind: _Kind, columns: Sequence[str]) -> str | None:
    """What to write where every required field has a column of nearly its name."""
    near = _near(kind, columns)
    if not near:
        return None
    if any(all(spelling.get(given, given) == column for given, column in near.items()) for spelling in kind.shape.spellings):
        return f"The columns are those of {kind.name}; write 'format: {kind.name}' to learn what is wrong with the rows."
    return f"Did you mean 'format: {kind.name}' with 'columns: {_inline(near)}'?"


def _near(kind: _Kind, columns: Sequence[str]) -> dict[str, str]:
    """Field -> the column of (nearly) its name, where every required field has one of its own in one spelling; else nothing."""
    for spelling in kind.shape.spellings:
        near = {given: nearest(spelling.get(given, given), columns) for given in kind.shape.required}
        found = {given: column for given, column in near.items() if column is not None}
        if len(set(found.values())) == len(near):
            return found
    return {}


_CHOSEN_ALONE = "write 'format: prompt_completion' with 'columns: {completion: chosen}' beside the data set's path"


def _pairs(source: Source, advice: str | None) -> FormatError:
    learn = "write 'objective: dpo' (or simpo, orpo, kto, reward) to learn from the preference"
    return FormatError(
        "the rows are preference pairs (columns 'chosen' and 'rejected'), which this objective does not use; "
        f"{f'{learn}, or, {advice}' if advice else learn}",
        where=_where(source),
    )


def _no_rows(source: Source) -> FormatError:
    return FormatError("there is no row to tell the format from", where=_where(source))


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.fields))


def _where(source: Source, field: str | None = None) -> Where:
    return Where(shown_name(source.path), field=field)
