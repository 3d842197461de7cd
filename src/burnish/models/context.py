"""Context parallelism: ranks share the tokens of a micro-batch, for examples too long for one device (Ulysses, 2309.14509).

Everything in a transformer but attention works token by token, so each of N ranks computes T / N neighbouring tokens. Attention works head
by head. Around it tokens are exchanged for heads:

    q k v [T / N, all heads] ─ exchange ─▶ [T, 1 / N of the heads] ─ attention over the whole forest ─ exchange ─▶ [T / N, all heads]

So attention is what it is on one device: every kernel, window, tree and sink. Nothing is approximated, and the exchanges are the only thing
that is added. Where T is not a multiple of N, up to N - 1 tokens follow as a segment of their own, which nobody looks at.

A group of key heads that is not to be cut into N equal parts is repeated as often as it takes, so the number of query heads alone decides
what N may be.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as functional
from torch import nn

from burnish.core.errors import ConfigError, Where, divisors, one_of
from burnish.data.types import Batch
from burnish.kernels.attention import Forest, as_autocast
from burnish.kernels.linear_ce import TokenStats

__all__ = ["Context", "Group", "Reach", "Share", "refuse_heads", "sizes_that_do"]


class Group(Protocol):
    """The ranks that share a micro-batch (satisfied by `engine.backend_context.ContextGroup`)."""

    rank: int
    """This rank's place."""
    size: int
    """How many they are, N."""

    def exchange(self, pieces: torch.Tensor) -> torch.Tensor:
        """[N, ...], piece s for rank s -> [N, ...], piece s from rank s; differentiable."""
        ...

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each rank -> [N n, ...]; differentiable, the gradients of all ranks are added."""
        ...


@dataclass(frozen=True)
class Share:
    """This rank's part of one flat batch: the rows `start` to `stop` of `forest`, which has a multiple of N tokens."""

    forest: Forest
    start: int
    stop: int
    tokens: int  # of the batch itself

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Values [T] of the batch's tokens -> [T / N] of this rank's; 0 for those that fill up."""
        return functional.pad(values, (0, self.forest.doc_ends[-1] - self.tokens))[self.start : self.stop]


class Context:
    """What is exchanged between the ranks of a group, and how."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def share(self, forest: Forest) -> Share:
        """This rank's part of a batch."""
        tokens, size = forest.doc_ends[-1], self.group.size
        each = -(-tokens // size)
        if each * size > tokens:
            forest = Forest((*forest.doc_ends, each * size), (*forest.parents, -1))
        return Share(forest, self.group.rank * each, (self.group.rank + 1) * each, tokens)

    def heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """All heads of this rank's tokens -> all tokens of this rank's heads.

        Args:
            query: [1, Hq, T / N, D].
            key: [1, Hkv, T / N, D].
            value: [1, Hkv, T / N, D'].
            sinks: [Hq], or None.

        Returns:
            [1, Hq / N, T, D], [1, H, T, D], [1, H, T, D'] with H = the key heads that these query heads need, and [Hq / N].

        Raises:
            ConfigError: the query heads cannot be cut into N parts.
        """
        size, rank = self.group.size, self.group.rank
        refuse_heads(query.shape[1], size)
        again = size // math.gcd(size, key.shape[1])
        if again > 1:
            key, value = key.repeat_interleave(again, dim=1), value.repeat_interleave(again, dim=1)
        parts = [_by_rank(x, size) for x in as_autocast(query, key, value)]
        found = self.group.exchange(torch.cat(parts, dim=-1)).flatten(0, 1)
        made = found.split_with_sizes([part.shape[-1] for part in parts], dim=-1)
        widths = [x.shape[-1] for x in (query, key, value)]
        q, k, v = (x.reshape(len(x), -1, width).transpose(0, 1)[None] for x, width in zip(made, widths, strict=True))
        each = query.shape[1] // size
        return q, k, v, None if sinks is None else sinks[rank * each : (rank + 1) * each]

    def tokens(self, output: torch.Tensor) -> torch.Tensor:
        """All tokens of this rank's heads [1, Hq / N, T, D'] -> all heads of this rank's tokens [1, T / N, Hq, D']."""
        heads, width = output.shape[1], output.shape[-1]
        pieces = output[0].transpose(0, 1).reshape(self.group.size, -1, heads * width)
        found = self.group.exchange(pieces).transpose(0, 1)
        return found.reshape(1, found.shape[0], -1, width)

    def gather(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """The first `count` rows of all ranks' rows, laid end to end."""
        return self.group.gather(part)[:count]

    def places(self, count: int, device: torch.device) -> torch.Tensor:
        """Which of `count` rows this rank computes, int64. Equally many on all: where they do not come out even, the last row again."""
        each = -(-count // self.group.size)
        return torch.arange(self.group.rank * each, (self.group.rank + 1) * each, device=device).clamp(max=max(count - 1, 0))

    def own_rows(self, batch: Batch) -> Batch:
        """The batch with this rank's share of its predictions, each of which one rank has; some may have none."""
        each = -(-len(batch.targets) // self.group.size)
        mine = slice(self.group.rank * each, (self.group.rank + 1) * each)
        return replace(batch, rows=batch.rows[mine], targets=batch.targets[mine], token_weights=batch.token_weights[mine])

    def stats(self, part: TokenStats, count: int) -> TokenStats:
        """Statistics [n] of this rank's rows -> [count] of all rows, in one collective."""
        known = {field.name: value for field in fields(part) if (value := getattr(part, field.name)) is not None}
        together = self.gather(torch.stack([value.to(part.logprobs.dtype) for value in known.values()], dim=-1), count)
        columns = zip(known.items(), together.unbind(-1), strict=True)
        return TokenStats(**{name: column.to(value.dtype) for (name, value), column in columns})


class Reach:
    """Tells rotations that depend on the longest sequence (dynamic NTK, LongRoPE) of the positions that are on other ranks.

    Args:
        model: Its rotary modules say in `rope_type` what they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._last: torch.Tensor | None = None  # int64 [1]: the largest position of the batch that is computed
        for module in model.modules():
            if _asks_for_length(module):
                module.register_forward_pre_hook(self._add, with_kwargs=True)
                module.register_forward_hook(self._take)

    @contextmanager
    def over(self, positions: torch.Tensor) -> Generator[None]:
        """While a share of these positions [T] is computed."""
        self._last = positions.max()[None]
        try:
            yield
        finally:
            self._last = None

    def _add(self, _module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._last is None:
            return inputs, options
        if "position_ids" in options:
            return inputs, {**options, "position_ids": torch.cat((options["position_ids"], self._last[None]), dim=-1)}
        return (inputs[0], torch.cat((inputs[1], self._last[None]), dim=-1), *inputs[2:]), options

    def _take(self, _module: nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return output if self._last is None else tuple(part[:, :-1] for part in output)


def _asks_for_length(module: nn.Module) -> bool:
    found: Any = vars(module).get("rope_type")
    kinds = map(str, cast("dict[str, Any]", found).values() if isinstance(found, dict) else [found])
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def _by_rank(x: torch.Tensor, size: int) -> torch.Tensor:
    """[1, H, t, D] -> [N, t, H / N x D]: the heads of each rank."""
    _, heads, tokens, width = x.shape
    return x.reshape(size, heads // size, tokens, width).transpose(1, 2).reshape(size, tokens, -1)


def refuse_heads(heads: Any, size: int, processes: int = 0) -> None:
    """Raises where query heads cannot be cut into so many parts.

    Args:
        heads: Of a layer.
        size: Devices that are to share them.
        processes: Of the run, for the hint; 0: any number.

    Raises:
        ConfigError: `heads` is not a multiple of `size`.
    """
    if heads % size:
        raise ConfigError(
            f"the model has {heads} attention heads, which {size} devices cannot share equally",
            where=Where(field="parallel.context"),
            hint=sizes_that_do(heads, processes),
        )


def sizes_that_do(units: int, processes: int) -> str:
    """A hint: how many devices can share so many `units`, in a run of so many processes (0: any number)."""
    known = divisors(units)
    fitting = [size for size in known if processes % size == 0]
    if not known:
        return "leave it out"
    return f"take {one_of(fitting)}" if fitting else f"take {one_of(known)}, and a number of processes that it divides"
