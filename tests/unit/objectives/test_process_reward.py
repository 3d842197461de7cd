from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F

from burnish.config.objectives import ProcessReward
from burnish.data.types import Batch
from burnish.objectives.process_reward import ProcessRewardObjective, step_loss


class Fixed:
    """A policy whose scores are given."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = scores

    def scores(self, batch: Batch) -> torch.Tensor:
        """[B, 2]."""
        assert len(self._scores) == len(batch.branches)
        return self._scores


def batch(labels: tuple[float, ...], steps: tuple[int, ...]) -> Batch:
    """Solutions with so many steps each, of three tokens a step."""
    count = len(labels)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.zeros(3 * count, dtype=torch.int64),
        positions=torch.arange(3 * count),
        doc_ends=(3 * count,),
        parents=(-1,),
        rows=none,
        targets=none,
        token_weights=torch.zeros(0),
        weight=float(count),
        step_weight=100.0,
        examples=len(steps),
        branches=(3,) * count,
        values=labels,
        extras={
            "lengths": torch.full((count,), 3),
            "ends": torch.arange(count) * 3 + 2,
            "values": torch.tensor(labels),
            "weights": torch.tensor([float(n) for n in steps]),
        },
    )


LOGITS = torch.tensor([[0.0, 0.0], [0.0, log(3)], [log(3), 0.0], [2.0, 2.5]], dtype=torch.float64)


def test_ten_numbers() -> None:
    """Probabilities of being right: 1/2, 3/4, 1/4."""
    labels = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(step_loss(LOGITS[:3], labels), torch.tensor([log(2), log(4 / 3), log(4)], dtype=torch.float64))
    torch.testing.assert_close(step_loss(LOGITS[:3], 1 - labels), torch.tensor([log(2), log(4), log(4 / 3)], dtype=torch.float64))


def test_cross_entropy_over_two_classes() -> None:
    """Class 1 is right, as token classification has it."""
    labels = torch.tensor([1, 0, 0, 1])
    torch.testing.assert_close(step_loss(LOGITS, labels.double()), F.cross_entropy(LOGITS, labels, reduction="none"))


def test_label_between_is_a_probability() -> None:
    labels = torch.tensor([0.5, 0.25, 0.9, 0.1], dtype=torch.float64)
    expected = F.cross_entropy(LOGITS, torch.stack([1 - labels, labels], dim=-1), reduction="none")
    torch.testing.assert_close(step_loss(LOGITS, labels), expected)


def test_gradients() -> None:
    logits = LOGITS.clone().requires_grad_()
    labels = torch.tensor([1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: step_loss(z, labels), (logits,))


def test_mean_over_steps_is_the_mean_over_all_labels() -> None:
    """Two solutions, of three steps and of one: each step counts the same."""
    labels = (1.0, 0.0, 0.0, 1.0)
    made = ProcessRewardObjective(ProcessReward())(Fixed(LOGITS.clone().requires_grad_()), batch(labels, (3, 1)))
    expected = F.cross_entropy(LOGITS, torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(made.sum.detach() / batch(labels, (3, 1)).weight, expected)
    assert made.sum.requires_grad


def test_metrics() -> None:
    """Right, wrong said to be right, wrong, right: three of four; a tie counts as wrong."""
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], requires_grad=True)
    made = ProcessRewardObjective(ProcessReward())(Fixed(logits), batch((1.0, 0.0, 0.0, 1.0, 1.0), (2, 3)))
    found = {name: (float(total), count) for name, (total, count) in made.metrics.items()}
    assert found == {"accuracy": (3.0, 5.0), "accuracy_right": (2.0, 3.0), "accuracy_wrong": (1.0, 2.0)}
    assert not any(total.requires_grad for total, _ in made.metrics.values())


@pytest.mark.parametrize(("labels", "absent"), [((1.0, 1.0), "accuracy_wrong"), ((0.0, 0.0), "accuracy_right")])
def test_no_steps_of_a_kind_say_nothing_about_it(labels: tuple[float, ...], absent: str) -> None:
    made = ProcessRewardObjective(ProcessReward())(Fixed(torch.zeros(2, 2)), batch(labels, (2,)))
    assert absent not in made.metrics
    assert len(made.metrics) == 2


def test_it_asks_for_a_score_head_and_no_reference() -> None:
    assert ProcessReward.judges == "steps"
    assert not ProcessRewardObjective.needs_reference
