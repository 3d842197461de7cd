"""SimPO and AlphaPO by hand, against TRL, and however a step is cut."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.config.objectives import SimPO
from burnish.objectives.simpo import build, reward, simpo

from .pairing import Table, assert_nothing_waits, golden_cases, golden_run, run, same, step, table

VARIANTS = [{}, {"alpha": 0.25}, {"alpha": -0.5, "label_smoothing": 0.1}, {"sft_weight": 0.7}]


def nls(x):
    return math.log(1 + math.exp(-x))


@pytest.mark.parametrize("case", golden_cases("simpo"), ids=lambda case: str(case["objective"]))
def test_loss_and_gradient_are_trls(case):
    ours, theirs = golden_run(case, build)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_by_hand():
    chosen, rejected = torch.tensor([-0.5, -2.0], dtype=torch.float64), torch.tensor([-0.75, -1.0], dtype=torch.float64)
    z = [2.0 * 0.25 - 0.8, 2.0 * -1.0 - 0.8]
    assert simpo(chosen, rejected, SimPO(beta=2.0, gamma=0.8)).tolist() == pytest.approx([nls(x) for x in z])
    smoothed = simpo(chosen, rejected, SimPO(beta=2.0, gamma=0.8, label_smoothing=0.3)).tolist()
    assert smoothed == pytest.approx([0.7 * nls(x) + 0.3 * nls(-x) for x in z])


def test_the_reward_of_alphapo():
    mean = torch.tensor([-0.5, -2.0, 0.0], dtype=torch.float64)
    for alpha in (0.25, -0.5, 3.0):
        assert reward(mean, alpha).tolist() == pytest.approx([(1 - math.exp(m) ** -alpha) / alpha for m in mean.tolist()])
    assert reward(mean, 0.0).tolist() == mean.tolist()
    torch.testing.assert_close(reward(mean, 1e-9), mean)


def test_the_objective_by_hand():
    # Means weigh tokens: chosen (-1 + 0.5 x -2) / 1.5, rejected -0.5.
    policy = Table(torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64))
    (batch,) = step([(2, 1)], weights=[3.0], token_weights=[1.0, 0.5, 2.0])
    value, gradient, metrics = run(build(SimPO(beta=2.0, gamma=0.5)), policy, [batch])
    z = 2.0 * (-2.0 / 1.5 + 0.5) - 0.5
    slope = -2.0 / (1 + math.exp(z))
    assert value == pytest.approx(nls(z))
    assert gradient.tolist() == pytest.approx([slope / 1.5, slope * 0.5 / 1.5, -slope])
    assert metrics["reward_chosen"] == pytest.approx((2.0 * -2.0 / 1.5, 1))
    assert metrics["reward_margin"] == pytest.approx((z + 0.5, 1))
    assert metrics["logp_chosen"] == pytest.approx((-2.0, 1))
    assert policy.asked == ["policy"]
    assert not {"nll", "kl"} & metrics.keys()
    with_sft, _, _ = run(build(SimPO(beta=2.0, gamma=0.5, sft_weight=0.4)), policy, [batch])
    assert with_sft == pytest.approx(nls(z) + 0.4 * 2.0 / 1.5)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradcheck(settings):
    config, (batch,) = SimPO(**settings), step([(2, 1), (1, 3)])
    policy = table([(2, 1), (1, 3)])

    def loss(values):
        policy.policy = values
        return build(config)(policy, batch).sum

    assert torch.autograd.gradcheck(loss, [policy.policy.detach().clone().requires_grad_()])


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_cut_into_micro_batches_does_not_matter(settings):
    weights = [2.0, 0.5, 1.0, 1.25, 1.5]
    whole = run(build(SimPO(**settings)), table(), step(weights=weights))
    for cut in ([2, 3], [1] * 5, [4, 0, 1]):
        same(run(build(SimPO(**settings)), table(), step(cut=cut, weights=weights, order=[3, 1, 4, 0, 2])), whole)


def test_nothing_waits_for_the_device():
    assert_nothing_waits(build(SimPO(alpha=0.1, label_smoothing=0.1, sft_weight=1.0)))
