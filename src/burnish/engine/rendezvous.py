"""The board on which the processes of a run leave notes for each other, beside their collectives: torch's TCPStore.

A collective needs every rank and has a time-out. A note needs one rank, is read when somebody looks, and can be written by a thread
while the main one waits. So preparation (`engine.together`), signs of life (`engine.watchdog`) and the launcher speak through notes.

Whoever started the processes has told them where it is, in MASTER_ADDR and MASTER_PORT: the launcher, torchrun, or rank 0 itself.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

__all__ = ["VERDICT", "Board", "collectives", "connect", "serve", "verdict"]

_OURS = "burnish"  # keeps our notes apart from torch's own
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # torchrun keeps its board when it starts the ranks again: old notes are not for them
VERDICT = "verdict"
"""The note in which a watchdog says which rank hangs."""


class Board(Protocol):
    """What a TCPStore can do, as far as it is used here. Values are written as text and read as bytes."""

    def set(self, key: str, value: str, /) -> None:
        """Writes a note."""
        ...

    def get(self, key: str, /) -> bytes:
        """Reads a note, which must be there."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all of the notes are there."""
        ...

    def add(self, key: str, amount: int, /) -> int:
        """Adds to a counter, which begins at 0, and returns it."""
        ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Writes `desired` if the note is `expected` (empty: not there), and returns what it is then."""
        ...


def connect(environ: Mapping[str, str] = os.environ, *, timeout: float = 60.0) -> Board:
    """A connection of its own to the board of this run: a thread may use it while the main thread waits in a collective.

    Args:
        environ: With MASTER_ADDR and MASTER_PORT.
        timeout: Seconds after which a board that does not answer is an error.

    Raises:
        RuntimeError: nobody answers there.
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # torch exports it without saying so

    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store: Any = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    return PrefixStore(_prefix(environ.get(_ATTEMPT, "0")), store)


def serve(listening: socket.socket, attempt: int = 0) -> Board:
    """Keeps the board for processes of this machine, on a socket that is bound already. It lives as long as what is returned."""
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # torch exports it without saying so

    address, port = listening.getsockname()
    # The store closes the descriptor that it is given.
    store: Any = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listening.fileno()))
    return PrefixStore(_prefix(str(attempt)), store)


def _prefix(attempt: str) -> str:
    return f"{_OURS}/{attempt}"


def collectives() -> int:
    """How many collectives this process has entered so far; 0 where there is no process group, or it does not count."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return 0
    group: Any = dist.group.WORLD
    try:
        return int(group._get_sequence_number_for_group())
    except (AttributeError, RuntimeError):
        return 0


def verdict(board: Board) -> str | None:
    """What a watchdog has found, if one has."""
    try:
        return board.get(VERDICT).decode() if board.check([VERDICT]) else None
    except RuntimeError:
        return None
