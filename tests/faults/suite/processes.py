"""Starts training processes, kills them, and tells how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
DRIVER = Path(__file__).with_name("driver.py")


@dataclass(frozen=True)
class Ended:
    """A process that is over. `code` is negative for a signal that ended it, as `subprocess` has it."""

    code: int
    said: str

    def expect(self, *codes: int) -> Ended:
        """Raises AssertionError where it ended otherwise, or with a traceback (torchrun always has one when a rank fails)."""
        assert self.code in codes, f"exit code {self.code}, expected {' or '.join(map(str, codes))}: {self.said[-1500:]}"
        mine = "torch.distributed.elastic" not in self.said and "Traceback (most recent call last)" in self.said
        assert not mine, f"it ended with a traceback: {self.said[-1500:]}"
        return self

    def expect_said(self, *words: str) -> Ended:
        """Raises AssertionError where one of the words was not said."""
        missing = [word for word in words if word.lower() not in self.said.lower()]
        assert not missing, f"it did not say {missing}: {self.said[-1500:]}"
        return self


class Started:
    """A running process, in a process group of its own."""

    def __init__(self, pid: int, output: Path, poll: Any) -> None:
        self.pid = pid
        self._output = output
        self._poll = poll  # () -> int | None

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    @property
    def running(self) -> bool:
        """Whether it is not over yet."""
        return self._poll() is None

    def send(self, number: int, *, group: bool = False) -> None:
        """A signal, to it alone or to its whole group (as a terminal sends Ctrl-C)."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout: float = 120) -> Ended:
        """Waits for its end.

        Raises:
            AssertionError: it does not end; it is killed then.
        """
        until = time.monotonic() + timeout
        while (code := self._poll()) is None:
            if time.monotonic() > until:
                self.send(signal.SIGKILL, group=True)
                raise AssertionError(f"it did not end within {timeout:.0f} s: {self.said[-1500:]}")
            time.sleep(0.005)
        return Ended(code, self.said)

    def wait_for(self, condition: Any, timeout: float = 120) -> bool:
        """Waits until `condition()` holds: True; or until the process is over: False."""
        until = time.monotonic() + timeout
        while not condition():
            if not self.running:
                return False
            if time.monotonic() > until:
                self.send(signal.SIGKILL, group=True)
                raise AssertionError(f"what was waited for did not come within {timeout:.0f} s: {self.said[-1500:]}")
            time.sleep(0.001)
        return True


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread a process, no network, this working tree."""
    paths = [str(ROOT / "src"), str(ROOT)]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        "PYTHONPATH": os.pathsep.join(paths),
        **(more or {}),
    }


def command(*words: str) -> list[str]:
    """`burnish WORDS` with this Python."""
    return [sys.executable, "-m", "burnish", *words]


def driven(faults: Sequence[Mapping[str, Any]], *words: str) -> list[str]:
    """The words after `python` or `torchrun` that start `burnish WORDS` with faults put in."""
    return [str(DRIVER), json.dumps(list(faults)), *words]


def torchrun(processes: int, *words: str) -> list[str]:
    """Several processes of one script on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, *words]


_count = iter(range(10**6))


def start(words: Sequence[str], folder: Path, more: Mapping[str, str] | None = None, **options: Any) -> Started:
    """Starts a command in `folder`; what it prints goes to a file there."""
    output = folder / f"output-{next(_count)}.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            words, cwd=folder, env=environment(more), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, **options
        )
    return Started(process.pid, output, process.poll)


class Server:
    """Starts training processes from one that has imported burnish already: a second each instead of six.

    What it starts is `burnish.cli.main` in a process of its own, with a driver's faults. (Python's hash seed is the server's, so sets are
    in the same order in all of them: tries that must not hang on that start the plain command.)
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(DRIVER), "--serve"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._codes: dict[int, int] = {}
        self._started: dict[int, int] = {}
        self._changed = threading.Condition()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def start(
        self, words: Sequence[str], folder: Path, faults: Sequence[Mapping[str, Any]], *, limits: Mapping[str, int] | None = None
    ) -> Started:
        """Starts `burnish WORDS` in `folder`; `limits` are those of `resource.setrlimit`."""
        number = next(_count)
        output = folder / f"output-{number}.txt"
        asked = {
            "number": number,
            "words": list(words),
            "folder": str(folder),
            "faults": list(faults),
            "output": str(output),
            "limits": limits or {},
        }
        assert self._process.stdin is not None
        with self._changed:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            came = self._changed.wait_for(lambda: number in self._started or self._process.poll() is not None, timeout=120)
            assert came and number in self._started, "the server of the fault suite does not answer"
            pid = self._started[number]
        return Started(pid, output, lambda: self._codes.get(pid))

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already; the tries have said so
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._listener.join(20)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            with self._changed:
                if "number" in told:
                    self._codes.pop(told["pid"], None)  # the system uses numbers again
                    self._started[told["number"]] = told["pid"]
                else:
                    self._codes[told["pid"]] = told["code"]
                self._changed.notify_all()
