"""What every format needs: a row's fields by their names in the format, read as what they should be, or an error that names the place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from burnish.core.errors import RowError, Where
from burnish.data.sources.row import Row
from burnish.data.types import Role


@dataclass(frozen=True, slots=True)
class Shape:
    """The fields of a format.

    Attributes:
        required: Fields without which a row is not of this format.
        optional: Fields that it may have.
        spellings: Column names of required fields where they differ from the field's own: one mapping for each usual spelling, the best
            known first. A field that a spelling leaves out goes by its own name.
        inner: Keys inside the messages of a conversation, which `data.columns` can map like columns.
        aliases: Other column names of optional fields, tried in this order where there is no column of the field's own name.
        rivals: Optional fields that stand for one another: only one of them is bound, the first that has a column.
        needs: Optional fields that are bound only beside another one, which comes before them.
        explicit: Optional fields that are bound only where `data.columns` maps them.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    spellings: tuple[Mapping[str, str], ...] = ({},)
    inner: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    rivals: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict[str, str])
    explicit: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that may stand on the left in `columns:`."""
        return (*self.required, *self.optional, *self.inner)


@dataclass(frozen=True, slots=True)
class Binding:
    """How one source spells a format: field -> column, and what the run file says about it."""

    columns: Mapping[str, str]
    roles: Mapping[str, Role] = field(default_factory=dict[str, Role])
    system: str | None = None


def spelled(shape: Shape, mapping: Mapping[str, str], columns: Sequence[str]) -> list[dict[str, str]]:
    """Every way to bind the format's fields to these columns, each a mapping field -> column.

    All required fields have a column; optional ones where there is one for them.
    """
    ways: list[dict[str, str]] = []
    for spelling in shape.spellings:
        required = {name: mapping.get(name, spelling.get(name, name)) for name in shape.required}
        if not all(column in columns for column in required.values()):
            continue
        inner = {name: mapping[name] for name in shape.inner if name in mapping}
        way = required | _optional(shape, mapping, columns, set(required.values())) | inner
        if way not in ways:
            ways.append(way)
    return ways


def _optional(shape: Shape, mapping: Mapping[str, str], columns: Sequence[str], taken: set[str]) -> dict[str, str]:
    """The columns of the optional fields: mapped ones, then those of the same name, then aliases. No column stands for two fields."""
    bound: dict[str, str] = {}
    for name in sorted(shape.optional, key=lambda name: (name not in mapping, name not in columns)):
        rivals = set(shape.rivals) if name in shape.rivals and name not in mapping else set[str]()
        if bound.keys() & rivals or shape.needs.get(name, name) not in {name, *bound} or (name in shape.explicit and name not in mapping):
            continue
        candidates = [mapping[name]] if name in mapping else [name, *shape.aliases.get(name, ())]
        column = next((column for column in candidates if column in columns and column not in taken), None)
        if column is not None:
            bound[name] = column
            taken.add(column)
    return {name: bound[name] for name in shape.optional if name in bound}


@dataclass(frozen=True, slots=True)
class Fields:
    """A row as a format sees it: fields by the format's names, whatever the columns are called."""

    row: Row
    binding: Binding

    def get(self, name: str) -> object:
        """The raw value; None where the row has none, or where it is NaN (which is how pandas writes none)."""
        value = self.row.fields.get(self.column(name))
        return None if _is_nan(value) else value

    def column(self, name: str) -> str:
        """What the field is called in the file."""
        return self.binding.columns.get(name, name)

    def where(self, name: str) -> Where:
        """The field's place, by the name that it has in the file."""
        return self.row.where(self.column(name))

    def text(self, name: str) -> str:
        """A required text.

        Raises:
            RowError: the field is missing, null, NaN or no text.
        """
        column = self.column(name)
        if column not in self.row.fields:
            raise RowError(f"the row has no such field, only {listed(self.row.fields)}", where=self.where(name))
        return as_text(self.row.fields[column], self.where(name))

    def optional_text(self, name: str) -> str | None:
        """A text that may be missing, null or NaN.

        Raises:
            RowError: it is something else.
        """
        value = self.get(name)
        return None if value is None else as_text(value, self.where(name))

    def number(self, name: str, default: float, *, least: float = -math.inf) -> float:
        """A finite number, also as text (as in CSV cells); `default` where it is missing, null or NaN.

        Raises:
            RowError: it is something else, or less than `least`.
        """
        value = self.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            return default
        number = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                pass
        if not math.isfinite(number) or number < least:
            wanted = "a finite number" if least == -math.inf else f"a number of {least:g} or more"
            raise RowError(f"expected {wanted}, found {kind_of(value)}", where=self.where(name))
        return number

    def json(self, name: str) -> object:
        """A value that may also stand as JSON in a text, as in CSV cells; None where it is missing or blank.

        Raises:
            RowError: the text is no JSON.
        """
        value = self.get(name)
        if not isinstance(value, str):
            return value
        return from_json(value, self.where(name)) if value.strip() else None


def as_text(value: object, where: Where) -> str:
    """The value, which must be text.

    Raises:
        RowError: it is not, or holds half a surrogate pair, which no tokenizer can read.
    """
    if not isinstance(value, str):
        raise RowError(f"expected text, found {kind_of(value)}", where=where)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            broken = ascii(value[error.start])[1:-1]
            raise RowError(f"the text holds {broken}, half of a surrogate pair, at character {error.start + 1}", where=where) from None
    return value


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list."""
    return isinstance(value, list | tuple)


def is_object(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is an object, which in rows always has texts for keys."""
    return isinstance(value, Mapping)


def as_list(value: object, where: Where, what: str) -> Sequence[object]:
    """The value, which must be a list of `what`.

    Raises:
        RowError: it is not.
    """
    if not is_list(value):
        raise RowError(f"expected a list of {what}, found {kind_of(value)}", where=where)
    return value


def as_object(value: object, where: Where, what: str) -> Mapping[str, Any]:
    """The value, which must be an object.

    Raises:
        RowError: it is not.
    """
    if not is_object(value):
        raise RowError(f"expected {what}, found {kind_of(value)}", where=where)
    return value


def from_json(text: str, where: Where) -> object:
    """Reads JSON inside a field.

    Raises:
        RowError: it is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        raise RowError(f"expected JSON, found {shortened(text)} ({reason} at character {error.pos + 1})", where=where) from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"expected JSON, found {shortened(text)} ({error})", where=where) from None


def kind_of(value: object) -> str:
    """What a value is, in words for a message."""
    if value is None:
        return "null"
    if _is_nan(value):
        return "NaN, a missing value"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {shortened(value)}"
    if is_list(value):
        return "a list" if value else "an empty list"
    return "an object" if is_object(value) else f"a value of type {type(value).__name__}"


def shortened(text: str, length: int = 40) -> str:
    """A text in quotes, short enough for a message."""
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in quotes, for a message."""
    quoted = [f"'{name}'" for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more or "none"


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
