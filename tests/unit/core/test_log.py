from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish.core import log
from burnish.core.errors import BurnishError, ConfigError


@pytest.fixture(autouse=True)
def _first_rank() -> Iterator[None]:
    yield
    log.set_rank(0)


def test_everything_goes_to_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("epoch [bold]1[/bold] :smile:")
    log.warn("slow")
    log.print_error(BurnishError("wrong [x]", hint="do [this]"))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "epoch [bold]1[/bold] :smile:\nwarning: slow\nerror: wrong [x]\nhint: do [this]\n"


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_other_ranks_are_silent_but_for_errors(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_rank(3)
    log.info("hello")
    log.warn("hello")
    log.console.print("hello")
    log.print_error(BurnishError("rank 3 broke"))
    log.info("hello")
    assert capsys.readouterr().err == "[rank 3] error: rank 3 broke\n"


def test_busy_is_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with log.busy("loading [model]"):
        assert capsys.readouterr().err == "loading [model]\n"
    log.set_rank(1)
    with log.busy("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_busy_leaves_nothing_behind_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(log, "console", log.RankConsole(file=stream, force_terminal=True, width=80, _environ={"TERM": "xterm"}))
    with log.busy("loading [model]"):
        pass
    shown = stream.getvalue()
    assert "loading [model]" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # up, and the line erased


@pytest.mark.parametrize(
    ("environment", "said"), [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"RANK": "8", "LOCAL_RANK": "0"}, True)]
)
def test_a_wrong_run_file_is_said_once_a_machine(
    environment: dict[str, str], said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    log.print_error(ConfigError("unknown key"))
    assert ("unknown key" in capsys.readouterr().err) is said
    log.print_error(BurnishError("mine alone"))
    assert "mine alone" in capsys.readouterr().err


def test_all_processes_exit_2_and_one_speaks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("modle: x\n")
    launched = [
        subprocess.Popen(
            [sys.executable, "-m", "burnish", "train", "run.yaml"],
            cwd=tmp_path,
            env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate()[1] for process in launched]
    assert [process.returncode for process in launched] == [2, 2]
    assert "modle" in errors[0] and errors[1] == ""
