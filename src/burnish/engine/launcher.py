"""Starting one process for each local device, and looking after them until the last has ended.

    bind the board's port -> start the ranks -> wait until all have ended, or one has died -> stop the others, name it -> start again?

Why not torch's own launcher: it gives a stopped run 30 seconds to save, then kills it; its exit code is 1 whatever the ranks said; and it
prints every rank's output. Here the ranks have process groups of their own, so that Ctrl-C reaches each of them once, through this
process; rank 0 speaks on this terminal; what the others print is kept in the run folder, and shown where it explains an end.

Each rank is a fresh `burnish train` with the variables that torchrun would set, so the same process runs under either.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from burnish.config.sections import Parallel
from burnish.core.errors import BurnishError, ConfigError, TrainingError, Where
from burnish.core.log import LAUNCHER, info, notice, print_error, warn
from burnish.core.signals import waiting
from burnish.engine.rendezvous import Board, serve, verdict

__all__ = ["MEMORY_NOTE", "adopt_slurm", "cause_first", "follow_launcher", "is_launched", "launch", "processes", "tell_ignored"]

MEMORY_NOTE = "memory.json"
"""What ranks that ran out of memory leave in the run folder (see `engine.memory`)."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PATIENCE = {2: 20.0, 3: 300.0}
"""Seconds that the others have for ending as the first has: with the same complaint, or with the same checkpoint."""
_TAIL = 40  # lines of a dead rank that are shown
_MOMENT = 6.0  # seconds
_KEPT = 20_000  # lines of a rank that wait in memory for the run folder to be made


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank already: started by torchrun, accelerate launch, srun or this module."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def processes(parallel: Parallel, environ: Mapping[str, str] = os.environ) -> int:
    """How many processes to start on this machine; 1 is this one.

    Raises:
        ConfigError: more are asked for than there are accelerators.
        TrainingError: accelerate was asked for several processes, and has started one.
    """
    if "ACCELERATE_MIXED_PRECISION" in environ:  # accelerate launch, in the way that starts a single process
        if "MASTER_PORT" in environ:
            raise TrainingError(
                "accelerate launch was asked for several processes and has started only this one, as it does with --cpu",
                hint="On CPUs: burnish train RUN.yaml parallel.processes=2, or torchrun -m burnish train, or accelerate launch --multi_gpu "
                "with ACCELERATE_USE_CPU=true.",
            )
        return 1
    asked = parallel.processes
    if asked == 1 or parallel.strategy == "none":
        return 1
    devices = _accelerators()
    if asked == "auto":
        return max(1, devices)
    if devices and asked > devices:
        raise ConfigError(
            f"{asked} processes want an accelerator each, and this machine has {devices}", where=Where(field="parallel.processes")
        )
    return asked


def launch(arguments: Sequence[str], count: int, *, folder: Path, restarts: int = 0) -> int:
    """Runs `burnish` with `arguments` in `count` processes, and waits for all of them.

    Args:
        arguments: Of the command line, such as `["train", "run.yaml"]`.
        count: Processes.
        folder: The run folder, which gets the output of all ranks but 0 once it is there.
        restarts: How often they are started again when one has died. To go on in smaller micro-batches is none of these.

    Returns:
        The exit code: 0, 2 or 3 where the ranks say so, 1 where one has died, 128 + the signal where a second one came.
    """
    info(f"starting {count} processes on this machine")
    attempt, smaller = 0, 0
    while True:
        before = _noted(folder)
        group = _Group(arguments, count, folder, attempt)
        with group.signals():
            code = group.run()
        if not group.died:
            return code
        noted = _noted(folder) if _noted(folder) != before else {}
        last = group.signalled is not None or not (noted or attempt - smaller < restarts)
        print_error(_obituary(group, folder, said=str(noted.get("said", "")), last=last))
        if last:
            return code
        attempt, smaller = attempt + 1, smaller + bool(noted)
        how = "in smaller micro-batches" if noted else f"({attempt - smaller} of {restarts})"
        info(f"starting again {how}: going on from the last checkpoint")


def _noted(folder: Path) -> dict[str, Any]:
    """What ranks that ran out of memory have left in the run folder."""
    try:
        return dict(json.loads((folder / MEMORY_NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


class _Rank:
    """One process, and what it prints."""

    def __init__(self, number: int, process: subprocess.Popen[str], log: Path) -> None:
        self.number = number
        self.process = process
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.code: int | None = None
        self.stopped_by_us = False
        self._began = time.time()
        self._log = log
        self._waiting: deque[str] = deque(maxlen=_KEPT)
        self._file: IO[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True) if process.stdout is not None else None
        if self._reader is not None:
            self._reader.start()

    def wait(self, ended: queue.SimpleQueue[_Rank]) -> None:
        """Waits for the end, in a thread, and reports it."""
        self.code = self.process.wait()
        if self._reader is not None:
            self._reader.join(timeout=5)  # a process that it has started itself may hold the pipe open
        ended.put(self)

    def kill(self) -> None:
        """Ends it at once: it may hang where no handler runs. A checkpoint that it is writing is not visible yet."""
        if self.process.poll() is None:
            self.stopped_by_us = True
            self.process.kill()

    def fate(self) -> str:
        """How it ended, in words."""
        code = self.code or 0
        if code >= 0:
            return f"rank {self.number} (pid {self.process.pid}) ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", perhaps by the system, for want of memory" if -code == signal.SIGKILL else ""
        return f"rank {self.number} (pid {self.process.pid}) was killed by {name}{memory}"

    def close(self) -> None:
        """Writes out what waits."""
        self._write()
        if self._file is not None:
            self._file.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.tail.append(line)
            self._waiting.append(line)
            self._write()

    def _write(self) -> None:
        """Into the run folder, once this run has opened it: a refused run must leave the folder of another one as it is."""
        with suppress(OSError):  # a full disk is the training's business
            if self._file is None and self._waiting:
                opened = self._log.parent.parent / "run.yaml"
                if not opened.is_file() or opened.stat().st_mtime < self._began:
                    return
                self._log.parent.mkdir(exist_ok=True)
                self._file = self._log.open("a", encoding="utf-8", errors="replace")
            if self._file is not None:
                while self._waiting:
                    self._file.write(self._waiting.popleft())
                self._file.flush()


class _Group:
    """The processes of one attempt."""

    def __init__(self, arguments: Sequence[str], count: int, folder: Path, attempt: int) -> None:
        self.died: list[_Rank] = []  # those that ended as no rank should, the first one first
        self.signalled: signal.Signals | None = None
        self.verdict: str | None = None  # of the watchdogs, where a rank hung
        self._arguments = list(arguments)
        self._count = count
        self._folder = folder
        self._attempt = attempt
        self._ranks: list[_Rank] = []
        self._ended: queue.SimpleQueue[_Rank] = queue.SimpleQueue()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Passes the signals that this process gets on to each rank, once each."""
        # A hang-up that is ignored (nohup) stays ignored.
        wanted = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT]
        before = {number: signal.signal(number, self._forward) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self) -> int:
        """Starts the ranks and waits for their end; returns the exit code."""
        with socket.socket() as listening, _Line() as line:
            listening.bind(("127.0.0.1", 0))
            listening.listen(self._count * 4)  # the ranks may call before the board is there
            try:
                for number in range(self._count):
                    self._ranks.append(self._start(number, listening.getsockname()[1], line.far_end))
                board = serve(listening, self._attempt)
                return self._settle(self._wait(board))
            finally:
                for rank in self._ranks:
                    rank.kill()
                for rank in self._ranks:
                    rank.process.wait()
                    rank.close()

    def _start(self, number: int, port: int, line: int) -> _Rank:
        loud = number == 0
        with waiting():  # until the rank can heed them
            process = subprocess.Popen(
                [*_interpreter(), "-m", "burnish", *self._arguments],
                env=_environment(number, self._count, port, self._attempt, line),
                pass_fds=(line,),
                stdin=subprocess.DEVNULL,
                stdout=None if loud else subprocess.PIPE,
                stderr=None if loud else subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,  # so that the terminal's Ctrl-C comes through us, and once
            )
        rank = _Rank(number, process, self._folder / "logs" / f"rank-{number}.log")
        threading.Thread(target=rank.wait, args=(self._ended,), daemon=True).start()
        if self.signalled is not None:  # it came while they were being started
            process.send_signal(self.signalled)
        return rank

    def _wait(self, board: Board) -> _Rank | None:
        """Waits until all have ended, and stops those that cannot go on; returns the first that ended otherwise than well."""
        first: _Rank | None = None
        deadline: float | None = None
        for _ in range(self._count):
            try:
                rank = self._ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                for other in self._ranks:
                    other.kill()
                rank = self._ended.get()
            if rank.code and not rank.stopped_by_us and first is None:
                first = rank
                deadline = time.monotonic() + (0.0 if self._is_death(rank) else _PATIENCE.get(rank.code, 20.0))
            if self._is_death(rank):
                self.died.append(rank)
                self.verdict = self.verdict or verdict(board)
        return first

    def _is_death(self, rank: _Rank) -> bool:
        stopped = self.signalled is not None and rank.code in (-self.signalled, 128 + self.signalled)
        return not stopped and not rank.stopped_by_us and rank.code not in (0, 2, 3)

    def _settle(self, first: _Rank | None) -> int:
        if first is None:
            return 0
        if self.died:
            return 1
        code = first.code or 0
        if code in (2, 3):
            if first.number and self._ranks[0].code != code:  # else rank 0 has said it
                notice("".join(first.tail).rstrip())
            return code
        return 128 + self.signalled if self.signalled is not None else 1

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the terminal is gone: what the ranks know is SIGTERM
            number = signal.SIGTERM
        self.signalled = signal.Signals(number)
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                rank.process.send_signal(number)


class _Line:
    """A pipe into which nobody writes: it ends for the ranks when this process does, however that happens."""

    def __enter__(self) -> _Line:
        self.far_end, self._near_end = os.pipe()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.far_end)
        os.close(self._near_end)


def _obituary(group: _Group, folder: Path, *, said: str, last: bool) -> TrainingError:
    """What is said when the group has died; `said` is what a rank that ran out of memory has noted."""
    first = group.died[0]
    if said:
        text = said
    elif group.verdict is not None:
        text = group.verdict
    else:
        text = first.fate()
        if first.tail:
            text += f"; its last lines:\n  {'  '.join(first.tail).rstrip()}"
    hint = None
    if last:
        saved = any((folder / "checkpoints").glob("step-*"))
        hint = "the same command goes on from the last checkpoint" if saved else "nothing was saved yet: the same command begins anew"
    return TrainingError(text, hint=hint)


def _environment(rank: int, count: int, port: int, attempt: int, line: int) -> dict[str, str]:
    """What torchrun would set, and how many threads a rank may use."""
    from burnish.data.workers import cores  # imports pyarrow, which a mistake in the run file need not wait for

    ours = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the board is kept by the launcher, not by rank 0
        "TORCHELASTIC_RESTART_COUNT": attempt,
        LAUNCHER: line,
    }
    environ = {**os.environ, **{key: str(value) for key, value in ours.items()}}
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    environ.setdefault("PYTHONFAULTHANDLER", "1")
    if sys.platform == "linux":
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to today
    return environ


def _interpreter() -> list[str]:
    """This Python, which looks for modules in the working folder only if this process does."""
    here = any(place in ("", os.getcwd()) for place in sys.path)
    return [sys.executable] if here else [sys.executable, "-P"]


def _accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def tell_ignored(parallel: Parallel, environ: Mapping[str, str] = os.environ) -> None:
    """Says which keys mean nothing where something else has started the processes: on the first of them."""
    default = Parallel()
    ignored = [key for key in ("processes", "restarts") if getattr(parallel, key) != getattr(default, key)]
    if environ.get("LOCAL_WORLD_SIZE") == str(parallel.processes) and "processes" in ignored:  # as many as were asked for
        ignored.remove("processes")
    if ignored and is_launched(environ) and LAUNCHER not in environ and environ["RANK"] == "0":
        warn(f"{' and '.join(f'parallel.{key}' for key in ignored)} not followed: what started the processes decides")


def follow_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Makes this rank stop, with a checkpoint, when its launcher is killed: then the pipe that both hold ends."""
    line = environ.get(LAUNCHER)
    if line is not None:
        threading.Thread(target=_stop_at_the_end_of, args=(int(line),), daemon=True).start()


@contextmanager
def cause_first(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Holds back the end of a rank that fails, a moment long.

    When a rank dies, the others fail too, at once, because it is gone. Their launcher stops them in this moment, before they print a
    traceback that explains nothing.
    """
    try:
        yield
    except BurnishError:
        raise
    except Exception:
        if LAUNCHER in environ:
            time.sleep(_MOMENT)
        raise


def _stop_at_the_end_of(line: int) -> None:
    os.read(line, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def adopt_slurm(environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Translates what `srun` says into what torch reads, where srun itself has started several tasks, one for each device."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if is_launched(environ) or tasks < 2 or "SLURM_PROCID" not in environ:
        return
    node = int(environ.get("SLURM_NODEID", "0"))
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_of_nodes(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))[node]),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": _first_node(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": str(20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 10_000),
    }
    for key, value in found.items():
        environ.setdefault(key, value)


def _tasks_of_nodes(text: str) -> list[int]:
    """`4(x2),1` -> [4, 4, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks


def _first_node(text: str) -> str:
    """`gpu[03-05,9],cpu1` -> gpu03."""
    head, bracket, rest = text.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    inside = rest.partition("]")[0]
    return head + inside.replace(",", "-").split("-")[0]
