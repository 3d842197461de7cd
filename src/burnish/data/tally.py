"""Entering prepared chunks into the account, and finding duplicates on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from burnish.data.account import Account, Malformed, SourceAccount
from burnish.data.pipeline import Chunk, Fate, Task


class Tally:
    """Takes chunks in order: finds duplicates, and enters every row and token into an account.

    Args:
        account: The account to fill.
        deduplicate: Count rows that mean the same as an earlier one as duplicates, and leave them out.
    """

    def __init__(self, account: Account, *, deduplicate: bool) -> None:
        self.account = account
        self._first: dict[bytes, tuple[int, str, int]] | None = {} if deduplicate else None  # identity -> where it was first met

    def enter(self, tasks: Sequence[Task], chunk: Chunk) -> Chunk:
        """Enters a chunk; returns it without duplicates."""
        chunk = self._without_duplicates(tasks, chunk)
        sources = np.array([task.source for task in tasks])
        for number in sorted({task.source for task in tasks}):
            self._enter(self.account.sources[number], chunk, sources == number)
        for place, reason in chunk.reasons.items():
            row = tasks[place].row
            self.account.note(Malformed(row.file, row.number, reason))
        self.account.notes.update(chunk.notes)
        self.account.examples += len(chunk.block.lengths)
        return chunk

    def remember(self, task: Task, identity: bytes) -> bool:
        """Whether an earlier row means the same. A row that comes again because its source is oversampled is no duplicate of itself."""
        origin = (task.source, task.row.file, task.row.number)
        return self._first is not None and identity != b"" and self._first.setdefault(identity, origin) != origin

    def _without_duplicates(self, tasks: Sequence[Task], chunk: Chunk) -> Chunk:
        if self._first is None:
            return chunk
        for place, (task, identity) in enumerate(zip(tasks, chunk.identities, strict=True)):
            if self.remember(task, identity):
                chunk.fates[place] = Fate.DUPLICATE
        chunk.block = chunk.block.select((chunk.fates == Fate.KEPT)[chunk.block.rows])
        return chunk

    @staticmethod
    def _enter(source: SourceAccount, chunk: Chunk, mine: npt.NDArray[np.bool_]) -> None:
        """Adds the rows [R] for which `mine` is true to a source's account."""

        def having(*fates: Fate) -> npt.NDArray[np.bool_]:
            return mine & np.isin(chunk.fates, [int(fate) for fate in fates])

        kept, masked = having(Fate.KEPT), having(Fate.FULLY_MASKED, Fate.MASKED_BY_TRUNCATION)
        rows, tokens, block = source.rows, source.tokens, chunk.block
        rows.read += int(mine.sum())
        rows.kept += int(kept.sum())
        rows.duplicate += int(having(Fate.DUPLICATE).sum())
        rows.empty += int(having(Fate.EMPTY).sum())
        rows.malformed += int(having(Fate.MALFORMED).sum())
        rows.dropped += int(having(Fate.DROPPED).sum())
        rows.fully_masked += int(masked.sum())
        rows.masked_by_truncation += int(having(Fate.MASKED_BY_TRUNCATION).sum())
        rows.overlong += int((chunk.overlong & mine & ~having(Fate.DUPLICATE)).sum())
        tokens.rendered += int(chunk.rendered[mine].sum())
        tokens.truncated += int(chunk.truncated[kept].sum())
        tokens.dropped += int(chunk.rendered[having(Fate.DROPPED)].sum())
        tokens.duplicate += int(chunk.rendered[having(Fate.DUPLICATE)].sum())
        tokens.fully_masked += int(chunk.rendered[masked].sum() + chunk.masked_pieces[kept].sum())
        here = mine[block.rows]
        total, trained = int(block.lengths[here].sum(dtype=np.int64)), int(block.trained[here].sum(dtype=np.int64))
        tokens.total += total
        tokens.trained += trained
        tokens.masked += total - trained
