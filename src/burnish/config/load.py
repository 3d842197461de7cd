"""From a run file to a RunConfig: everything is checked, and everything that is wrong is said at once.

    layers (extends, file, overrides) -> one tree -> ${NAME} and paths -> schema -> checks across keys

Nothing here needs torch, reads weights, or writes a file.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from burnish.config.checks import CHECKS
from burnish.config.document import Entry, Fault, from_python
from burnish.config.dump import dump_run
from burnish.config.layers import ROOT, expand, merge, override, read_layers
from burnish.config.places import fill_in
from burnish.config.run import RunConfig
from burnish.config.translate import translate
from burnish.core.errors import ConfigError, Where

__all__ = ["LoadedRun", "dump_run", "examine", "load_run", "parse_run", "raise_faults"]


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A valid run.

    Attributes:
        config: What to do.
        path: The run file, or None where it came from Python.
        places: Dotted key -> file and line where its value was written; keys left at their default are absent.
    """

    config: RunConfig
    path: Path | None = None
    places: Mapping[str, Where] = field(default_factory=dict[str, Where])

    def where(self, key: str) -> Where:
        """The place of a key's value, or of the closest section around it."""
        return _nearest_place(key, self.places) or Where(str(self.path) if self.path else None)

    @contextmanager
    def located(self) -> Generator[None]:
        """Inside, an error about a key says where that was written."""
        try:
            yield
        except ConfigError as error:
            key = error.where.field if error.where is not None else None
            if key is not None and error.where == Where(field=key):  # and nothing else is known
                error.where = replace(self.where(key), field=key)
            raise


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Reads a run file.

    Relative data and model paths are looked for in the working directory first, then in the folder of the file that names them.

    Args:
        path: The YAML file.
        overrides: Texts like `train.epochs=2` that replace values of the file.

    Raises:
        ConfigError: with all faults at once, each with file, line and key.
    """
    loaded, faults = examine(path, overrides)
    return _sound(loaded, faults, str(path))


def parse_run(mapping: Mapping[str, Any], base: str | Path | None = None, overrides: Sequence[str] = ()) -> LoadedRun:
    """Makes a run out of a Python mapping with the keys of a run file.

    Args:
        mapping: Like the run file.
        base: Folder for relative paths that are not in the working directory.
        overrides: As for `load_run`.

    Raises:
        ConfigError: with all faults at once, each with its key.
    """
    folder = Path(base) if base is not None else Path.cwd()
    faults: list[Fault] = []
    loaded = _build(expand(from_python(mapping, folder), ROOT), overrides, faults, None, folder)
    return _sound(loaded, faults, "the run")


def examine(path: str | Path, overrides: Sequence[str] = ()) -> tuple[LoadedRun | None, list[Fault]]:
    """Reads a run file and returns what is wrong instead of raising it; the run is None if anything is."""
    file = Path(path)
    faults: list[Fault] = []
    layers = read_layers(file, faults)
    if not layers:
        return None, faults
    loaded = _build(merge(layers), overrides, faults, file, file.resolve().parent)
    return loaded, sorted(faults, key=lambda fault: (fault.where.file or "", fault.where.line or 0))


def _build(tree: Entry, overrides: Sequence[str], faults: list[Fault], path: Path | None, base: Path) -> LoadedRun | None:
    tree = override(tree, overrides, faults, base)
    places = tree.places()
    # The run folder is made absolute even where it is the default.
    tree.mapping.setdefault("output", tree.like(RunConfig.model_fields["output"].default))
    written = fill_in(tree, ROOT, os.environ, faults)
    config = _validate(tree, places, faults)
    if config is None or faults:
        return None
    config.environment.update(written)
    return LoadedRun(config, path, places)


def _validate(tree: Entry, places: Mapping[str, Where], faults: list[Fault]) -> RunConfig | None:
    """Checks types and ranges, then the conditions across keys, leaving out those about keys that are wrong already."""
    try:
        config = RunConfig.model_validate(tree.plain())
    except ValidationError as error:
        faults += translate(error, tree, ROOT)
        config = _without_faulty(tree, faults)
    if config is None:
        return None
    wrong = [fault.key for fault in faults if fault.key]
    for check in CHECKS:
        if any(_touches(key, other) for key in check.keys for other in wrong):
            continue
        if sentence := check(config):
            key = next((key for key in check.keys if key in places), check.keys[0])
            faults.append(Fault(sentence, key, _nearest_place(key, places) or tree.where))
    return config


def _without_faulty(tree: Entry, faults: Sequence[Fault]) -> RunConfig | None:
    """The run with its faulty keys at their defaults, only to find contradictions among the others."""
    rest = copy.deepcopy(tree)
    for fault in faults:
        *path, last = (fault.key or "").split(".")
        around = rest.at(tuple(path))
        if around is not None:
            around.mapping.pop(last, None)
    rest.mapping.setdefault("model", from_python({"path": "?"}, tree.base))
    rest.mapping.setdefault("data", from_python({"train": [{"path": "?"}]}, tree.base))
    try:
        return RunConfig.model_validate(rest.plain())
    except ValidationError:
        return None


def _touches(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _nearest_place(key: str, places: Mapping[str, Where]) -> Where | None:
    while key:
        if key in places:
            return places[key]
        key = key.rpartition(".")[0]
    return None


def _sound(loaded: LoadedRun | None, faults: Sequence[Fault], name: str) -> LoadedRun:
    if loaded is None:
        raise_faults(faults, name)
    return loaded


def raise_faults(faults: Sequence[Fault], name: str) -> NoReturn:
    """Raises all faults as one error; `name` says what has them.

    Raises:
        ConfigError: always.
    """
    if len(faults) == 1:
        raise ConfigError(str(faults[0]), faults=[str(faults[0])])
    raise ConfigError(f"{name} has {len(faults)} faults:", faults=[str(fault) for fault in faults])
