"""The run file with every key there is, its default and its description, made from the sections themselves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from burnish.config.base import Strict, written_seconds
from burnish.config.document import read_value
from burnish.config.run import RunConfig
from burnish.config.shape import Shape, fields_of

FIRST_LINE = "# Every key there is, with its default: to look things up and to copy lines from."
WIDTH = 120
_REQUIRED = object()  # in place of a value that has no default


def reference() -> str:
    """The whole file. It is valid as it stands, and means what a run file with nothing but `model` and `data.train` means."""
    run = RunConfig.model_validate({"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": {"train": "HuggingFaceTB/smoltalk"}})
    return "\n".join([FIRST_LINE, *_section(run, "")]) + "\n"


def _section(section: Strict, indent: str) -> Iterator[str]:
    fields = type(section).model_fields
    for key, shape in fields_of(type(section)).items():
        if not indent:
            yield ""
        comment = " ".join([*(fields[key].description or "").split(), *_choices(shape, fields[key].description or "")])
        yield from textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield from _entry(key, getattr(section, key, _REQUIRED), shape, indent)


def _choices(shape: Shape, said: str) -> list[str]:
    """The words that are allowed, where they are all that is and the description does not name them already."""
    only = not shape.item and shape.scalars <= {type(None)} and len(shape.choices) > 1
    return [f"One of {', '.join(shape.choices)}."] if only and not all(f"`{choice}`" in said for choice in shape.choices) else []


def _entry(key: str, value: Any, shape: Shape, indent: str) -> Iterator[str]:
    if isinstance(value, Strict):
        yield f"{indent}{key}:"
        yield from _section(value, f"{indent}  ")
        for other in (section for tag, section in shape.sections if tag != "plugin" and not isinstance(value, section)):
            yield from _switched_off(key, other, indent)
    elif isinstance(value, list) and value and isinstance(value[0], Strict):
        yield f"{indent}{key}:"
        yield f"{indent}  -"
        yield from _section(value[0], f"{indent}    ")
    elif value is None and shape.sections:
        yield f"{indent}{key}: null"
        yield from _switched_off(key, shape.sections[0][1], indent)
    else:
        yield f"{indent}{key}: {_written(written_seconds(value) if shape.seconds and value is not _REQUIRED else value)}"


def _switched_off(key: str, section: type[Strict], indent: str) -> Iterator[str]:
    """A section that is off: its keys, commented out."""
    yield f"{indent}# {key}:"
    yield from (f"{indent}# {line}" for line in _section(section.model_construct(), "  "))


def _written(value: Any) -> str:
    if value is _REQUIRED:
        return "NAME"
    if not isinstance(value, int | float | str | list | dict | None):
        value = str(value)  # a duration
    if isinstance(value, str) and value and read_value(value) == value:
        return value
    return json.dumps(value)
