"""How many processes are started, and with what. Real ones: tests/faults/test_launching.py."""

from __future__ import annotations

import os

import pytest

from burnish.config.sections import Parallel
from burnish.core.errors import ConfigError, TrainingError
from burnish.core.log import LAUNCHER
from burnish.data.workers import cores
from burnish.engine import launcher


@pytest.mark.parametrize(
    ("settings", "devices", "count"),
    [
        ({}, 0, 1),
        ({}, 1, 1),
        ({}, 8, 8),
        ({"strategy": "none"}, 8, 1),
        ({"processes": 1}, 8, 1),
        ({"processes": 4}, 8, 4),
        ({"processes": 4}, 0, 4),
    ],
)
def test_how_many(settings: dict[str, object], devices: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_accelerators", lambda: devices)
    assert launcher.processes(Parallel.model_validate(settings), {}) == count


def test_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_accelerators", lambda: 2)
    with pytest.raises(ConfigError, match=r"'parallel.processes': 4 processes want an accelerator each, and this machine has 2"):
        launcher.processes(Parallel(processes=4), {})


def test_accelerate_launch_is_believed_or_refused() -> None:
    one = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert launcher.processes(Parallel(processes=4), one) == 1
    with pytest.raises(TrainingError, match="asked for several processes and has started only this one"):
        launcher.processes(Parallel(), one | {"MASTER_PORT": "29500"})


def test_what_a_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = launcher._environment(1, 2, 1234, 0, 9)
    assert launcher.is_launched(told) and not launcher.is_launched({"RANK": "0"})
    assert (told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"], told["MASTER_PORT"], told[LAUNCHER]) == ("1", "2", "1", "1234", "9")
    assert told["OMP_NUM_THREADS"] == str(max(1, cores() // 2)) and told["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launcher._environment(1, 2, 1234, 0, 9)["OMP_NUM_THREADS"] == "3"
