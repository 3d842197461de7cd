"""CPO by hand, against TRL, and however a step is cut."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from burnish.config.objectives import CPO
from burnish.objectives.cpo import LOSSES, build

from .pairing import Table, assert_nothing_waits, golden_cases, golden_run, run, same, step, table

VARIANTS = [{}, {"loss": "hinge"}, {"loss": "ipo", "sft_weight": 0.0}, {"label_smoothing": 0.1, "sft_weight": 0.5}]


def nls(x):
    return math.log(1 + math.exp(-x))


@pytest.mark.parametrize("case", golden_cases("cpo"), ids=lambda case: str(case["objective"]))
def test_loss_and_gradient_are_trls(case):
    ours, theirs = golden_run(case, build)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_by_hand():
    difference, given = torch.tensor([1.5, -4.0, 9.0], dtype=torch.float64), [1.5, -4.0, 9.0]
    assert LOSSES["sigmoid"](difference, CPO(beta=0.2)).tolist() == pytest.approx([nls(0.2 * d) for d in given])
    smoothed = LOSSES["sigmoid"](difference, CPO(beta=0.2, label_smoothing=0.3)).tolist()
    assert smoothed == pytest.approx([0.7 * nls(0.2 * d) + 0.3 * nls(-0.2 * d) for d in given])
    assert LOSSES["hinge"](difference, CPO(beta=0.2)).tolist() == pytest.approx([0.7, 1.8, 0.0])
    assert LOSSES["ipo"](difference, CPO(beta=0.2)).tolist() == pytest.approx([1.0, 42.25, 42.25])
    assert set(LOSSES) == set(get_args(CPO.model_fields["loss"].annotation))


@pytest.mark.parametrize(("loss", "difference"), [("sigmoid", -2.0 + 1.0), ("hinge", -2.0 + 1.0), ("ipo", -2.0 / 1.5 + 0.5)])
def test_the_objective_by_hand(loss, difference):
    policy = Table(torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64))
    (batch,) = step([(2, 1)], weights=[3.0], token_weights=[1.0, 0.5, 2.0])
    value, _, metrics = run(build(CPO(beta=0.5, loss=loss, sft_weight=0.4)), policy, [batch])
    judged = {"sigmoid": nls(0.5 * difference), "hinge": max(0.0, 1 - 0.5 * difference), "ipo": (difference - 1) ** 2}[loss]
    assert value == pytest.approx(judged + 0.4 * 2.0 / 1.5)  # the mean over the chosen tokens, by their weight
    assert metrics["reward_margin"] == pytest.approx((0.5 * difference, 1))
    assert policy.asked == ["policy"]
    assert not {"nll", "kl"} & metrics.keys()


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradcheck(settings):
    config, (batch,) = CPO(**settings), step([(2, 1), (1, 3)])
    policy = table([(2, 1), (1, 3)])

    def loss(values):
        policy.policy = values
        return build(config)(policy, batch).sum

    assert torch.autograd.gradcheck(loss, [policy.policy.detach().clone().requires_grad_()])


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_cut_into_micro_batches_does_not_matter(settings):
    weights = [2.0, 0.5, 1.0, 1.25, 1.5]
    whole = run(build(CPO(**settings)), table(), step(weights=weights))
    for cut in ([2, 3], [1] * 5, [4, 0, 1]):
        same(run(build(CPO(**settings)), table(), step(cut=cut, weights=weights, order=[3, 1, 4, 0, 2])), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_waits_for_the_device(loss):
    assert_nothing_waits(build(CPO(loss=loss)))
