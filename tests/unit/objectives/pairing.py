"""What the tests of preference pairs share: steps laid out by hand, policies that are tables, and TRL's numbers."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.config.objectives import BUILT_IN
from burnish.data.types import Batch
from burnish.kernels.linear_ce import TokenStats

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_preference.json").read_text())
LENGTHS = [(3, 5), (4, 4), (6, 2), (1, 3), (5, 1)]
"""Tokens of the chosen and of the rejected answer of each pair."""


class Table:
    """A policy whose log-probability of each token is written in a table, and its reference in another; `asked` records who answered."""

    def __init__(self, policy, reference=None, log_sum_sq=None):
        self.policy = policy.detach().clone().requires_grad_()
        self.own_reference, self.log_sum_sq = reference, log_sum_sq
        self.asked = []
        self._refer = False

    def token_stats(self, batch, *, want=frozenset()):
        self.asked.append("reference" if self._refer else "policy")
        table = self.own_reference if self._refer else self.policy
        stats = TokenStats(table.index_select(0, batch.targets))
        if "log_sum_sq" in want:
            stats.log_sum_sq = self.log_sum_sq.index_select(0, batch.targets)
        return stats

    @contextmanager
    def reference(self):
        self._refer = True
        with torch.no_grad():
            yield
        self._refer = False


def table(lengths=LENGTHS, dtype=torch.float64, seed=0):
    """A policy over all tokens of `lengths`."""
    count = sum(map(sum, lengths))
    generator = torch.Generator().manual_seed(seed)
    policy = -0.1 - 2 * torch.rand(count, generator=generator, dtype=torch.float64)
    reference = policy + 0.5 * torch.randn(count, generator=generator, dtype=torch.float64)
    log_sum_sq = -2 * torch.rand(count, generator=generator, dtype=torch.float64)
    return Table(policy.to(dtype), reference.to(dtype), log_sum_sq.to(dtype))


def step(lengths=LENGTHS, cut=None, *, order=None, weights=None, token_weights=None):
    """The micro-batches of one step: token i of all answers, one after another, is number i of the table.

    `cut` says how many pairs each micro-batch has, `order` in which order the pairs come.
    """
    order = range(len(lengths)) if order is None else order
    weights = [1.0] * len(lengths) if weights is None else weights
    counts = [sum(pair) for pair in lengths]
    starts = [sum(counts[:pair]) for pair in range(len(lengths))]
    token_weights = torch.ones(sum(counts)) if token_weights is None else torch.tensor(token_weights)
    chosen_tokens = sum(float(token_weights[start : start + pair[0]].sum()) for start, pair in zip(starts, lengths, strict=True))
    batches, order = [], list(order)
    for size in cut or [len(lengths)]:
        pairs, order = order[:size], order[size:]
        tokens = torch.tensor([token for pair in pairs for token in range(starts[pair], starts[pair] + counts[pair])], dtype=torch.int64)
        branches = tuple(length for pair in pairs for length in lengths[pair])
        batches.append(
            Batch(
                input_ids=torch.zeros(len(tokens), dtype=torch.int64),
                positions=torch.arange(len(tokens)),
                doc_ends=(len(tokens),),
                parents=(-1,),
                rows=tokens,
                targets=tokens,
                token_weights=token_weights[tokens],
                weight=float(sum(weights[pair] for pair in pairs)),
                step_weight=float(sum(weights)),
                step_tokens=chosen_tokens,
                examples=len(pairs),
                branches=branches,
                extras={
                    "lengths": torch.tensor(branches, dtype=torch.int64),
                    "weights": torch.tensor([weights[pair] for pair in pairs]),
                    "values": torch.zeros(len(pairs)),
                },
            )
        )
    return batches


def alone(values):
    """Totals of one rank."""
    return dict(values)


def run(objective, policy, batches, totals=alone):
    """Mean loss of a step and its gradient with regard to the table, as the engine would have it, and the summed metrics."""
    policy.policy.grad = None
    if hasattr(objective, "begin_step"):
        objective.begin_step(policy, batches, totals)
    value, metrics = 0.0, {}
    for batch in batches:
        loss = objective(policy, batch)
        (loss.sum / batch.step_weight).backward()
        value += loss.sum.item() / batch.step_weight
        for name, (amount, count) in loss.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + amount.item(), before[1] + count)
    return value, policy.policy.grad.clone(), metrics


def same(found, expected, **tolerance):
    """Asserts that two results of `run` agree."""
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), **tolerance)
    torch.testing.assert_close(found[1], expected[1], **tolerance)
    assert found[2].keys() == expected[2].keys()
    for name in found[2]:
        torch.testing.assert_close(torch.tensor(found[2][name]), torch.tensor(expected[2][name]), **tolerance)


def assert_nothing_waits(objective):
    """Runs the loss and its gradient on fake tensors, which have no values: reading one raises."""
    (batch,) = step()
    with FakeTensorMode() as mode:
        moved = {name: mode.from_tensor(getattr(batch, name)) for name in ("targets", "token_weights")}
        fake = replace(batch, **moved, extras={name: mode.from_tensor(x) for name, x in batch.extras.items()})
        loss = objective(Table(*torch.empty(3, len(batch.targets)).unbind()), fake)
        loss.sum.backward()
    assert loss.sum.shape == ()


class Ranks:
    """Several ranks as threads: `totals` adds (sum, count) pairs over them, and waits for all."""

    def __init__(self, count):
        self._barrier = threading.Barrier(count, timeout=20)
        self._given = {}

    def totals(self, rank):
        def add(values):
            self._given[rank] = dict(values)
            self._barrier.wait()
            total = {}
            for number in sorted(self._given):
                for key, (amount, count) in self._given[number].items():
                    before = total.get(key, (0.0, 0.0))
                    total[key] = (before[0] + amount, before[1] + count)
            self._barrier.wait()
            return total

        return add


def golden_cases(kind):
    """TRL's cases of one objective."""
    return [case for case in GOLDEN["cases"] if case["objective"]["kind"] == kind]


def golden_run(case, build):
    """Ours on TRL's numbers, in fp32: (loss, gradient), and theirs."""
    flat = {name: torch.tensor([x for row in GOLDEN[name] for x in row]) for name in ("policy", "reference", "log_sum_sq")}
    counts = [len(row) for row in GOLDEN["policy"]]
    lengths = list(zip(counts[0::2], counts[1::2], strict=True))
    settings = dict(case["objective"])
    objective = build(BUILT_IN[settings["kind"]].model_validate(settings))
    value, gradient, _ = run(objective, Table(flat["policy"], flat["reference"], flat["log_sum_sq"]), step(lengths))
    theirs = torch.tensor([x for row in case["gradient"] for x in row])
    return (torch.tensor(value), gradient), (torch.tensor(case["loss"]), theirs)
