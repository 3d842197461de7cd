"""A working directory of its own for every test, and a short way to a run file in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.config.load import LoadedRun, load_run
from burnish.core.errors import ConfigError

GOOD = "model: org/model\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with one data file."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Callable[..., LoadedRun]:
    """Writes run.yaml (a good one and the given lines, or the given text whole) and loads it."""

    def write_and_load(added: str = "", *overrides: str, whole: bool = False) -> LoadedRun:
        (folder / "run.yaml").write_text(added if whole else GOOD + added)
        return load_run("run.yaml", overrides)

    return write_and_load


@pytest.fixture
def fault(load: Callable[..., LoadedRun]) -> Callable[..., str]:
    """The message about a bad run file."""

    def message(added: str = "", *overrides: str, whole: bool = False) -> str:
        with pytest.raises(ConfigError) as caught:
            load(added, *overrides, whole=whole)
        return str(caught.value)

    return message
