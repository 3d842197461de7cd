"""What rows mean: `choose` finds the format of a source, and a format turns one row into one item.

A format `foo` is the module `foo.py` beside this one, with

    SHAPE                 its fields, and the columns they usually stand in
    looks_like(fields)    whether a row is of this format (for detection)
    convert(fields)       the row's meaning, None where the row is empty; RowError where it is malformed

and its name in `config.sections.FORMATS`, and here in `OF_KIND`, by what objectives learn from. A format of your own is a function in a
file, `format: ./my_format.py:convert`, see `OwnFormat`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from burnish.config.sections import FORMATS, Source
from burnish.core import plugins
from burnish.core.errors import FormatError, RowError, Where, did_you_mean, nearest
from burnish.data.formats.base import Binding, Fields, Shape, is_list, is_object, kind_of, listed, spelled
from burnish.data.sources.remote import shown_name
from burnish.data.sources.row import Row
from burnish.data.types import BatchKind, Completion, Conversation, Item, Judged, Pair, Stepwise, Text, Tokens

__all__ = ["OF_KIND", "BuiltInFormat", "Format", "OwnFormat", "choose"]

OF_KIND: Mapping[BatchKind, tuple[str, ...]] = {
    "tokens": ("alpaca", "sharegpt", "messages", "prompt_completion", "text", "tokens"),
    "pairs": ("preference",),
    "judged": ("judged", "preference"),
    "steps": ("stepwise",),
}
"""The formats whose rows an objective can learn from, by what it compares. Judged answers may come from pairs, which are taken apart."""

_ALL_ITEMS = (Conversation, Completion, Text, Tokens, Pair, Judged, Stepwise)
_ITEMS: Mapping[BatchKind, tuple[type[Item], ...]] = {
    "tokens": (Conversation, Completion, Text, Tokens),
    "pairs": (Pair,),
    "judged": (Judged, Pair),
    "steps": (Stepwise,),
}
_WITHOUT_SYSTEM = ("text", "tokens", "stepwise")
_TAKEN_APART = "each pair is two judged answers"


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
    note: str = ""
    """What else the log says about it."""

    @property
    def name(self) -> str:
        """What the run file calls it."""
        return self.kind.name

    @property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        return list(dict.fromkeys(column for given, column in self.binding.columns.items() if given not in self.kind.shape.inner))

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
        note = f"; {self.note}" if self.note else ""
        unused = f"; unused: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.name} ({', '.join(self.columns)}{note}{unused})"


@dataclass(slots=True)
class OwnFormat:
    """A function of the user's: `convert(row: dict) -> item`.

    It may return an item of `burnish.data.types`, a dict that a built-in format understands (`{"messages": [...]}`, `{"prompt": ...,
    "completion": ...}`), a text, or None for an empty row.
    """

    name: str
    base: Path
    source: Source
    makes: BatchKind = "tokens"
    """What the objective learns from."""
    _function: Callable[[dict[str, Any]], object] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> tuple[str, Path, Source, BatchKind]:
        return self.name, self.base, self.source, self.makes  # the function belongs to a file, and is loaded from it again

    def __setstate__(self, state: tuple[str, Path, Source, BatchKind]) -> None:
        self.name, self.base, self.source, self.makes = state
        self._function = None

    def convert(self, row: Row) -> Item | None:
        """The meaning of a row; None where the row is empty.

        Raises:
            RowError: the function failed, or returned something else, or an item that the objective does not learn from.
        """
        if row.fault is not None:
            raise row.fault
        try:
            value = self._load()(dict(row.fields))
        except Exception as error:  # whatever a function of the user's may raise
            raise RowError(f"{self.name} failed: {type(error).__name__}: {error}".rstrip(": "), where=row.where()) from error
        if value is None or isinstance(value, _ITEMS[self.makes]):
            return value
        if isinstance(value, _ALL_ITEMS):
            wanted = " or ".join(item.__name__ for item in _ITEMS[self.makes])
            raise RowError(f"{self.name} returned a {type(value).__name__}, but {_WANTS[self.makes]}: expected {wanted}", where=row.where())
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise RowError(f"{self.name} returned {kind_of(value)}, expected an item, a dict, a text or None", where=row.where())
        made = Row(row.file, row.number, cast("dict[str, Any]", value), row.line)
        return _detect(self.source.model_copy(update={"columns": {}}), [made], self.makes).convert(made)

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
    """The format of a source: the one that the run file names, else the only one that fits the rows and the objective.

    Args:
        source: The source of the run file.
        sample: Its first rows.
        base: The run file's folder, where `./my_format.py:convert` is looked for after the working directory.
        kind: What the objective learns from. The items are pairs for `pairs`, judged answers or pairs for `judged`.

    Raises:
        FormatError: no format fits, or several do; the message says what to write. Or the named one does not fit the rows or the objective.
        RowError: not one row of the sample could be read.
    """
    if source.format != "auto" and source.format not in FORMATS:
        own = OwnFormat(source.format, base, source, kind)
        own._load()  # pyright: ignore[reportPrivateUsage]  # a missing file is found now, not in a worker
        return own
    whole = [row for row in sample if row.fault is None]
    if not whole:
        raise next((row.fault for row in sample if row.fault), _no_rows(source))
    chosen = _detect(source, whole, kind) if source.format == "auto" else _named(source, whole, kind)
    if source.system and chosen.name in _WITHOUT_SYSTEM:
        raise FormatError(f"a system prompt needs conversations, but the format is {chosen.name}", where=_where(source))
    return replace(chosen, note=_TAKEN_APART) if (kind, chosen.name) == ("judged", "preference") else chosen


def _detect(source: Source, rows: Sequence[Row], kind: BatchKind) -> BuiltInFormat:
    fits = _all_that_fit(source, rows, kind)
    if len(fits) == 1:
        _refuse_what_is_meant_otherwise(source, fits[0], rows, kind)
        return fits[0]
    raise _ambiguous(source, fits) if fits else _unknown(source, rows, kind)


def _all_that_fit(source: Source, rows: Sequence[Row], kind: BatchKind) -> list[BuiltInFormat]:
    columns = _columns(rows)
    formats = [format for format in map(_Kind.of, OF_KIND[kind]) if set(source.columns) <= set(format.shape.names)]
    return [way for format in formats for way in _fitting(_bound(format, source, columns), rows)]


def _refuse_what_is_meant_otherwise(source: Source, fit: BuiltInFormat, rows: Sequence[Row], wanted: BatchKind) -> None:
    """Columns beside a fitting format's that make its meaning doubtful: to train on would be wrong, or worse than what was meant.

    Raises:
        FormatError: the rows are preference pairs or judged, or one column is nearly that of a format which fits better.
    """
    columns = _columns(rows)
    if wanted == "tokens":
        _refuse_preferences(source, fit, rows)
    for kind in map(_Kind.of, OF_KIND[wanted]):
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


def _refuse_preferences(source: Source, fit: BuiltInFormat, rows: Sequence[Row]) -> None:
    """To imitate rows that are meant for a preference objective would be to learn bad answers too."""
    write = f"write 'format: {fit.name}' beside the data set's path"
    if {"chosen", "rejected"} <= set(_columns(rows)):
        raise _pairs(source, f"to train on the conversations alone, {write}" if _converts(fit, rows) else _chosen_alone(rows))
    label = next((name for name in ("label", "kto_tag") if name in fit.unused), None)
    if label is not None and all(isinstance(row.fields.get(label), bool) for row in rows):
        raise FormatError(
            f"the rows are judged (column '{label}'), which this objective does not use; to learn from the judgement, write "
            f"{_OBJECTIVES['judged']}; to train on good and bad alike, {write}",
            where=_where(source),
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


def _named(source: Source, rows: Sequence[Row], wanted: BatchKind) -> BuiltInFormat:
    if source.format not in OF_KIND[wanted]:
        raise _of_another_kind(source, wanted)
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


def _unknown(source: Source, rows: Sequence[Row], wanted: BatchKind) -> FormatError:
    columns = _columns(rows)
    if wanted == "tokens" and {"chosen", "rejected"} <= set(columns):
        return _pairs(source, _chosen_alone(rows))
    for other in _OBJECTIVES:
        if other != wanted and (fits := _all_that_fit(source, rows, other)):
            return _meant_for(source, fits[0], other, wanted)
    kinds = [_Kind.of(name) for name in OF_KIND[wanted]]
    absent = [column for column in source.columns.values() if column not in columns]
    if absent and not any(set(source.columns) & set(kind.shape.inner) for kind in kinds):
        return _no_column(source, absent[0], columns)
    hint = next((hint for kind in kinds if (hint := _mapping_hint(kind, columns))), None)
    if wanted == "pairs" and hint is None and len(there := [name for name in ("chosen", "rejected") if name in columns]) == 1:
        (lacks,) = {"chosen", "rejected"} - set(there)
        return FormatError(
            f"the rows have '{there[0]}' but no '{lacks}', which the objective compares it with", where=_where(source), hint=hint
        )
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


_WANTS: Mapping[BatchKind, str] = {
    "tokens": "the objective learns from examples to imitate",
    "pairs": "the objective compares two answers",
    "judged": "the objective learns from answers that are judged good or bad",
    "steps": "the objective learns from solutions in steps that are right or wrong",
}
_HAVE: Mapping[BatchKind, str] = {
    "tokens": "one answer at most, and no judgement",
    "pairs": "two answers, one of them preferred",
    "judged": "one answer that is judged good or bad",
    "steps": "a solution in steps",
}
_OBJECTIVES: Mapping[BatchKind, str] = {
    "pairs": "'objective: dpo' (or simpo, orpo, reward ...)",
    "judged": "'objective: kto'",
    "steps": "'objective: process_reward'",
    "tokens": "'objective: sft'",
}


def _of_another_kind(source: Source, wanted: BatchKind) -> FormatError:
    """The run file names a format that the objective cannot learn from."""
    own: BatchKind = next(kind for kind, names in OF_KIND.items() if source.format in names)
    usable = " or ".join(f"'format: {name}'" for name in OF_KIND[wanted])
    return FormatError(
        f"{_WANTS[wanted]}, but rows of the format {source.format} have {_HAVE[own]}",
        where=_where(source),
        hint=f"Write {_OBJECTIVES[own]} to learn from these rows, or {usable} for this objective.",
    )


def _meant_for(source: Source, fit: BuiltInFormat, kind: BatchKind, wanted: BatchKind) -> FormatError:
    """The rows fit only formats that the objective cannot learn from."""
    return FormatError(
        f"{_WANTS[wanted]}, but the rows have {_HAVE[kind]}: they fit {fit.name} ({', '.join(dict.fromkeys(fit.required.values()))})",
        where=_where(source),
        hint=f"Write {_OBJECTIVES[kind]} to learn from these rows.",
    )


def _chosen_alone(rows: Sequence[Row]) -> str:
    """How to train on the better answers of pairs."""
    first = rows[0].fields
    chosen = first.get("chosen")
    opening = chosen[0] if is_list(chosen) and chosen else None
    if is_object(opening) and (opening.get("role") or opening.get("from")) not in ("assistant", "gpt"):
        mapping = "'format: messages' with 'columns: {messages: chosen}'"
        mapping = mapping if "role" in opening else "'format: sharegpt' with 'columns: {conversations: chosen}'"
    elif "prompt" in first:
        mapping = "'format: prompt_completion' with 'columns: {completion: chosen}'"
    else:
        return ""
    return f"to train on the chosen answers alone, write {mapping} beside the data set's path"


def _pairs(source: Source, advice: str) -> FormatError:
    return FormatError(
        "the rows are preference pairs (columns 'chosen' and 'rejected'), which this objective does not use; "
        f"to learn from the preference, write {_OBJECTIVES['pairs']}{advice and '; ' + advice}",
        where=_where(source),
    )


def _no_rows(source: Source) -> FormatError:
    return FormatError("there is no row to tell the format from", where=_where(source))


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.fields))


def _where(source: Source, field: str | None = None) -> Where:
    return Where(shown_name(source.path), field=field)
