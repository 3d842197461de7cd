"""One run file out of several layers: the files it extends, itself, and the overrides of the command line.

Later layers win, key by key. Three rules make that do what people mean:

- A short form is its long form before layers meet: `model: other` replaces `model.path` and keeps `model.quantize`.
- A section of another `kind` replaces the one below whole: `optimizer: lion` does not inherit AdamW's betas.
- Keys of which only one may be given replace each other: `train.steps=10` on the command line takes the place of the file's `epochs`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

from burnish.config.document import Entry, Fault, Plain, from_python, read_file, read_value
from burnish.config.names import unknown_key
from burnish.config.run import EXCLUSIVE, RunConfig
from burnish.config.shape import Shape, of_section
from burnish.core.errors import Where

ROOT = of_section(RunConfig)
COMMAND_LINE = Where("command line")


def read_layers(path: Path, faults: list[Fault], chain: tuple[Path, ...] = ()) -> list[Entry]:
    """The layers of a run file, lowest first: those it extends, then itself, in long form.

    Args:
        path: The run file.
        faults: What is wrong is added here.
        chain: The files that led here by `extends`.
    """
    entry = read_file(path, faults)
    if entry is None:
        return []
    chain = (*chain, path.resolve())
    layers: list[Entry] = []
    for name in _extended(entry, faults):
        # Relative to the file that says so, so that a folder of run files can be moved.
        lower = (path.parent / Path(str(name.value)).expanduser()).resolve()
        if lower in chain:
            loop = " -> ".join(step.name for step in (*chain[chain.index(lower) :], lower))
            faults.append(Fault(f"the file extends itself: {loop}", "extends", name.where))
        elif not lower.is_file():
            faults.append(Fault(f"no such file: {lower}", "extends", name.where))
        else:
            layers += read_layers(_shown(lower), faults, chain)
    return [*layers, expand(entry, ROOT)]


def merge(layers: Sequence[Entry]) -> Entry:
    """One tree out of layers in long form; later ones win."""
    return reduce(_over, layers)


def override(tree: Entry, overrides: Sequence[str], faults: list[Fault], base: Path) -> Entry:
    """Applies `key=value` overrides, all of them as one layer.

    Args:
        tree: What they are applied to.
        overrides: Texts like `train.epochs=2`, typed by the schema.
        faults: What is wrong is added here.
        base: The folder against which relative paths are resolved, after the working directory.
    """
    layer = Entry({}, COMMAND_LINE, base)
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip().lstrip("-")
        current = _over(tree, layer)
        if not equals or not key:
            faults.append(Fault(f"expected key=value, found '{text}'", where=COMMAND_LINE))
        elif (found := _find(key.split("."), current, faults)) is not None:
            parts, shape = found
            _put(layer, current, parts, expand(from_python(_typed(value, shape), base, COMMAND_LINE), shape))
    if lost := list(_replaced(tree, layer)):
        from burnish.core.log import warn  # rich, which `burnish check` would wait for

        for said in lost:
            warn(said)
    return _over(tree, layer)


def expand(entry: Entry, shape: Shape | None) -> Entry:
    """The long form: `model: x` becomes `model: {path: x}`, a single source becomes a list of one."""
    if shape is None:
        return entry
    value = entry.value
    if shape.one_or_many and isinstance(value, dict | str):
        value = [entry.like(value)]
    elif shape.short and isinstance(value, str):
        value = {shape.short: entry.like(value)}
    if isinstance(value, float) and value.is_integer() and int in shape.scalars and float not in shape.scalars:
        value = int(value)  # YAML reads 1e3 as a float
    if isinstance(value, dict):
        value = {key: expand(item, shape.field(key, value)) for key, item in value.items()}
    elif isinstance(value, list):
        value = [expand(item, shape.item) for item in value]
    return entry.like(value)


def _extended(entry: Entry, faults: list[Fault]) -> list[Entry]:
    extends = entry.mapping.pop("extends", None)
    if extends is None:
        return []
    names: list[Entry] = extends.value if isinstance(extends.value, list) else [extends]
    if all(isinstance(name.value, str) for name in names):
        return names
    faults.append(Fault("expected a file or a list of files", "extends", extends.where))
    return []


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _over(lower: Entry, upper: Entry, path: str = "") -> Entry:
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict) or _other_kind(lower, upper):
        return upper
    merged = dict(lower.value)
    for group in EXCLUSIVE.get(path, ()):
        if any(key in upper.value and upper.value[key].value is not None for key in group):
            merged = {key: entry for key, entry in merged.items() if key not in group}
    for key, entry in upper.value.items():
        merged[key] = _over(merged[key], entry, f"{path}.{key}".strip(".")) if key in merged else entry
    return lower.like(merged)


def _other_kind(lower: Entry, upper: Entry) -> bool:
    kinds = [entry.mapping["kind"].value for entry in (lower, upper) if "kind" in entry.mapping]
    return len(kinds) == 2 and kinds[0] != kinds[1]


def _replaced(lower: Entry, upper: Entry, path: str = "") -> Iterator[str]:
    """What is said of keys that an override of `kind` takes away with the section they belong to."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return
    if _other_kind(lower, upper):
        now, before = (entry.mapping["kind"].value for entry in (upper, lower))
        if lost := [key for key in lower.value if key != "kind" and key not in upper.value]:
            verb = "is" if len(lost) == 1 else "are"
            yield f"{path}.kind={now} replaces the section: the file's {', '.join(lost)} of '{before}' {verb} left out"
        return
    for key, entry in upper.value.items():
        if key in lower.value:
            yield from _replaced(lower.value[key], entry, f"{path}.{key}".strip("."))


def _find(parts: list[str], tree: Entry, faults: list[Fault]) -> tuple[list[str | int], Shape] | None:
    """The full path and the shape of an override's key. The position may be left out where a list has one item."""
    shape: Shape = ROOT
    entry: Entry | None = tree
    path: list[str | int] = []
    for part in parts:
        items = entry.value if entry is not None and isinstance(entry.value, list) else None
        if shape.item is not None and not part.isdigit() and items is not None and len(items) == 1:
            shape, entry, path = shape.item, items[0], [*path, 0]
        key = int(part) if part.isdigit() and items is not None else part
        below = shape.field(key, entry.value if entry else None) if shape.item is None or isinstance(key, int) else None
        inside = entry.at((key,)) if entry else None
        if below is None or (isinstance(key, int) and inside is None):
            faults.append(_not_found(path, part, shape, entry))
            return None
        shape, entry, path = below, inside, [*path, key]
    return path, shape


def _not_found(path: list[str | int], part: str, shape: Shape, entry: Entry | None) -> Fault:
    inside = ".".join(map(str, path))
    key = f"{inside}.{part}" if inside else part
    if entry is not None and isinstance(entry.value, list):
        count = len(entry.value)
        return Fault(
            f"no item '{part}': {inside} is a list of {count}, its items are {inside}.0 to {inside}.{count - 1}", key, COMMAND_LINE
        )
    section = (shape.item or shape).section(entry.value if entry else None)
    return Fault(unknown_key(part, section, RunConfig, inside, dotted=True), key, COMMAND_LINE)


def _typed(text: str, shape: Shape) -> Plain:
    """The value of an override's text. Where the key takes text, `1e5` and `you: speak` are text, too."""
    try:
        value = read_value(text)
    except ValueError:
        return text
    if value is None:
        return None if text.strip() in ("null", "~") else text
    takes_text = str in shape.scalars or shape.short is not None
    meant = (
        bool(shape.sections or shape.entry)
        if isinstance(value, dict)
        else shape.item is not None
        if isinstance(value, list)
        else isinstance(value, str) or type(value) in shape.scalars
    )
    return value if meant or not takes_text else text


def _put(layer: Entry, current: Entry, path: list[str | int], entry: Entry) -> None:
    """Sets one value in a layer. A list on the way is copied from `current` first, since layers replace lists whole."""
    at, seen = layer, current
    for step in path[:-1]:
        below, seen = at.at((step,)), seen.at((step,)) or entry.like({})
        if below is None or not isinstance(below.value, dict | list):
            below = copy.deepcopy(seen) if isinstance(seen.value, list) else entry.like({})
            at.put(step, below)
        at = below
    at.put(path[-1], entry)
