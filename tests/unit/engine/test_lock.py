"""Two processes never write to one run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from burnish.core.errors import ConfigError
from burnish.engine.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from burnish.engine.lock import RunLock
lock = RunLock(Path(sys.argv[1])); lock.take(); print("held", flush=True); time.sleep(60)
"""


def test_another_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for ask in (RunLock(tmp_path).look, RunLock(tmp_path).take):
            with pytest.raises(ConfigError, match=rf"is being written by another run: process {holder.pid} on .*, since ") as caught:
                ask()
            assert caught.value.exit_code == 2
        RunLock(tmp_path, active=False).take()  # a rank that does not write
        holder.kill()
    lock = RunLock(tmp_path)
    lock.look()
    assert not lock.held
    lock.take()
    assert lock.held
    lock.release()
    assert not lock.held and not (tmp_path / ".owner").exists()


def test_looking_changes_nothing(tmp_path: Path) -> None:
    RunLock(tmp_path).look()
    RunLock(tmp_path / "none").look()
    assert list(tmp_path.iterdir()) == []


def test_storage_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(self: filelock.FileLock, **options: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    RunLock(tmp_path).take()
    assert "cannot be locked" in capsys.readouterr().err
