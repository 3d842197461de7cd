"""Mistakes on the command line, and the way errors become exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import burnish
from burnish.cli.main import main
from burnish.core.errors import BurnishError, Interrupted

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err  # pyright: ignore[reportReturnType]

    return call


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian", "x"], "there is no command 'trian'; did you mean 'train'?"),
        (["run.yaml"], "there is no command 'run.yaml'; did you mean 'burnish train run.yaml'?"),
        (["zzz"], "there is no command 'zzz'; known: "),
        (["check", "--jsn"], "there is no option '--jsn'; did you mean '--json'?"),
        (["--vresion"], "there is no option '--vresion'"),
        (["check", "run.yaml", "--train.steps", "3"], "a value of the run file is replaced by train.steps=VALUE, without dashes"),
        (["train"], "missing argument 'RUN.yaml'"),
        (["chat", "model", "--max-tokens", "many"], "'--max-tokens'"),
        (["chat", "model", "--top-p", "2"], "'--top-p'"),
        (["doctor", "extra"], "extra"),
    ],
)
def test_mistakes_get_one_sentence(run: Run, arguments: list[str], sentence: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and sentence in lines[0]


def test_help(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "") and "Usage: burnish" in out and "check" in out
    assert run()[:2] == (0, out)
    assert "key=value" in run("check", "--help")[1]


@pytest.mark.parametrize(("error", "code"), [(BurnishError("wrong", hint="do this"), 2), (Interrupted("stopped"), 3)])
def test_errors_become_exit_codes(run: Run, monkeypatch: pytest.MonkeyPatch, error: BurnishError, code: int) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("burnish.cli.recipes.main", fail)
    found, _, err = run("recipes")
    kind = "error: " if code == 2 else ""  # who asks for the end has it
    assert found == code and err.startswith(f"{kind}{error.message}")


def test_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("burnish.cli.recipes.main", fail)
    monkeypatch.setattr(sys, "argv", ["burnish", "recipes"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_run_file_that_is_a_folder(run: Run, tmp_path: Path) -> None:
    code, _, err = run("check", str(tmp_path))
    assert code == 2 and "is a folder, expected a run file" in err


@pytest.mark.parametrize("start", [["-m", "burnish"], ["-c", "from burnish.__main__ import main; main()"]])
def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback(tmp_path: Path, start: list[str]) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**6): pass\n")
    package = Path(burnish.__file__).parents[1]
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"}
    done = subprocess.run([sys.executable, *start, "--help"], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
