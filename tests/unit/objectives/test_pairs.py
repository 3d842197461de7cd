"""What all objectives over pairs share: taking pairs apart, and how they are measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from burnish.objectives._pairs import Answers, chosen_nll, distance, pair_metrics, smoothed_sigmoid, split

from .pairing import step


def metrics(chosen, rejected, lengths):
    (batch,) = step(lengths)
    answers = Answers.of(torch.zeros(len(batch.targets)), batch)
    found = pair_metrics(torch.tensor(chosen, requires_grad=True), torch.tensor(rejected), answers, batch)
    assert not any(amount.requires_grad for amount, _ in found.values())
    return {name: (amount.item(), count) for name, (amount, count) in found.items()}


def test_pairs_are_taken_apart():
    chosen, rejected = split(torch.arange(6))
    assert (chosen.tolist(), rejected.tolist()) == ([0, 2, 4], [1, 3, 5])


def test_answers_are_weighted_sums_over_tokens():
    (batch,) = step([(2, 1), (1, 2)], token_weights=[1.0, 0.5, 2.0, 1.0, 0.25, 0.75])
    answers = Answers.of(torch.tensor([-1.0, -2.0, -3.0, -4.0, -8.0, -4.0]), batch)
    assert (answers.chosen.tolist(), answers.rejected.tolist()) == ([-2.0, -4.0], [-6.0, -5.0])
    assert (answers.chosen_tokens.tolist(), answers.rejected_tokens.tolist()) == ([1.5, 1.0], [2.0, 1.0])
    chosen, rejected = answers.means
    assert (chosen.tolist(), rejected.tolist()) == (pytest.approx([-2.0 / 1.5, -4.0]), [-3.0, -5.0])


def test_accuracies_by_length():
    found = metrics([1.0, 0.0, 2.0, 0.5, 3.0], [0.0, 1.0, 2.0, 0.0, 1.0], [(3, 1), (2, 1), (5, 2), (1, 4), (2, 2)])
    assert found["reward_accuracy"] == (3.5, 5.0)  # the third is a tie
    assert found["accuracy_longer"] == (1.5, 3.0)
    assert found["accuracy_shorter"] == (1.0, 1.0)
    assert (found["reward_chosen"], found["reward_rejected"], found["reward_margin"]) == ((6.5, 5.0), (4.0, 5.0), (2.5, 5.0))


@pytest.mark.parametrize(("lengths", "missing"), [([(3, 1)], {"accuracy_shorter"}), ([(1, 2)], {"accuracy_longer"})])
def test_an_accuracy_of_no_pairs_is_left_out(lengths, missing):
    assert {"accuracy_longer", "accuracy_shorter"} - metrics([1.0], [0.0], lengths).keys() == missing
    assert not {"accuracy_longer", "accuracy_shorter", "nll", "kl"} & metrics([1.0], [0.0], [(2, 2)]).keys()


def test_the_distance_is_never_negative():
    policy, reference = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True), torch.tensor([-1.5, -1.0, -3.0])
    amount, count = distance(policy, reference)["kl"]
    assert (amount.item(), count) == (pytest.approx((0.25 + 1.0) / 2), 3.0)
    assert not amount.requires_grad
    assert distance(policy, policy.detach())["kl"][0].item() == 0.0


def test_the_cross_entropy_is_scaled_to_the_step():
    (batch,) = step([(2, 1), (1, 2)], weights=[2.0, 3.0])
    answers = Answers.of(torch.tensor([-1.0, -2.0, -3.0, -4.0, -8.0, -4.0]), batch)
    assert chosen_nll(answers, batch).tolist() == pytest.approx([3.0 * 5 / 3, 4.0 * 5 / 3])  # over the weight 5: the mean of 1, 2 and 4
    with pytest.raises(ValueError, match="found step_tokens=0"):
        chosen_nll(answers, replace(batch, step_tokens=0.0))


def test_smoothing_of_nothing_is_the_plain_loss():
    z = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    plain = torch.nn.functional.softplus(-z)
    torch.testing.assert_close(smoothed_sigmoid(z, 0.0), plain)
    torch.testing.assert_close(smoothed_sigmoid(z, 0.25), 0.75 * plain + 0.25 * torch.nn.functional.softplus(z))
