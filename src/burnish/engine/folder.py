"""The folder of a run: what stands in it beside checkpoints and metrics, and the right to write there.

    run.yaml         the settings, resolved          data.json     the account of the data
    model/           the trained model               report.html   how it went
    finished.json    the run, once its model is the outcome of all its steps

Every file appears whole or not at all, whenever the process ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.core.errors import ConfigError, StorageError, Where
from burnish.core.log import warn
from burnish.engine.events import Requests
from burnish.engine.identity import difference, read_note, versions
from burnish.engine.lock import RunLock
from burnish.engine.report import write_report

__all__ = ["RunFolder"]


class RunFolder:
    """The folder of a run, as the one rank that writes sees it; on the others nothing happens.

    Args:
        path: Where it is.
        active: Whether this rank writes.
    """

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self.path = path
        self.lock = RunLock(path, active=active)
        self._active = active
        self._looked = False
        self.note = path / "finished.json"

    @property
    def model(self) -> Path:
        """Where the trained model is, or will be."""
        return self.path / "model"

    def open(self, run_file: str, account: Mapping[str, Any]) -> None:
        """Makes the folder, takes its lock and writes the settings and the account.

        Raises:
            ConfigError: the folder cannot be made, or another process writes to it.
            StorageError: it cannot be written to.
        """
        if not self._active:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be made: {error.strerror or error}", where=Where(field="output")) from error
        self.lock.take()
        try:
            self.note.unlink(missing_ok=True)
            _write(self.path / "run.yaml", run_file)
            _write(self.path / "data.json", json.dumps(account, indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def forget_requests(self) -> None:
        """Removes STOP and SAVE of before, once. What comes from now on, while data and model are loaded, is for this run."""
        if not self._looked:
            Requests(self.path, active=self._active).forget()
        self._looked = True

    def report(self, *, stopped: bool = False) -> None:
        """Writes the report; where that is not possible, says so: the model is there, and a report can be made again."""
        if not self._active:
            return
        try:
            write_report(self.path, stopped=stopped)
        except OSError as error:
            warn(f"{self.path / 'report.html'} could not be written: {error.strerror or error}")

    def finish(self, steps: int, identity: Mapping[str, Any]) -> None:
        """Notes that the model is what this run comes to.

        Raises:
            StorageError: it cannot be written.
        """
        if not self._active:
            return
        try:
            _write(self.note, json.dumps({"steps": steps, "run": identity, "versions": versions()}, indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"{self.note} cannot be written: {error.strerror or error}") from error

    def is_finished(self, steps: int, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds the model of this very run."""
        noted = read_note(self.note) if self.model.is_dir() else None
        return noted is not None and noted["steps"] == steps and difference(noted, identity) is None


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
