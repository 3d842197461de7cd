"""Checkpoints go to the disk beside the training: a copy is taken, and a thread writes it while the next steps are computed.

    write      takes the copy and returns; the next `write` waits for the one before, so there is one copy at most
    finished   what became of the writes since it was asked last
    wait       until nothing is being written

Storage that hesitates (an I/O error, a stale handle) is asked again a few times. What cannot be written at all (a full disk) ends no run:
the older checkpoints stay, and the next save tries again.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from burnish.core.errors import StorageError
from burnish.core.log import warn
from burnish.core.storage import error_number
from burnish.engine import checkpoint, shards
from burnish.engine.checkpoint import Checkpoint, flatten, unflatten
from burnish.engine.parts import Writing
from burnish.models.activations import free_memory

__all__ = ["THREAD", "Writer", "Written"]

THREAD = "checkpoint"
"""The name of the thread that writes: while it moves, a main thread that waits for it does not hang."""

_PASSING = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO}
"""Errors that network storage gives today and not a second later."""

_DELAYS = (1.0, 2.0, 4.0)  # seconds before each new attempt
_ROOM = 0.5  # share of the host's free memory that a copy may take


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one checkpoint."""

    step: int
    folder: Path
    error: StorageError | None = None


class Writer:
    """Writes the checkpoints of one run, and deletes those that are not to be kept.

    Args:
        root: The folder of the checkpoints.
        keep: How many stay, see `checkpoint.prune`.
        background: Write in a thread, where memory has room for a copy.
        active: False on ranks that do not write.
        ranks: Those that write each checkpoint together, if several do: each its own part, and the first one deletes.
        best: Step of the best checkpoint that is there already.
        delays: Seconds before each new attempt on storage that hesitates. Ranks that write together make one attempt.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        background: bool = True,
        active: bool = True,
        ranks: Writing | None = None,
        best: int | None = None,
        delays: Sequence[float] = _DELAYS,
    ) -> None:
        self._root = root
        self._keep = keep
        self._background = background
        self._active = active or ranks is not None
        self._prunes = active
        self._ranks = ranks
        self._delays = delays if ranks is None else ()
        self._thread: threading.Thread | None = None
        self.best = best
        """Step of the best checkpoint that is written."""
        self._results: list[Written] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wait()  # also after an error: a checkpoint that is nearly there is worth the moment

    def write(self, content: Checkpoint, *, best: int | None = None) -> None:
        """Begins to write a checkpoint; afterwards all but the newest, the one of step `best` and permanent ones are deleted."""
        if not self._active:
            return
        self.wait()
        if self._ranks is not None:
            content = shards.owned(content, self._ranks)
        if self._background and _size(content) < _ROOM * free_memory(torch.device("cpu")):
            copy = _copied(content)
            self._thread = threading.Thread(target=self._write, args=(copy, best), name=THREAD)
            self._thread.start()
        else:
            self._write(content, best)

    def finished(self) -> list[Written]:
        """The writes that ended since this was asked last, in order."""
        results, self._results = self._results, []
        return results

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, content: Checkpoint, best: int | None) -> None:
        target = checkpoint.folder_of(self._root, content.step)
        for delay in (*self._delays, None):
            try:
                if self._ranks is None:
                    checkpoint.save(self._root, content)
                else:
                    shards.save(self._root, content, self._ranks)
            except Exception as raised:  # also what nobody expects: in a thread it would be lost
                error = raised if isinstance(raised, StorageError) else StorageError(f"{target} could not be written: {raised}")
                if delay is not None and _is_passing(error):
                    warn(f"{error}; once more in {delay:g} s")
                    time.sleep(delay)
                    continue
                self._results.append(Written(content.step, target, error))
                return
            break
        try:
            if self.best is None or (best is not None and checkpoint.folder_of(self._root, best).is_dir()):
                self.best = best  # one that could not be written does not take the place of an older one
            if self._prunes:
                checkpoint.prune(self._root, keep=self._keep, best=self.best)
        except OSError as error:  # the new one is there; that an old one stays harms nobody
            warn(f"an old checkpoint in {self._root} could not be deleted: {error}")
        self._results.append(Written(content.step, target))


def _is_passing(error: StorageError) -> bool:
    return error_number(error.__cause__) in _PASSING


def _size(content: Checkpoint) -> int:
    _, tensors = flatten(content.optimizer)
    return sum(tensor.nbytes for group in (content.weights, tensors, content.rng) for tensor in group.values() if not tensor.is_meta)


def _copied(content: Checkpoint) -> Checkpoint:
    """The same in memory of its own, which training does not touch."""
    structure, tensors = flatten(content.optimizer)
    weights, tensors, rng = (
        {name: tensor if tensor.is_meta else tensor.detach().to("cpu", copy=True) for name, tensor in group.items()}
        for group in (content.weights, tensors, content.rng)
    )
    return replace(content, weights=weights, optimizer=unflatten(structure, tensors), rng=rng)
