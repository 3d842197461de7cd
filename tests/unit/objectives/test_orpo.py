"""ORPO by hand, against TRL, near certainty, and however a step is cut."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.config.objectives import ORPO
from burnish.objectives.orpo import build, log_odds, log_one_minus_exp, odds_ratio

from .pairing import Table, assert_nothing_waits, golden_cases, golden_run, run, same, step, table


def nls(x):
    return math.log(1 + math.exp(-x))


def odds(mean):
    p = math.exp(mean)
    return p / (1 - p)


@pytest.mark.parametrize("case", golden_cases("orpo"), ids=lambda case: str(case["objective"]))
def test_loss_and_gradient_are_trls(case):
    ours, theirs = golden_run(case, build)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_by_hand():
    chosen, rejected = torch.tensor([-0.5, -2.0], dtype=torch.float64), torch.tensor([-0.75, -1.0], dtype=torch.float64)
    assert log_odds(chosen).tolist() == pytest.approx([math.log(odds(-0.5)), math.log(odds(-2.0))])
    expected = [nls(math.log(odds(c) / odds(r))) for c, r in ((-0.5, -0.75), (-2.0, -1.0))]
    assert odds_ratio(chosen, rejected).tolist() == pytest.approx(expected)


def test_the_objective_by_hand():
    policy = Table(torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64))
    (batch,) = step([(2, 1)], weights=[3.0], token_weights=[1.0, 0.5, 2.0])
    value, _, metrics = run(build(ORPO(beta=0.3)), policy, [batch])
    ratio = math.log(odds(-2.0 / 1.5) / odds(-0.5))
    assert value == pytest.approx(2.0 / 1.5 + 0.3 * nls(ratio))
    assert metrics["reward_chosen"] == pytest.approx((0.3 * -2.0 / 1.5, 1))
    assert policy.asked == ["policy"]
    assert not {"nll", "kl"} & metrics.keys()


def test_the_cross_entropy_is_a_mean_over_tokens_and_not_over_pairs():
    policy = table()
    value, gradient, _ = run(build(ORPO(beta=0.0)), policy, step(cut=[2, 3]))
    chosen = [*range(3), *range(8, 12), *range(16, 22), 24, *range(28, 33)]
    assert value == pytest.approx(-policy.policy[chosen].mean().item())
    torch.testing.assert_close(gradient[chosen], torch.full((19,), -1 / 19, dtype=torch.float64))
    assert gradient.sum().item() == pytest.approx(-1.0)


@pytest.mark.parametrize("x", [-1e-300, -1e-12, -1e-3, -0.6931, -0.6932, -5.0, -50.0, -1000.0])
def test_log_one_minus_exp_is_exact_everywhere(x):
    given = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    found = log_one_minus_exp(given)
    found.backward()
    expected = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert found.item() == pytest.approx(expected, rel=1e-14)
    assert given.grad.item() == pytest.approx(math.exp(x) / math.expm1(x), rel=1e-14)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-9, -30.0), (-30.0, -1e-9), (-1e-3, -1e-4)])
def test_certain_answers_have_a_gradient_that_is_finite_in_the_logits(chosen, rejected):
    means = torch.tensor([chosen, rejected], requires_grad=True)
    loss = odds_ratio(means[:1], means[1:]).sum()
    loss.backward()
    assert loss.isfinite()
    assert means.grad.isfinite().all()
    left = -torch.expm1(means.detach())  # 1 - p: what the gradient of log p with regard to a logit is at most
    assert (means.grad.abs() * left <= 1.001).all()
    assert means.grad[0] <= 0 <= means.grad[1]
    if rejected == 0.0 and chosen < 0:
        assert means.grad[1] > 0  # it is not stuck there


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_gradcheck(beta):
    config, (batch,) = ORPO(beta=beta), step([(2, 1), (1, 3)])
    policy = table([(2, 1), (1, 3)])

    def loss(values):
        policy.policy = values
        return build(config)(policy, batch).sum

    assert torch.autograd.gradcheck(loss, [policy.policy.detach().clone().requires_grad_()])


def test_the_cut_into_micro_batches_does_not_matter():
    weights = [2.0, 0.5, 1.0, 1.25, 1.5]
    whole = run(build(ORPO(beta=0.4)), table(), step(weights=weights))
    for cut in ([2, 3], [1] * 5, [4, 0, 1]):
        same(run(build(ORPO(beta=0.4)), table(), step(cut=cut, weights=weights, order=[3, 1, 4, 0, 2])), whole)


def test_nothing_waits_for_the_device():
    assert_nothing_waits(build(ORPO()))
