"""What a try is, and what it comes to."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.suite.processes import Server
from tests.faults.suite.project import SHARED, Finished, Project, build, prepare

HALF = {"at": "step", "step": 10}
"""Where half a run ends: steps 8 and 9 have checkpoints, and step 10 has begun."""


IN_FRONT = "save.background=false"
"""Where it must be known which checkpoints there are when a run is killed."""


class NotBuilt(Exception):
    """The product lacks what the try needs; it counts as not survived."""


@dataclass(frozen=True)
class Survived:
    """A try that went well: how many steps had to be done twice, and whether the result was compared with an uninterrupted run's."""

    lost: int = 0
    equal: bool | None = None
    note: str = ""
    count: int | None = None
    """How many faults there were, where that is not known beforehand."""


@dataclass(frozen=True)
class Try:
    """One fault, put once (or in one chain) into one run.

    Args:
        fault: `F1` to `F20`.
        name: Which one.
        run: Raises AssertionError where a promise is broken.
        count: How many faults it puts in.
    """

    fault: str
    name: str
    run: Callable[[Lab], Survived]
    count: int = 1

    def __str__(self) -> str:
        return f"{self.fault}: {self.name}"


@dataclass(frozen=True)
class Result:
    """What a try came to."""

    fault: str
    name: str
    count: int
    survived: bool
    equal: bool | None
    lost: int
    said: str
    seconds: float
    built: bool = True


@dataclass
class Lab:
    """Where the tries of one call of the suite are made; shared by threads.

    Args:
        folder: For everything that is written.
        seed: Of all that is drawn.
        server: Starts processes that have burnish imported already.
    """

    folder: Path
    seed: int
    server: Server
    _numbers: Iterable[int] = field(default_factory=lambda: iter(range(10**6)))
    _references: dict[str, Finished] = field(default_factory=dict)
    projects: dict[str, Project] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prepare(self.folder / SHARED)

    @property
    def shared(self) -> Path:
        """The model and the rows of all projects."""
        return self.folder / SHARED

    def project(self, kind: str = "lora", *overrides: str) -> Project:
        """A fresh project in a folder of its own."""
        with self._lock:
            number = next(iter(self._numbers))
        return build(self.folder / f"try-{number:04d}", kind, overrides, server=self.server)

    def reference(self, kind: str = "lora", *overrides: str) -> Finished:
        """What the same run leaves when nobody disturbs it; made once, by the plain command."""
        key = f"{kind} {overrides}"
        with self.once(key):
            if key not in self._references:
                project = self.project(kind, *overrides)
                project.train().expect(0)
                self._references[key] = project.finished()
            return self._references[key]

    def half(self, kind: str = "lora", *overrides: str, fault: Mapping[str, Any] = HALF) -> Project:
        """A project whose run was killed on its way, in a folder of its own; trained once, then copied."""
        key = f"half {kind} {overrides} {sorted(fault.items())}"
        with self.once(key):
            if key not in self.projects:
                project = self.project(kind, *overrides)
                project.train({**fault, "do": "kill"}, overrides=[IN_FRONT] if has("save.background") else []).expect(-9)
                self.projects[key] = project
        with self._lock:
            number = next(iter(self._numbers))
        return self.projects[key].copy(self.folder / f"try-{number:04d}")

    def once(self, key: str) -> threading.Lock:
        """For what is made once and used by several tries."""
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())


def has(key: str) -> bool:
    """Whether run files have this key."""
    from burnish.config.run import RunConfig

    section, _, name = key.partition(".")
    field = RunConfig.model_fields.get(section)
    return field is not None and (not name or name in getattr(field.annotation, "model_fields", {}))


def need(key: str) -> None:
    """Raises NotBuilt where run files have no such key."""
    if not has(key):
        raise NotBuilt(key)


def attempt(one: Try, lab: Lab) -> Result:
    """Makes a try; whatever goes wrong is in the result."""
    began = time.monotonic()
    said, survived, built, outcome = "", False, True, Survived()
    try:
        outcome = one.run(lab)
        survived, said = True, outcome.note
    except NotBuilt as error:
        said, built = f"not built yet: {error}", False
    except AssertionError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{str(error) or place.line} ({Path(place.filename).name}:{place.lineno})"
    except Exception:
        said = traceback.format_exc()
    equal = outcome.equal if survived else False
    return Result(
        one.fault, one.name, outcome.count or one.count, survived, equal, outcome.lost, said, round(time.monotonic() - began, 1), built
    )


def pick(*modules: Any) -> list[Try]:
    """The tries of the default test run: a few of each fault that these modules have."""
    return [one for module in modules for one in module.tries(short=True)]
