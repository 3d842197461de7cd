"""pydantic's errors as plain sentences with file and line: one fault per wrong value, however many ways of reading it failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from burnish.config.base import Strict
from burnish.config.document import Entry, Fault
from burnish.config.names import nearest_key, unknown_key
from burnish.config.places import Broken
from burnish.config.shape import Shape
from burnish.core.errors import nearest

Path = tuple[str | int, ...]

_LIMITS = {
    "greater_than": ("above {gt}", "gt"),
    "greater_than_equal": ("at least {ge}", "ge"),
    "less_than": ("below {lt}", "lt"),
    "less_than_equal": ("at most {le}", "le"),
}
_EMPTY = frozenset({"too_short", "string_too_short"})


@dataclass(frozen=True, slots=True)
class _Reading:
    """One error of one way of reading a value.

    Attributes:
        error: pydantic's.
        path: Where it is in the input.
        branches: (depth, name) of the union branches on the way, which pydantic mixes into its location.
    """

    error: ErrorDetails
    path: Path
    branches: tuple[tuple[int, str], ...]


def translate(error: ValidationError, tree: Entry, root: Shape) -> list[Fault]:
    """All faults of a run file that its schema finds.

    Args:
        error: What validating `tree.plain()` raised.
        tree: The run file in long form.
        root: Its shape.
    """
    readings = [_read(detail, tree) for detail in error.errors(include_url=False)]
    kept = _settle(readings, 0)
    # 'path is missing' beside 'unknown key pth, did you mean path?' would be one slip reported twice.
    meant = {_meant(reading, tree, root) for reading in kept if reading.error["type"] == "extra_forbidden"}
    kept = [reading for reading in kept if reading.error["type"] != "missing" or not _begins(meant, reading.path)]
    return [fault for path, group in _by_path(kept).items() for fault in _sentences(path, group, tree, root)]


def _read(error: ErrorDetails, tree: Entry) -> _Reading:
    """Tells keys from branch names: what is no key of the input at that point is a branch, unless the key is what is missing."""
    path: Path = ()
    branches: list[tuple[int, str]] = []
    entry: Entry | None = tree
    for position, part in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        below = entry.at((part,)) if entry is not None else None
        if below is not None or (last and error["type"] == "missing"):
            path, entry = (*path, part), below
        else:
            branches.append((len(path), str(part)))
    return _Reading(error, path, tuple(branches))


def _settle(readings: list[_Reading], level: int) -> list[_Reading]:
    """Chooses among the branches of each union: the one that got furthest into the value, else all together."""
    plain = [reading for reading in readings if len(reading.branches) <= level]
    unions: dict[Path, dict[str, list[_Reading]]] = defaultdict(lambda: defaultdict(list))
    for reading in readings:
        if len(reading.branches) > level:
            depth, name = reading.branches[level]
            unions[reading.path[:depth]][name].append(reading)
    for path, branches in unions.items():
        inside = [branch for branch in branches.values() if all(len(reading.path) > len(path) for reading in branch)]
        if inside:
            plain += _settle(min(inside, key=len), level + 1)
        else:
            plain += [reading for branch in branches.values() for reading in branch if reading.path == path]
    return plain


def _by_path(readings: Sequence[_Reading]) -> dict[Path, list[_Reading]]:
    grouped: dict[Path, list[_Reading]] = defaultdict(list)
    for reading in readings:
        grouped[reading.path].append(reading)
    return grouped


def _sentences(path: Path, group: list[_Reading], tree: Entry, root: Shape) -> list[Fault]:
    entry, key = tree.at(path), ".".join(map(str, path))
    if entry is not None and isinstance(entry.value, Broken):
        return []
    where = (entry or tree.at(path[:-1]) or tree).where
    shape = _shape_at(path, tree, root)
    error = _telling([reading.error for reading in group])
    return [Fault(_sentence(error, path, tree, root, shape), key, where)]


def _telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """The error of a value that has the right type but not the right size says more than that of another type."""
    return next((error for error in errors if error["type"] in (*_LIMITS, *_EMPTY, "value_error", "finite_number")), errors[0])


def _sentence(error: ErrorDetails, path: Path, tree: Entry, root: Shape, shape: Shape | None) -> str:
    kind, value = error["type"], error.get("input")
    context: dict[str, Any] = error.get("ctx", {})
    if kind == "missing":
        return "is missing: the list is too short" if isinstance(path[-1], int) else "is missing"
    if kind == "extra_forbidden":
        return unknown_key(str(path[-1]), _section_at(path[:-1], tree, root), root.sections[0][1], ".".join(map(str, path[:-1])))
    if kind in _LIMITS:
        return f"must be {_LIMITS[kind][0].format(**{k: _number(v) for k, v in context.items()})}, found {show(value)}"
    if kind in _EMPTY:
        return "must not be empty"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if kind == "finite_number":
        return f"must be a finite number, found {show(value)}"
    if kind == "too_long" or shape is None:
        return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {show(value)}"
    return f"expected {shape.words()}, found {show(value)}{_advice(value, shape)}"


def _advice(value: Any, shape: Shape) -> str:
    if not isinstance(value, str):
        return ""
    if shape.choices and (match := nearest(value, shape.choices)):
        return f"; did you mean '{match}'?"
    if bool in shape.scalars and value.lower() in ("yes", "no", "on", "off", "true", "false"):
        return "; YAML 1.2 writes booleans as true and false"
    if shape.scalars & {int, float} and _is_number(value):
        return "; leave the quotes out"
    return ""


def _shape_at(path: Path, tree: Entry, root: Shape) -> Shape | None:
    shape: Shape | None = root
    for depth, part in enumerate(path):
        around = tree.at(path[:depth])
        shape = shape.field(part, around.value if around else None) if shape else None
    return shape


def _section_at(path: Path, tree: Entry, root: Shape) -> type[Strict] | None:
    shape, entry = _shape_at(path, tree, root), tree.at(path)
    return shape.section(entry.value if entry else None) if shape else None


def _begins(paths: set[Path | None], start: Path) -> bool:
    return any(path is not None and path[: len(start)] == start for path in paths)


def _meant(reading: _Reading, tree: Entry, root: Shape) -> Path | None:
    """The path of the key that an unknown one was meant to be."""
    section = _section_at(reading.path[:-1], tree, root)
    key = nearest_key(str(reading.path[-1]), section, root.sections[0][1])
    if key is None:
        return None
    return (*reading.path[:-1], key) if section and key in section.model_fields else tuple(key.split("."))


def show(value: Any) -> str:
    """A value as a user wrote it, shortened."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        keys = [str(key) for key in cast(dict[Any, Any], value)]
        return f"a section with {', '.join(keys[:3])}" if keys else "an empty section"
    if isinstance(value, list | tuple):
        return f"a list of {len(cast(list[Any], value))}"
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 80 else f"'{value[:77]}...'"
    return _number(value)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
