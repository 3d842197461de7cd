"""What may stand at a key of the run file, read from the annotations of the sections.

pydantic checks values; this tells what pydantic does not: how a short form expands, what type an override's text is meant to have,
which keys there are, and how to say in words what is expected.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BeforeValidator, Tag

from burnish.config.base import Duration, FreeText, Kind, Location, LongForm, OneOrMany, Strict, read_seconds
from burnish.config.document import Value

_WORDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Duration: "a duration like '2ep', '500st' or '1.5Btok'",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What may stand in one place.

    Attributes:
        sections: The sections that a mapping may be, each with its tag in a tagged union.
        item: The shape of a list's items.
        entry: The shape of the values of a free mapping.
        scalars: Types of single values.
        choices: The words that are allowed, where text is not free.
        short: The key that plain text stands for, in a section with a short form.
        one_or_many: Whether a single item stands for a list of one.
        location: Set where the text says where something is.
        kind: Set where the text is a name out of a table.
        free_text: Whether `${NAME}` in the text means itself.
        seconds: Whether the number is a time, which may be written with its unit.
    """

    sections: tuple[tuple[str, type[Strict]], ...] = ()
    item: Shape | None = None
    entry: Shape | None = None
    scalars: frozenset[type] = frozenset()
    choices: tuple[str, ...] = ()
    short: str | None = None
    one_or_many: bool = False
    location: Location | None = None
    kind: Kind | None = None
    free_text: bool = False
    seconds: bool = False

    def section(self, around: Value = None) -> type[Strict] | None:
        """The section that a mapping is meant to be, chosen by its `kind` where there are several."""
        if not self.sections:
            return None
        kind = around["kind"].value if isinstance(around, dict) and "kind" in around else None
        return dict(self.sections).get(str(kind)) or self.sections[0 if kind is None else -1][1]

    def field(self, key: str | int, around: Value = None) -> Shape | None:
        """The shape one step below: a section's key, a list's item, a free mapping's value. None where there is no such key.

        Args:
            key: Name or list position.
            around: The mapping around it, which tells the section where several are possible.
        """
        if isinstance(key, int):
            return self.item
        section = self.section(around)
        if section is None:
            return self.entry
        anything = ANYTHING if section.model_config.get("extra") == "allow" else None
        return fields_of(section).get(key, anything)

    def words(self) -> str:
        """What is expected, for a message."""
        options = [f"'{choice}'" for choice in self.choices]
        options += [word for kind, word in _WORDS.items() if kind in self.scalars and not (kind is int and float in self.scalars)]
        if self.one_or_many and self.item is not None:
            options.append(f"a {self.item.short or 'section'}")
        if self.item is not None:
            options.append(f"a list of {self.item.plural()}")
        if self.sections:
            options.append(f"a section with keys like {', '.join(list(self.sections[0][1].model_fields)[:3])}")
        if self.short is not None:
            options.append(f"its {self.short} alone")
        if self.entry is not None:
            options.append(f"a mapping of names to {self.entry.plural()}")
        options.sort(key=lambda option: option == "null")
        return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"

    def plural(self) -> str:
        """What a list of such values is a list of."""
        if self.choices:
            return ", ".join(f"'{choice}'" for choice in self.choices)
        if self.sections:
            return f"{self.short}s" if self.short else "sections"
        return {str: "texts", int: "whole numbers", float: "numbers"}[next(iter(self.scalars))]


ANYTHING = Shape()


def of_section(section: type[Strict]) -> Shape:
    """The shape of a whole section, such as the run file itself."""
    return Shape(sections=(("", section),))


@cache
def fields_of(section: type[Strict]) -> dict[str, Shape]:
    """Key -> shape of a section's keys."""
    return {key: _marked(_read(field.annotation), field.metadata) for key, field in section.model_fields.items()}


def keys_below(section: type[Strict], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a section and of those inside it; list positions are left out."""
    for key, shape in fields_of(section).items():
        yield prefix + key
        inner = shape.item if shape.item is not None and shape.item.sections else shape
        for _, below in inner.sections:
            yield from keys_below(below, f"{prefix}{key}.")


def _read(annotation: Any) -> Shape:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _marked(_read(arguments[0]), arguments[1:])
    if origin in (Union, types.UnionType):
        return _either([_read(branch) for branch in arguments])
    if origin is Literal:
        return Shape(choices=tuple(str(choice) for choice in arguments))
    if origin is list:
        return Shape(item=_read(arguments[0]))
    if origin is tuple:
        return Shape(item=_read(arguments[0]))
    if origin is dict:
        return Shape(entry=_read(arguments[1]))
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return Shape(sections=(("", annotation),))
    return Shape(scalars=frozenset({cast(type, annotation)}))


def _marked(shape: Shape, marks: Any) -> Shape:
    for mark in marks:
        match mark:
            case LongForm(key):
                shape = replace(shape, short=key)
            case OneOrMany():
                shape = replace(shape, one_or_many=True)
            case Location():
                shape = replace(shape, location=mark)
            case Kind():
                shape = replace(shape, kind=mark)
            case FreeText():
                shape = replace(shape, free_text=True)
            case BeforeValidator(func=reader) if reader is read_seconds:
                shape = replace(shape, seconds=True)
            case Tag(tag):
                shape = replace(shape, sections=tuple((tag, section) for _, section in shape.sections))
            case _:
                pass
    return shape


def _either(branches: list[Shape]) -> Shape:
    def first(name: str) -> Any:
        return next((value for branch in branches if (value := getattr(branch, name))), None)

    return Shape(
        sections=tuple(section for branch in branches for section in branch.sections),
        item=first("item"),
        entry=first("entry"),
        scalars=frozenset(kind for branch in branches for kind in branch.scalars),
        choices=tuple(choice for branch in branches for choice in branch.choices),
        short=first("short"),
        one_or_many=bool(first("one_or_many")),
        location=first("location"),
        kind=first("kind"),
        free_text=bool(first("free_text")),
        seconds=bool(first("seconds")),
    )
