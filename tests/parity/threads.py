"""Ranks that are threads, each with a copy of the model: quick enough to ask every family. Their autograd must be that of a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class Meeting:
    """Where threads leave what they have for each other."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=60)
        self.said = [None] * size


class Threads:
    """A group of ranks that are threads: what `models.context` and `models.tensor` ask of one, by the words of their contracts."""

    def __init__(self, meeting, rank, size):
        self.meeting, self.rank, self.size = meeting, rank, size

    def meet(self, what, value):
        self.meeting.said[self.rank] = (what, value)
        self.meeting.barrier.wait()
        said = list(self.meeting.said)
        self.meeting.barrier.wait()
        assert {(name, other.shape) for name, other in said} == {(what, value.shape)}, "ranks must meet in the same order"
        return [other for _, other in said]

    def exchange(self, pieces):
        return Exchange.apply(pieces, self)

    def gather(self, part):
        return Gather.apply(part, self)

    def spread(self, x):
        return Spread.apply(x, self)

    def total(self, x):
        return Total.apply(x, self)


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pieces, group):
        ctx.group = group
        return torch.stack([theirs[group.rank] for theirs in group.meet("exchange", pieces.detach().clone())])

    @staticmethod
    def backward(ctx, gradient):
        return torch.stack([theirs[ctx.group.rank] for theirs in ctx.group.meet("back", gradient.clone())]), None


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        return torch.cat(group.meet("gather", part.detach().clone()))

    @staticmethod
    def backward(ctx, gradient):
        total = torch.stack(ctx.group.meet("scatter", gradient.clone())).sum(0)
        return total.chunk(ctx.group.size)[ctx.group.rank], None


class Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.stack(ctx.group.meet("spread", gradient.clone())).sum(0), None


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return torch.stack(group.meet("total", x.detach().clone())).sum(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def together(size, work):
    """What `work(group)` gives on each of `size` ranks; the first fault of any."""
    meeting = Meeting(size)

    def one(rank):
        try:
            return work(Threads(meeting, rank, size))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    faults = [future.exception() for future in futures if future.exception() is not None]
    for fault in sorted(faults, key=lambda fault: isinstance(fault, threading.BrokenBarrierError)):
        raise fault
    return [future.result() for future in futures]
