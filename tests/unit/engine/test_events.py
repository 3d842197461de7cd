"""Callbacks and signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from burnish.engine.events import Callback, Callbacks, Requests, State

SCRIPT = """
import sys, time
from burnish.core.errors import Interrupted
from burnish.engine.events import Callback
from burnish.engine.loop import train
sys.path.insert(0, sys.argv[2])
from tests.unit.engine.conftest import build_job

class Slow(Callback):
    def on_step_end(self, state, result):
        print(state.step, flush=True)
        time.sleep(0.05)

from pathlib import Path
try:
    train(build_job(Path(sys.argv[1]), steps=10_000, held_out=False, callbacks=[Slow()]))
except Interrupted as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start(folder: Path, script: str = SCRIPT) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "1"
    return process


def test_ctrl_c_saves_and_exits_3_and_the_run_goes_on(tmp_path: Path):
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "stopping after this step, with a checkpoint" in errors
    assert "Traceback" not in errors
    assert "with a checkpoint in" in output
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert (folder / "manifest.json").is_file()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == int(folder.name.removeprefix("step-"))


TWICE = """
import signal
class Twice(Callback):
    def on_step_end(self, state, result):
        if result.step == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

try:"""


def test_a_signal_that_comes_from_two_sides_at_once_is_one(tmp_path: Path):
    """Batch and service managers send it to all processes, and a launcher passes on what it got."""
    process = start(tmp_path, SCRIPT.replace("try:", TWICE).replace("[Slow()]", "[Slow(), Twice()]"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert (tmp_path / "checkpoints" / "step-000002" / "manifest.json").is_file()


def test_a_second_signal_ends_at_once(tmp_path: Path):
    process = start(tmp_path, SCRIPT.replace("0.05", "30"))
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    while "stopping after this step" not in process.stderr.readline():
        time.sleep(0.01)
    while process.poll() is None:  # the first ones may be taken for the same signal
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "checkpoints").exists()


def test_signals_outside_the_main_thread_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with Requests(Path("no such folder")) as signals:
            seen.append((signals.received, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_callbacks_are_called_in_order():
    calls: list[str] = []

    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_end(self, state: State) -> None:
            calls.append(f"{self.name} {state.total}")

    callbacks = Callbacks([Named("first"), Named("second")])
    callbacks.on_train_start(State(total=3))
    callbacks.on_train_end(State(total=3))
    assert calls == ["first 3", "second 3"]
