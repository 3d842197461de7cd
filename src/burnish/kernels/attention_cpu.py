"""Forest attention on a CPU as a few large matrix products.

A CPU's fused attention kernels work through small blocks and reach a fraction of what its matrix product reaches, above all in the
backward pass. At the lengths that are trained on, the scores of a stretch of queries fit the caches anyway. So:

    tile     up to `block` queries in a row, and all keys that any of them sees
    rows     the G query heads of one key head are stacked, token by token: [Hkv, B G, D] times [Hkv, Tk, D], nothing is repeated

    forward                              backward, for dO from above
    S = scale Q K^T   (masked)           P   kept, or computed again
    P = softmax(S)                       dV += P^T dO
    O = P V                              dS = P * (dO V^T - delta)        delta = rowsum(dO * O)
                                         dQ = scale dS K     dK += scale dS^T Q

The stacking also sums dK and dV over the heads of a group. A long segment is several tiles, so that at most half a tile's width of the
upper triangle is computed in vain; short neighbours (with the same parent) share a tile, each blind to the others, because a matrix
product of a few rows costs as much as one of many.

Soft caps: S' = c tanh(S / c), and dS gets the factor 1 - tanh^2. Sinks: with e^sink in the denominator all probabilities shrink by
sigma = sigmoid(logsumexp(S) - sink); dS is unchanged in form, and d sink = -sum over rows of (1 - sigma) delta.

Numbers. Scores and softmax are computed in fp32 (fp64 for fp64 inputs). On a CPU that multiplies bf16, the other products take bf16
inputs and add up in fp32 inside, as the flash kernels do; elsewhere all are fp32. `dO V^T - delta` is a difference of near numbers, so with
bf16 products it is taken inside the product, before anything is rounded: delta stands beside dO as two columns (it is their sum), with
columns of -1 beside V. With fp32 products delta is the sum of P * dO V^T over the keys, the same number, whose rounding errors cancel.
dK and dV are added up in fp32 over the tiles, in a fixed order.

Kept: q, k, v (the caller's own), the output, and the probabilities of tiles with few keys, which saves a product and the softmax: at most
`_KEEP` numbers per token and head. Beside bf16 they are kept in fp16, which has three bits more for numbers in 0..1, so that dS is rounded
once less than in a chain of bf16 operations. FLOPs: forward 4, backward 8 (or 10) per
query head, dimension, and pair of a query and a key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from burnish.kernels.dispatch import cpu_has_fast_bf16
from burnish.kernels.forest import Forest

_KEEP = 256
"""Probabilities of tiles with up to so many keys are kept for the backward pass."""

_BLOCK = 128
"""Queries in a tile where products are bf16."""

_BLOCK_WIDE = 64
"""The same in full precision, where arithmetic costs more than calls."""

_SHARED = 64
"""Neighbouring segments that are together no longer share a tile."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries in a row, and the keys they may see: a prefix that is common to all of them, then the queries' own tokens.

    The queries are one piece of a segment, or several whole segments that continue the same parent.
    """

    queries: slice
    keys: tuple[slice, ...]
    pieces: tuple[int, ...]
    prefix: int

    @property
    def size(self) -> int:
        """Queries."""
        return self.queries.stop - self.queries.start

    @property
    def width(self) -> int:
        """Keys."""
        return self.prefix + self.size

    def mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[size, M] of like's type: minus infinity where a query may not see one of the last M keys, else 0. All others are seen.

        Added, not filled in: a broadcast `masked_fill_` is four times slower.
        """
        size = self.size
        if len(self.pieces) == 1 and (window is None or window >= self.width):
            return like.new_full((size, size), -math.inf).triu_(1)
        place = torch.cat([torch.arange(length) for length in self.pieces])
        piece = torch.arange(len(self.pieces)).repeat_interleave(torch.tensor(self.pieces))
        distance = place[:, None] - place
        hidden = (distance < 0) | (piece[:, None] != piece)
        if window is not None:
            before = self.prefix + place[:, None] - torch.arange(self.prefix)
            hidden = torch.cat((before >= window, hidden | (distance >= window)), dim=1)
        return like.new_zeros(hidden.shape).masked_fill_(hidden.to(like.device), -math.inf)


@lru_cache(maxsize=16)
def tiles(forest: Forest, window: int | None, block: int) -> tuple[Tile, ...]:
    """The tiles of all segments, in order."""
    return tuple(tile for group in _siblings(forest, min(block, _SHARED)) for tile in _cut(forest, group, window, block))


def _siblings(forest: Forest, block: int) -> Iterator[range]:
    """Neighbouring segments that continue the same parent and are together no longer than `block`; or one segment."""
    first, total = 0, 0
    for i, length in enumerate(forest.lengths):
        if i > first and (forest.parents[i] != forest.parents[first] or total + length > block):
            yield range(first, i)
            first, total = i, 0
        total += length
    if forest.lengths:
        yield range(first, len(forest.lengths))


def _cut(forest: Forest, group: range, window: int | None, block: int) -> Iterator[Tile]:
    """The tiles of one group: equal blocks of a segment, or all of a few short ones."""
    start, stop = forest.rows(group[0]).start, forest.rows(group[-1]).stop
    ancestors = [forest.rows(link) for link in forest.chain(group[0])[:-1]]
    size = -(-(stop - start) // -(-(stop - start) // block))
    for first in range(start, stop, size):
        last = min(first + size, stop)
        before = sum(rows.stop - rows.start for rows in ancestors) + first - start
        prefix = before if window is None else min(before, window - 1)
        pieces = (last - first,) if len(group) == 1 else tuple(forest.lengths[i] for i in group)
        yield Tile(slice(first, last), _last((*ancestors, slice(start, last)), prefix + last - first), pieces, prefix)


def _last(rows: tuple[slice, ...], count: int) -> tuple[slice, ...]:
    """The last `count` tokens of rows in a row; neighbours are joined."""
    kept: list[slice] = []
    for part in reversed(rows):
        taken = min(count, part.stop - part.start)
        count -= taken
        if taken and kept and part.stop == kept[0].start:
            kept[0] = slice(part.stop - taken, kept[0].stop)
        elif taken:
            kept.insert(0, slice(part.stop - taken, part.stop))
    return tuple(kept)


@dataclass(frozen=True, slots=True)
class _Options:
    forest: Forest
    scale: float
    window: int | None
    softcap: float | None
    wide: torch.dtype  # of scores and sums
    compute: torch.dtype  # of the other products' inputs
    block: int
    keep: int


def gemm_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forest: Forest,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    block: int | None = None,
    keep: int = _KEEP,
) -> torch.Tensor:
    """Attention over a forest in tiles of matrix products; arguments and result as those of `attention.forest_attention`.

    Args:
        q: [1, Hq, T, D].
        k: [1, Hkv, T, D].
        v: [1, Hkv, T, D'].
        forest: The segments of the T tokens.
        scaling: Factor on q k^T; default 1 / sqrt(D).
        window: Tokens that a token sees, itself included.
        softcap: Cap of the scores.
        sinks: [Hq] scores of the sinks.
        block: Queries in a tile. Default: by type.
        keep: Probabilities of tiles with up to so many keys are kept for the backward pass; the others are computed again.

    Returns:
        [1, Hq, T, D'], laid out so that `.transpose(1, 2)` is contiguous.
    """
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    compute = torch.bfloat16 if q.dtype is torch.bfloat16 and cpu_has_fast_bf16() else wide
    options = _Options(
        forest=forest,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=softcap,
        wide=wide,
        compute=compute,
        block=block or (_BLOCK_WIDE if compute is wide else _BLOCK),
        keep=keep,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        return cast("torch.Tensor", _GemmAttention.apply(q, k, v, sinks, options))  # pyright: ignore[reportUnknownMemberType]
    return _forward(q, k, v, sinks, options, kept=None)[0]


class _GemmAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, options: _Options) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        output, sigma = _forward(q, k, v, sinks, options, kept)
        ctx.save_for_backward(q, k, v, sinks, output, sigma, *kept)
        ctx.options = options
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, output, sigma, *kept = ctx.saved_tensors
        return (*_backward(grads[0], q, k, v, sinks, output, sigma, kept, ctx.options), None)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, options: _Options, kept: list[torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output [1, Hq, T, D'], and with sinks sigma [Hkv, T G]. Fills `kept` with probabilities, in the order of the tiles."""
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        scores = _Scores(q, k, sinks, options)
        values = v[0].to(options.compute).contiguous()
        found = values.new_empty(heads, q.shape[2] * groups, v.shape[3])
        for tile in tiles(options.forest, options.window, options.block):
            p = scores.probabilities(tile)
            if kept is not None and _keeps(tile, options):
                kept.append(p.to(torch.float16 if options.compute is torch.bfloat16 else options.wide, copy=True))
            rows = slice(tile.queries.start * groups, tile.queries.stop * groups)
            torch.bmm(p.to(options.compute), _gather(values, tile.keys), out=found[:, rows])
        return _heads(found, q.shape[1], q.dtype), scores.sigma


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
    sigma: torch.Tensor | None,
    kept: list[torch.Tensor],
    options: _Options,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of q, k, v and the sinks."""
    heads, groups, compute = k.shape[1], q.shape[1] // k.shape[1], options.compute
    with torch.autocast(q.device.type, enabled=False):
        extra = 0 if compute is options.wide else 2
        above, values = _rows(grad, heads, compute, extra), _rows(v, heads, compute, extra)
        delta = None
        if extra or sinks is not None:
            delta = _rows(grad, heads, options.wide).mul_(_rows(output, heads, output.dtype)).sum(-1)
        if extra and delta is not None:
            _split(delta, above[..., -extra:])
            values[..., -extra:] = -1
        queries, keys = _rows(q, heads, compute), k[0].to(compute).contiguous()
        dq = torch.empty_like(queries)
        dk, dv = (torch.zeros(x.shape[1:], dtype=options.wide, device=x.device) for x in (k, v))
        scores = _Scores(q, k, sinks, options)
        ready = iter(kept)
        for tile in tiles(options.forest, options.window, options.block):
            rows = slice(tile.queries.start * groups, tile.queries.stop * groups)
            p = next(ready) if _keeps(tile, options) else scores.probabilities(tile)
            p = p.to(options.wide)
            ds = torch.bmm(above[:, rows], _gather(values, tile.keys).transpose(1, 2))
            ds = ds.mul_(p) if extra else torch.ops.aten._softmax_backward_data(ds, p, -1, ds.dtype)
            if scores.slope is not None:
                ds.mul_(scores.slope)
            p = p.to(compute)
            dq[:, rows] = _scaled(ds, _gather(keys, tile.keys), options.scale)
            _scatter(dk, tile.keys, _scaled(ds.transpose(1, 2), queries[:, rows], options.scale))
            _scatter(dv, tile.keys, torch.bmm(p.transpose(1, 2), above[:, rows, : v.shape[3]]))
        dsinks = None
        if sinks is not None and sigma is not None and delta is not None:
            dsinks = (sigma - 1).mul_(delta).view(heads, -1, groups).sum(1).view_as(sinks).to(sinks.dtype)
        return _heads(dq, q.shape[1], q.dtype), dk.to(k.dtype)[None], dv.to(v.dtype)[None], dsinks


class _Scores:
    """Turns tiles into probabilities, in two buffers that all tiles of a call share."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None, options: _Options) -> None:
        self._options, self._groups = options, q.shape[1] // k.shape[1]
        self._queries: torch.Tensor | None = None
        self._q, self._k, self._heads = q, k, k.shape[1]
        self._sinks = None if sinks is None else sinks.to(options.wide).view(k.shape[1], 1, -1)
        self.sigma = None if sinks is None else q.new_empty(k.shape[1], q.shape[2] * self._groups, dtype=options.wide)
        self.slope: torch.Tensor | None = None  # of the soft cap, for the tile last asked for

    def probabilities(self, tile: Tile) -> torch.Tensor:
        """[Hkv, B G, Tk] in the wide type, valid until the next call."""
        if self._queries is None:  # not before it is needed: with all probabilities kept, it never is
            self._prepare()
        assert self._queries is not None
        options, groups = self._options, self._groups
        rows = slice(tile.queries.start * groups, tile.queries.stop * groups)
        shape = (self._heads, rows.stop - rows.start, tile.width)
        s, p = (buffer[: math.prod(shape)].view(shape) for buffer in self._buffers)
        scale = options.scale if options.softcap is None else options.scale / options.softcap
        s.baddbmm_(self._queries[:, rows], _gather(self._keys, tile.keys).transpose(1, 2), beta=0, alpha=scale)
        if options.softcap is not None:
            self.slope = 1 - s.tanh_().square()
            s.mul_(options.softcap)
        by_head = s.view(self._heads, tile.size, groups, tile.width)
        mask = tile.mask(options.window, s)
        by_head[..., tile.width - mask.shape[1] :].add_(mask[:, None])
        torch.softmax(s, -1, out=p)
        if self._sinks is not None and self.sigma is not None:
            sigma = torch.logsumexp(by_head, -1).sub_(self._sinks).sigmoid_()
            p.view_as(by_head).mul_(sigma[..., None])
            self.sigma[:, rows] = sigma.flatten(1)
        return p

    def _prepare(self) -> None:
        options = self._options
        self._queries = _rows(self._q, self._heads, options.wide)
        self._keys = self._k[0].to(options.wide).contiguous()
        largest = max((t.size * t.width for t in tiles(options.forest, options.window, options.block)), default=0)
        self._buffers = [self._keys.new_empty(self._q.shape[1] * largest) for _ in range(2)]


def _keeps(tile: Tile, options: _Options) -> bool:
    # A soft cap's slope would have to be kept too.
    return tile.width <= options.keep and options.softcap is None


def _rows(x: torch.Tensor, heads: int, dtype: torch.dtype, extra: int = 0) -> torch.Tensor:
    """[1, H, T, D] -> [heads, T G, D + extra], the heads of a group beside each other; the extra columns are the caller's to fill."""
    _, all_heads, total, size = x.shape
    groups = all_heads // heads
    rows = torch.empty(heads, total, groups, size + extra, dtype=dtype, device=x.device)
    rows[..., :size].copy_(x[0].view(heads, groups, total, size).transpose(1, 2))
    return rows.view(heads, total * groups, size + extra)


def _heads(rows: torch.Tensor, all_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """[Hkv, T G, D] -> [1, Hq, T, D], stored as [T, Hq, D]."""
    heads, _, size = rows.shape
    groups = all_heads // heads
    out = torch.empty(rows.shape[1] // groups, all_heads, size, dtype=dtype, device=rows.device)
    out.view(-1, heads, groups, size).copy_(rows.view(heads, -1, groups, size).transpose(0, 1))
    return out.transpose(0, 1)[None]


def _split(x: torch.Tensor, columns: torch.Tensor) -> None:
    """Writes x [...] as the sum of the columns [..., 2], each rounded to their type."""
    columns[..., 0] = x
    columns[..., 1] = x - columns[..., 0]


def _gather(x: torch.Tensor, keys: tuple[slice, ...]) -> torch.Tensor:
    return x[:, keys[0]] if len(keys) == 1 else torch.cat([x[:, rows] for rows in keys], dim=1)


def _scatter(total: torch.Tensor, keys: tuple[slice, ...], part: torch.Tensor) -> None:
    start = 0
    for rows in keys:
        stop = start + rows.stop - rows.start
        total[:, rows] += part[:, start:stop]
        start = stop


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The product a @ b times scale, scaled before it is rounded."""
    return torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype, device=a.device).baddbmm_(a, b, beta=0, alpha=scale)
