"""What the tests of judged answers share: batches laid out by hand, and a policy that is a table."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from burnish.data.types import Batch
from burnish.kernels.linear_ce import TokenStats


def judged(examples, *, labels=None, weights=None, step_weight=None, reference=None) -> Batch:
    """A batch of judged answers. Each example is a prompt and one or two answers (the second one mismatched), as lists of tokens."""
    labels = [1.0] * len(examples) if labels is None else [float(label) for label in labels]
    weights = [1.0] * len(examples) if weights is None else weights
    ids, positions, ends, parents, rows, targets, counts, segments, lasts = [], [], [], [], [], [], [], [], []
    for prompt, *answers in examples:
        root = len(ends)
        ids += prompt
        positions += range(len(prompt))
        ends.append(len(ids))
        parents.append(-1)
        before = len(ids) - 1
        for answer in answers:
            start = len(ids)
            rows += [before, *range(start, start + len(answer) - 1)]
            targets += answer
            ids += answer
            positions += range(len(prompt), len(prompt) + len(answer))
            segments.append(len(ends))
            ends.append(len(ids))
            parents.append(root)
            counts.append(len(answer))
            lasts.append(len(ids) - 1)
    extras = {
        "lengths": torch.tensor(counts),
        "ends": torch.tensor(lasts),
        "values": torch.tensor(labels),
        "weights": torch.tensor(weights),
    }
    if reference is not None:
        extras["reference"] = torch.as_tensor(reference)
    return Batch(
        input_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        doc_ends=tuple(ends),
        parents=tuple(parents),
        rows=torch.tensor(rows),
        targets=torch.tensor(targets),
        token_weights=torch.ones(len(rows)),
        weight=float(sum(weights)),
        step_weight=float(sum(weights)) if step_weight is None else step_weight,
        examples=len(examples),
        branches=tuple(counts),
        branch_segments=tuple(segments),
        values=tuple(labels),
        extras=extras,
    )


class Table:
    """A policy whose log-probability of a token is written in a table, and its reference in another; `asked` records who computed what."""

    def __init__(self, policy, reference):
        self.policy = torch.as_tensor(policy, dtype=torch.float64).clone().requires_grad_()
        self.own_reference = torch.as_tensor(reference, dtype=torch.float64)
        self.asked = []
        self._refer = False

    def token_stats(self, batch, *, want=frozenset()):
        self.asked.append(("reference" if self._refer else "policy", len(batch.branches), batch.input_ids.shape[0]))
        return TokenStats((self.own_reference if self._refer else self.policy).index_select(0, batch.targets))

    @contextmanager
    def reference(self):
        self._refer = True
        with torch.no_grad():
            yield
        self._refer = False
