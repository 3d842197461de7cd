"""Finding the rank that does not answer, in a run of several processes.

When one rank hangs, all others wait for it in a collective, and a time-out there names nobody. So a thread in every rank leaves a sign of
life on the board (`engine.rendezvous`) from time to time: the step, how many collectives the rank has entered, and where its main thread
is. A main thread that stands at the same place for longer than `parallel.timeout` makes its thread look at the signs of all:

    somebody moves, or its writing thread      a rank that loads, evaluates or saves for long: go on waiting
    some signs are old                         these ranks are stopped, or their machines are gone
    some have entered fewer collectives        these ranks hang by themselves: the others wait for them
    else                                       nobody can be told from the others, and all are listed

Then every rank that can writes its stacks into the run folder, one says which rank it is, and all end with exit code 1. The same command
goes on from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from burnish.core.errors import TrainingError
from burnish.core.log import LAUNCHER, console, print_error
from burnish.engine.events import Callback, State
from burnish.engine.rendezvous import VERDICT, Board, collectives, connect
from burnish.engine.step import StepResult
from burnish.engine.writer import THREAD

__all__ = ["Sign", "Watchdog", "culprits"]

T = TypeVar("T")
_PACKAGE = str(Path(__file__).resolve().parents[1])
_COLLECTIVES = os.path.join("torch", "distributed", "")


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of life."""

    rank: int
    pid: int
    host: str
    beat: int  # of the thread: grows as long as the process runs
    moves: int  # of the main thread: grows when it is seen elsewhere than before
    collectives: int  # entered so far
    step: int
    place: str  # where the main thread is

    def __str__(self) -> str:
        return f"{self.who} {self.when}: {self.place}"

    @property
    def who(self) -> str:
        """The process."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def when(self) -> str:
        """Where in the run: `step` counts the steps that are done."""
        return f"after step {self.step}" if self.step else "before the end of the first step"


class Watchdog(Callback):
    """The thread of one rank, and what tells it how the main thread gets on. Does nothing where there is one process.

    Args:
        rank: Of this process.
        world_size: Processes of the run.
        timeout: Seconds without a move of any rank after which the run ends.
        folder: The run folder, for the stacks.
    """

    def __init__(self, rank: int, world_size: int, *, timeout: float, folder: Path) -> None:
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._interval = min(max(timeout / 20, 0.1), 10.0)
        self._folder = folder
        self._step = 0
        self._ticks = 0
        self._beat = 0
        self._moves = 0
        self._seen: object = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._dumped = False

    def start(self) -> None:
        """Begins to watch this process's main thread."""
        if self._world_size > 1 and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which is a move."""
        for item in items:
            self._ticks += 1
            yield item

    def on_train_start(self, state: State) -> None:  # noqa: D102  # as in Callback, and so are the rest
        self._move(state)

    def on_step_start(self, state: State) -> None:  # noqa: D102
        self._move(state)

    def on_step_end(self, state: State, result: StepResult) -> None:  # noqa: D102
        self._move(state)

    def on_save(self, state: State, folder: Path) -> None:  # noqa: D102
        self._move(state)

    def on_train_end(self, state: State) -> None:  # noqa: D102
        self._move(state)

    def _move(self, state: State) -> None:
        self._step = state.step
        self._ticks += 1

    # The thread.

    def _watch(self) -> None:
        board: Board | None = None
        idle, before = 0.0, time.monotonic()
        while not self._done.wait(self._interval):
            now = time.monotonic()
            # Time in which this thread did not run either does not count: the whole machine was suspended.
            idle, before = idle + min(now - before, 2 * self._interval), now
            sign = self._sign()
            if sign.moves != self._moves:
                idle, self._moves = 0.0, sign.moves
            try:
                board = board or connect(timeout=max(5.0, min(self._timeout, 60.0)))
                _leave(board, sign)
                if idle >= self._timeout:
                    self._look_around(board)
                    idle = self._timeout / 2
            except RuntimeError:  # the board's process is stopped or gone: nobody can be asked
                if idle >= self._timeout and not self._done.is_set():
                    self._dump()
                    self._end(f"the process that keeps the board of this run has not answered for {self._timeout:.3g} s", tell=True)

    def _sign(self) -> Sign:
        self._beat += 1
        frames = sys._current_frames()
        frame = frames.get(threading.main_thread().ident or 0)
        entered = collectives()
        writing = [_standing(frames.get(thread.ident or 0)) for thread in threading.enumerate() if thread.name == THREAD]
        seen = (self._ticks, entered, _standing(frame), *writing)
        moves = self._moves + (seen != self._seen)
        self._seen = seen
        return Sign(self._rank, os.getpid(), socket.gethostname(), self._beat, moves, entered, self._step, _place(frame))

    def _look_around(self, board: Board) -> None:
        """Compares the signs of all ranks over a while; ends the run where nobody moves."""
        if self._dump():
            board.set(_stacks_of(self._rank), "written")
        first = _signs(board, self._world_size)
        for _ in range(4):
            if board.check([VERDICT]) or self._done.wait(self._interval):
                break
            sign = self._sign()
            if sign.moves != self._moves:
                self._moves = sign.moves
                return
            _leave(board, sign)
        if self._done.is_set():
            return
        second = _signs(board, self._world_size)
        if not board.check([VERDICT]) and any(first[rank].moves != second[rank].moves for rank in first if rank in second):
            return
        written = [rank for rank in range(self._world_size) if board.check([_stacks_of(rank)])]
        mine = self._verdict(first, second, written)
        valid = board.compare_set(VERDICT, "", mine).decode()
        if valid == mine:  # the others come to see it
            time.sleep(4 * self._interval)
        self._end(valid, tell=valid == mine)

    def _verdict(self, first: Mapping[int, Sign], second: Mapping[int, Sign], written: Sequence[int]) -> str:
        """What is known of each rank, and where the stacks are of those that could write them."""
        named = culprits(first, second, self._world_size)
        stopped = _silent(first, second, self._world_size)
        lines = [_line(rank, second, silent=rank in stopped) for rank in range(self._world_size)]
        if written:
            lines.append(f"{_whose(written, self._world_size)}: {self._folder / 'logs' / 'stacks-rank-N.txt'}")
        who = " and ".join(f"rank {rank}" for rank in named) if named else "no rank"
        verb = "does" if len(named) < 2 else "do"
        has = f"{who} {verb} not answer" if named else "no rank gets on"
        return f"{has}: nothing has moved for {self._timeout:.3g} s\n  " + "\n  ".join(lines)

    def _dump(self) -> bool:
        """Writes the stacks of all threads of this process into the run folder, once; whether it just has."""
        if self._dumped:
            return False
        self._dumped = True
        try:
            place = self._folder / "logs"
            place.mkdir(parents=True, exist_ok=True)
            with (place / f"stacks-rank-{self._rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # a full disk, or none: the message says where this rank is as well
            return False
        return True

    def _end(self, text: str, *, tell: bool) -> None:
        """Ends this process; its main thread waits where no exception reaches it."""
        if tell and LAUNCHER not in os.environ:  # the launcher reads the board itself
            print_error(TrainingError(text, hint="the same command goes on from the last checkpoint"))
        console.show_cursor(True)
        os._exit(1)


def culprits(first: Mapping[int, Sign], second: Mapping[int, Sign], world_size: int) -> list[int]:
    """The ranks that the others wait for, from two looks at the signs of all; empty where none can be told from the others."""
    if silent := _silent(first, second, world_size):
        return silent
    entered = {rank: sign.collectives for rank, sign in second.items()}
    behind = [rank for rank, count in entered.items() if count == min(entered.values())]
    return sorted(behind) if len(behind) < world_size else []


def _silent(first: Mapping[int, Sign], second: Mapping[int, Sign], world_size: int) -> list[int]:
    """The ranks that have left no sign of life between the two looks."""
    return [rank for rank in range(world_size) if rank not in second or (rank in first and first[rank].beat == second[rank].beat)]


def _line(rank: int, signs: Mapping[int, Sign], *, silent: bool) -> str:
    if rank not in signs:
        return f"rank {rank}: no sign of life yet"
    sign = signs[rank]
    # It may have gone on for a moment after its last sign: what that says is not where it stands.
    return f"{sign.who}: no sign of life any more; the last one came {sign.when}, from {sign.place}" if silent else str(sign)


def _whose(written: Sequence[int], world_size: int) -> str:
    """Whose stacks there are, in words."""
    missing = [rank for rank in range(world_size) if rank not in written]
    if not missing:
        return "where each one stands"
    but = len(missing) < len(written)
    named = " and ".join(f"rank {rank}" for rank in (missing if but else written))
    return f"where each one but {named} stands" if but else f"where {named} {'stands' if len(written) == 1 else 'stand'}"


def _stacks_of(rank: int) -> str:
    """The note that a rank has written its stacks: one that is stopped cannot."""
    return f"stacks/{rank}"


def _leave(board: Board, sign: Sign) -> None:
    board.set(f"sign/{sign.rank}", json.dumps(asdict(sign)))


def _signs(board: Board, world_size: int) -> dict[int, Sign]:
    keys = {rank: f"sign/{rank}" for rank in range(world_size)}
    return {rank: Sign(**json.loads(board.get(key))) for rank, key in keys.items() if board.check([key])}


def _standing(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    """The same as long as a thread stands at one place: its frames, and the instruction in each."""
    standing: list[tuple[int, int]] = []
    while frame is not None:
        standing.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return tuple(standing)


def _place(frame: FrameType | None) -> str:
    """The innermost line of ours, or of the user's, and the collective that it waits in."""
    collective = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if _COLLECTIVES in file:
            collective = frame.f_code.co_name if frame.f_code.co_name != "wrapper" else collective  # torch's own, around each one
        elif collective or f"{os.sep}site-packages{os.sep}" not in file:
            shown = os.path.relpath(file, _PACKAGE) if file.startswith(_PACKAGE) else file
            waits = f"waits in {collective}, " if collective else ""
            return f"{waits}{shown}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "nowhere"
