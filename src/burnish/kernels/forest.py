"""The structure of a flat batch: segments, and which of them continue which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Forest:
    """The segments of a flat batch: where each ends, and which segment it continues (-1: none). Parents stand before children."""

    doc_ends: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.doc_ends) != len(self.parents):
            raise ValueError(f"{len(self.doc_ends)} segments but {len(self.parents)} parents")
        if any(not -1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ValueError(f"a parent must be -1 or stand before its child, found parents {self.parents}")
        if any(length <= 0 for length in self.lengths):
            raise ValueError(f"segments must not be empty, found ends {self.doc_ends}")

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment, without its ancestors'."""
        return tuple(end - start for start, end in zip((0, *self.doc_ends), self.doc_ends, strict=False))

    @cached_property
    def inherited(self) -> tuple[int, ...]:
        """Tokens of each segment's ancestors."""
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + self.lengths[parent] if parent >= 0 else 0)
        return tuple(found)

    @cached_property
    def is_tree(self) -> bool:
        """Whether any segment shares another as its beginning."""
        return any(parent >= 0 for parent in self.parents)

    @cached_property
    def uniform(self) -> bool:
        """Whether all segments are roots of one length."""
        return not self.is_tree and len(set(self.lengths)) == 1

    def chain(self, segment: int) -> list[int]:
        """The segment and its ancestors, root first."""
        links = [segment]
        while (parent := self.parents[links[0]]) >= 0:
            links.insert(0, parent)
        return links

    def rows(self, segment: int) -> slice:
        """The flat tokens of a segment."""
        return slice(self.doc_ends[segment] - self.lengths[segment], self.doc_ends[segment])

    def visible(self, window: int | None = None, device: torch.device | None = None) -> torch.Tensor:
        """Bool [T, T]: token q (row) attends to token k (column)."""
        total = self.doc_ends[-1] if self.doc_ends else 0
        mask = torch.zeros(total, total, dtype=torch.bool)
        for i in range(len(self.lengths)):
            chain = torch.cat([torch.arange(total)[self.rows(j)] for j in self.chain(i)])
            mask[self.rows(i), chain] = causal_mask(self.lengths[i], len(chain), window, torch.device("cpu"))
        return mask.to(device)

    def cumulative(self, device: torch.device) -> torch.Tensor:
        """int32 [N + 1] on `device`: 0 and the ends, copied there once per batch."""
        if device not in self._cumulative:
            self._cumulative[device] = torch.tensor((0, *self.doc_ends), dtype=torch.int32, device=device)
        return self._cumulative[device]

    @cached_property
    def _cumulative(self) -> dict[torch.device, torch.Tensor]:
        return {}


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool [queries, keys] for the last `queries` of `keys` tokens: causal, within the window where there is one."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
