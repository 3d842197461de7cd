"""Signals outside of the training loop, in processes of their own."""

import signal
import subprocess
import sys

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
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(int(first)), str(int(second)), str(pause)], capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == code, ended.stderr


@pytest.mark.parametrize("number", POLITE)
def test_code_that_catches_all_that_may_go_wrong_does_not_catch_a_signal(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=f"stopped by {number.name} outside of training") as caught, Interruptible():
        try:
            signal.raise_signal(number)
        except Exception:  # as the trials of fast modules do, and libraries
            pass
        raise AssertionError("the signal was swallowed")
    assert caught.value.exit_code == 3
