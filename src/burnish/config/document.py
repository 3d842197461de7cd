"""Reading a YAML file into a tree whose every value knows the file and line where it was written.

YAML 1.2 by ruamel: `2e-4` is a number, `on`, `off`, `yes` and `no` are text, `true` and `false` are the only booleans.
"""
# ruamel's nodes carry no types:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from burnish.core.errors import Where, nearest

NOWHERE = Where()
_MERGE = "tag:yaml.org,2002:merge"
_MOST_NODES = 100_000
_PLAIN_WORDS = {
    "mapping values are not allowed here": "an unexpected ': ' (quote a value that holds one, and indent the keys of a section alike)",
    "could not find expected ':'": "a line with neither 'key: value' nor '- item'",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong in a run file.

    Attributes:
        message: What was found and what was expected.
        key: The dotted key, where there is one.
        where: File and line.
    """

    message: str
    key: str | None = None
    where: Where = NOWHERE

    def __str__(self) -> str:
        key = None if self.key and self.message.startswith(self.key) else self.key
        return ": ".join(part for part in (str(self.where), key, self.message) if part)

    def to_json(self) -> dict[str, Any]:
        """For `burnish check --json`."""
        return {"file": self.where.file, "line": self.where.line, "key": self.key, "message": self.message}


Value = Union["dict[str, Entry]", "list[Entry]", str, int, float, bool, None]
"""What an entry holds."""
Plain = dict[str, "Plain"] | list["Plain"] | str | int | float | bool | None
"""The same without places."""


@dataclass(slots=True)
class Entry:
    """A value with its place: a mapping of entries, a list of entries, or a scalar.

    Attributes:
        value: The value.
        where: Where it was written.
        base: The folder against which a relative path in it is resolved, after the working directory.
    """

    value: Value
    where: Where = NOWHERE
    base: Path = field(default_factory=Path.cwd)

    def plain(self) -> Plain:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def like(self, value: Value) -> Entry:
        """Another value at the same place."""
        return replace(self, value=value)

    @property
    def mapping(self) -> dict[str, Entry]:
        """The entries by key, or none where this is no mapping."""
        return self.value if isinstance(self.value, dict) else {}

    def put(self, key: str | int, entry: Entry) -> None:
        """Sets one entry of a mapping or list."""
        if isinstance(self.value, dict):
            self.value[str(key)] = entry
        elif isinstance(self.value, list):
            self.value[int(key)] = entry

    def at(self, path: tuple[str | int, ...]) -> Entry | None:
        """The entry at a path of keys and list positions, or None."""
        entry: Entry | None = self
        for part in path:
            if entry is None or not isinstance(entry.value, dict | list):
                return None
            if isinstance(entry.value, list):
                entry = entry.value[part] if isinstance(part, int) and part < len(entry.value) else None
            else:
                entry = entry.value.get(str(part))
        return entry

    def places(self, key: str = "") -> dict[str, Where]:
        """Dotted key -> place, for everything below this entry."""
        found = {key: self.where} if key else {}
        pairs = self.value.items() if isinstance(self.value, dict) else enumerate(self.value) if isinstance(self.value, list) else ()
        for part, entry in pairs:
            found |= entry.places(f"{key}.{part}" if key else str(part))
        return found


def from_python(value: Any, base: Path, where: Where = NOWHERE) -> Entry:
    """The tree of a Python value, all of it in one place."""
    if isinstance(value, Mapping):
        value = {str(key): from_python(item, base, where) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        value = [from_python(item, base, where) for item in value]
    elif isinstance(value, Path):
        value = str(value)
    return Entry(value, where, base)


def read_file(path: Path, faults: list[Fault]) -> Entry | None:
    """The tree of a YAML file, or None after adding to `faults` what keeps it from being read."""
    where = Where(str(path))
    text = _text_of(path, faults)
    if text is None:
        return None
    try:
        entry = _Reader(path, faults).read(text)
    except MarkedYAMLError as error:
        faults.append(_syntax_fault(path, error))
        return None
    except (YAMLError, RecursionError) as error:
        faults.append(Fault(f"is not valid YAML: {str(error).splitlines()[0]}", where=where))
        return None
    if entry is None:
        faults.append(Fault("the file is empty; a run needs at least model and data", where=where))
    elif not isinstance(entry.value, dict):
        faults.append(Fault("expected keys and values at the top, like 'model: ...'", where=entry.where))
        return None
    return entry


def read_value(text: str) -> Plain:
    """The plain value of a YAML flow expression, such as the right side of an override.

    Raises:
        ValueError: it is no valid YAML.
    """
    faults: list[Fault] = []
    try:
        entry = _Reader(Path("override"), faults).read(text)
    except YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or "not valid YAML") from None
    if faults:
        raise ValueError(faults[0].message)
    return entry.plain() if entry else None


def nearest_file(path: Path, pattern: str = "*") -> str | None:
    """The name beside `path` that it was probably meant to be. A suffix in common makes two names no closer."""
    names = [file.name for file in path.parent.glob(pattern)] if path.parent.is_dir() else []
    return nearest(path.name, [name for name in names if nearest(path.stem, [Path(name).stem])])


def _text_of(path: Path, faults: list[Fault]) -> str | None:
    where = Where(str(path))
    if path.is_dir():
        faults.append(Fault("is a folder, expected a run file", where=where))
        return None
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        match = nearest_file(path, "*.y*ml")
        faults.append(Fault(f"no such file{f'; did you mean {path.with_name(match)}?' if match else ''}", where=where))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        faults.append(Fault(f"is not UTF-8 text (byte 0x{error.object[error.start]:02x})", where=Where(str(path), line)))
    except OSError as error:
        faults.append(Fault(f"cannot be read: {error.strerror}", where=where))
    return None


def _syntax_fault(path: Path, error: MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    problem = (error.problem or "it cannot be parsed").strip().replace("'\\t'", "TAB")
    problem = _PLAIN_WORDS.get(problem, f"{error.context} {problem}" if error.context else problem)
    return Fault(f"is not valid YAML: {problem}".replace("\n", " "), where=Where(str(path), mark.line + 1 if mark else None))


class _Reader:
    """Builds entries from ruamel's nodes, which carry lines for keys and values alike."""

    def __init__(self, path: Path, faults: list[Fault]) -> None:
        self.file = str(path)
        self.base = path.resolve().parent
        self.faults = faults
        self.yaml = YAML(typ="safe", pure=True)
        self.count = 0

    def read(self, text: str) -> Entry | None:
        node = self.yaml.compose(text)
        return None if node is None else self.entry(node)

    def entry(self, node: Node, key: Node | None = None) -> Entry:
        self.count += 1
        if self.count > _MOST_NODES:
            # Nested aliases can blow a few lines up to billions of values.
            raise YAMLError(f"more than {_MOST_NODES} values")
        # A value below its key, like a section, is found by its key.
        where = Where(self.file, (key or node).start_mark.line + 1)
        return Entry(self.value(node), where, self.base)

    def value(self, node: Node) -> Value:
        if isinstance(node, MappingNode):
            return self.mapping(node)
        if isinstance(node, SequenceNode):
            return [self.entry(item) for item in node.value]
        return self.scalar(node)

    def scalar(self, node: Node) -> str | int | float | bool | None:
        kind = str(node.tag).rpartition(":")[2]
        if kind in ("str", "timestamp") and isinstance(node, ScalarNode):
            return node.value  # a date is text here: no key takes one
        if kind in ("null", "bool", "int", "float") and isinstance(node, ScalarNode):
            try:
                return self.yaml.constructor.construct_object(node)
            except ValueError:
                return node.value
        self.fault(node, f"the tag '{node.tag}' is not allowed in a run file")
        return None

    def mapping(self, node: MappingNode) -> dict[str, Entry]:
        own: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                merged = self.merged(value) | merged
            elif not isinstance(key, ScalarNode):
                self.fault(key, "a key must be a word, found a list or mapping")
            elif key.value in own:
                self.fault(key, f"the key is given twice, first on line {own[key.value].where.line}", key.value)
            else:
                own[key.value] = self.entry(value, key)
        return merged | own

    def merged(self, node: Node) -> dict[str, Entry]:
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, Entry] = {}
        for item in reversed(nodes):
            if isinstance(item, MappingNode):
                merged |= self.mapping(item)
            else:
                self.fault(item, "'<<' takes mappings only")
        return merged

    def fault(self, node: Node, message: str, key: str | None = None) -> None:
        self.faults.append(Fault(message, key, Where(self.file, node.start_mark.line + 1)))
