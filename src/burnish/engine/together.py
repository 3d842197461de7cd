"""Work that is done once for each machine, while the other processes of the machine wait for it.

    first process of each machine    works: tokenises, downloads, ...                     leaves a note
    the others of the machine        wait for the note, then find the outcome on the disk
    all                              go on when all are ready, so that no collective begins, and no time-out runs, before that

The work may take hours; nobody waits in a collective. A failure ends all ranks with the exit code of the one that failed first, which
alone says why.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from burnish.core.errors import BurnishError, DataError, Elsewhere, Interrupted
from burnish.core.log import LAUNCHER, notice
from burnish.core.signals import Stopped
from burnish.engine.backend import Backend
from burnish.engine.rendezvous import Board, connect

__all__ = ["Seat", "agree", "once_per_machine"]

T = TypeVar("T")
_SAID_AFTER = 5.0  # seconds of waiting
_HEARD_WITHIN = 20.0  # seconds that the others have for hearing of a failure


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a process sits: its rank, and its number on its machine."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def of(cls, backend: Backend, environ: Mapping[str, str] = os.environ) -> Seat:
        """As the launcher says."""
        return cls(backend.rank, int(environ.get("LOCAL_RANK", str(backend.rank))), backend.world_size)

    @property
    def first(self) -> int:
        """The rank of the first process of the machine: a launcher numbers the processes of a machine in a row."""
        return self.rank - self.local_rank


def once_per_machine(work: Callable[[], T], *, what: str, backend: Backend) -> T:
    """Runs `work` in the first process of each machine, and afterwards in the others, which should find the outcome on the disk.

    Args:
        work: What to do.
        what: As in "to `prepare the data`"; may be used once in a run.
        backend: Of this process.

    Raises:
        BurnishError: as `work`, in the rank where it failed first.
        Elsewhere: in all others.
    """
    if backend.world_size == 1:
        return work()
    return _Meeting(connect(), Seat.of(backend), what).hold(work)


class _Meeting:
    """The notes about one piece of work."""

    def __init__(self, board: Board, seat: Seat, what: str, *, pause: float = 0.05) -> None:
        self._board = board
        self._seat = seat
        self._what = what
        self._pause = pause

    def hold(self, work: Callable[[], T]) -> T:
        """Waits, works, and waits for the rest."""
        seat = self._seat
        if seat.local_rank:
            self._wait(lambda: self._board.check([self._key(f"of-{seat.first}")]), f"rank {seat.first}")
        try:
            result = work()
        except BurnishError as error:
            self._fail(error, error.exit_code)
            raise
        except Stopped as stop:
            self._fail(stop, Interrupted.exit_code)
            raise
        except Exception as error:
            self._fail(error, 1)
            raise
        self._board.set(self._key(f"of-{seat.rank}"), "done")
        if self._board.add(self._key("ready"), 1) == seat.world_size:
            self._board.set(self._key("all"), "ready")
        self._wait(lambda: self._board.check([self._key("all")]), "the other ranks")
        return result

    def _wait(self, over: Callable[[], bool], whom: str) -> None:
        try:
            self._look(over, whom)
        except Stopped:  # by a signal that whoever works may have got too: it need not wait until this rank hears of that
            self._board.add(self._key("heard"), 1)
            raise

    def _look(self, over: Callable[[], bool], whom: str) -> None:
        began, pause, said = time.monotonic(), self._pause, False
        while not over():
            if self._board.check([self._key("failed")]):
                self._leave(json.loads(self._board.get(self._key("failed"))))
            if not said and time.monotonic() - began > _SAID_AFTER:
                said = True
                if self._speaks():
                    notice(f"rank {self._seat.rank} waits for {whom} to {self._what}")
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def _speaks(self) -> bool:
        """One of those that wait on a machine says so, or all, where the launcher keeps what they say in files."""
        return self._seat.local_rank <= 1 or LAUNCHER in os.environ

    def _fail(self, error: BaseException, code: int) -> None:
        """Tells the others, and gives them time to hear it: whoever is gone first may take the board along."""
        mine = json.dumps({"rank": self._seat.rank, "code": code, "text": str(error)})
        valid = self._board.compare_set(self._key("failed"), "", mine).decode()
        if valid != mine:
            first = json.loads(valid)
            if first["text"] == str(error):  # the same bad row, on another machine
                self._leave(first)
            return
        deadline = time.monotonic() + _HEARD_WITHIN
        while self._board.add(self._key("heard"), 0) < self._seat.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def _leave(self, failure: Mapping[str, str | int]) -> None:
        self._board.add(self._key("heard"), 1)
        raise Elsewhere(f"rank {failure['rank']} could not {self._what}", exit_code=int(failure["code"]))

    def _key(self, name: str) -> str:
        return f"{self._what}/{name}"


def agree(content: str, *, what: str, backend: Backend) -> None:
    """Makes sure that all ranks have the same: their disks may differ.

    Args:
        content: Names what this rank has.
        what: What it is, in the plural, for the message.
        backend: Of this process.

    Raises:
        DataError: some have another content than rank 0.
    """
    contents = backend.gather(content)
    unlike = [rank for rank, other in enumerate(contents) if other != contents[0]]
    if not unlike:
        return
    shown = ", ".join(map(str, unlike[:8])) + (" ..." if len(unlike) > 8 else "")
    error = DataError(
        f"{what} differ: rank{'s' if len(unlike) > 1 else ''} {shown} read other ones than rank 0",
        hint="The machines need the same files under the same paths.",
    )
    if backend.rank:
        raise Elsewhere(str(error))
    raise error
