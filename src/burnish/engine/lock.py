"""One run, one process that writes: two in the same folder would spoil each other's checkpoints."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import filelock

from burnish.core.errors import ConfigError, Where
from burnish.core.log import warn

__all__ = ["RunLock"]


class RunLock:
    """The right to write to a run folder. It ends with the process, however that ends.

    Args:
        folder: The run folder.
        active: False on ranks that do not write.
    """

    def __init__(self, folder: Path, *, active: bool = True) -> None:
        self._folder = folder
        self._lock = filelock.FileLock(folder / ".lock") if active else None

    def look(self) -> None:
        """Refuses a folder that another process writes to, before anything is loaded. Changes nothing.

        Raises:
            ConfigError: naming that process.
        """
        if self._lock is not None and not self.held and (self._folder / ".lock").is_file():
            self._acquire()
            self._lock.release()

    @property
    def held(self) -> bool:
        """Whether it is taken."""
        return self._lock is not None and self._lock.is_locked

    def take(self) -> None:
        """Takes the lock; the folder must exist.

        Raises:
            ConfigError: another process has it.
        """
        if self._lock is None or self.held:
            return
        self._acquire()
        content = {"process": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(timespec="seconds")}
        with suppress(OSError):
            self._owner.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Gives it back."""
        if self._lock is not None and self.held:
            with suppress(OSError):
                self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _acquire(self) -> None:
        assert self._lock is not None
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"{self._folder} is being written by another run{_owner(self._owner)}",
                where=Where(field="output"),
                hint="wait for it, stop it, or choose another output folder",
            ) from None
        except (NotImplementedError, OSError) as error:  # some network storage has no locks
            warn(f"{self._folder} cannot be locked ({error}): see to it that no other run writes there")

    @property
    def _owner(self) -> Path:
        return self._folder / ".owner"


def _owner(file: Path) -> str:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return f": process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
