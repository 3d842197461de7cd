"""Signals outside of the training loop, in processes of their own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from burnish.core.errors import Interrupted
from burnish.core.signals import POLITE, Interruptible

SCRIPT = """
import signal, sys, time
from burnish.core.signals import Interruptible, Stopped

first, second, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with Interruptible():
    try:
        signal.raise_signal(first)
    except Stopped:
        time.sleep(pause)
        signal.raise_signal(second)
        sys.exit(3)
"""


def ended(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("first", "second", "pause", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 0.0, 3),  # of a manager of processes, and of the launcher that passes it on
        (signal.SIGTERM, signal.SIGTERM, 1.2, -signal.SIGTERM),
        (signal.SIGTERM, signal.SIGUSR1, 0.0, -signal.SIGUSR1),
        (signal.SIGINT, signal.SIGINT, 0.0, -signal.SIGINT),
    ],
)
def test_the_second_signal_ends_the_process_unless_it_is_the_first_one_again(
    first: signal.Signals, second: signal.Signals, pause: float, code: int
):
    done = ended(SCRIPT, int(first), int(second), pause)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("number", POLITE)
def test_code_that_catches_all_that_may_go_wrong_does_not_catch_a_signal(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=f"stopped by {number.name} outside of training") as caught, Interruptible():
        try:
            signal.raise_signal(number)
        except Exception:  # as the trials of fast modules do, and libraries
            pass
        raise AssertionError("the signal was swallowed")
    assert caught.value.exit_code == 3


def test_whoever_swallows_even_that_swallows_no_signal() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), Interruptible():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            pass


def test_an_import_is_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_slowly.py").write_text(
        "import signal, time\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(0.3)\n"
        "    whole = True\n"
        "except BaseException:\n"
        "    whole = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), Interruptible():
        import imported_slowly  # pyright: ignore[reportMissingImports] # noqa: F401

        for _ in range(300):
            time.sleep(0.1)
        sys.exit("the signal was forgotten")
    assert sys.modules["imported_slowly"].whole


STUCK = """
import sys, time, signal
from burnish.core import signals

signals._PATIENCE = 0.5
with signals.Interruptible():
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        pass
    time.sleep(60)
"""


def test_a_process_that_does_not_let_go_is_ended() -> None:
    done = ended(STUCK)
    assert done.returncode == 3 and "stopped by SIGTERM outside of training" in done.stderr, done.stderr


TAKEN_OVER = """
import signal, sys, time
from pathlib import Path
from burnish.core import signals
from burnish.engine.events import Requests

signals._PATIENCE = 0.5
with signals.Interruptible():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    with Requests(Path(sys.argv[1])) as requests:
        time.sleep(1.5)  # a step
        sys.exit(7 if requests.received == signal.SIGINT else 1)
"""


def test_a_training_that_begins_nevertheless_is_told(tmp_path: Path) -> None:
    done = ended(TAKEN_OVER, tmp_path)
    assert done.returncode == 7, done.stderr
