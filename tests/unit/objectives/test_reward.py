from __future__ import annotations

from math import exp, log

import pytest
import torch

from burnish.config.objectives import Reward
from burnish.data.types import Batch
from burnish.objectives.reward import RewardObjective, bradley_terry


class Fixed:
    """A policy whose scores are given."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = scores

    def scores(self, batch: Batch) -> torch.Tensor:
        """[B, 1]."""
        assert len(self._scores) == len(batch.branches)
        return self._scores[:, None]


def batch(
    branches: tuple[int, ...], *, margins: list[float] | None = None, weights: list[float] | None = None, step_weight: float = 10.0
) -> Batch:
    """Pairs of answers of the given lengths. What the tokens are does not matter here."""
    pairs = len(branches) // 2
    margins, weights = margins or [0.0] * pairs, weights or [1.0] * pairs
    total = sum(branches)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.arange(total),
        doc_ends=(total,),
        parents=(-1,),
        rows=none,
        targets=none,
        token_weights=torch.zeros(0),
        weight=sum(weights),
        step_weight=step_weight,
        examples=pairs,
        branches=branches,
        values=tuple(margins),
        extras={
            "lengths": torch.tensor(branches, dtype=torch.int64),
            "ends": torch.tensor(branches, dtype=torch.int64).cumsum(0) - 1,
            "values": torch.tensor(margins),
            "weights": torch.tensor(weights),
        },
    )


def read(metrics: dict[str, tuple[torch.Tensor, float]]) -> dict[str, tuple[float, float]]:
    return {name: (round(float(total), 6), count) for name, (total, count) in metrics.items()}


def test_ten_numbers() -> None:
    """-log sigma(d) is log 2 at 0, log(1 + 1/3) at log 3, and log(1 + e^2) at -2."""
    chosen = torch.tensor([0.0, log(3), 1.0], dtype=torch.float64)
    rejected = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([log(2), log(4 / 3), log(1 + exp(2))], dtype=torch.float64)
    torch.testing.assert_close(bradley_terry(chosen, rejected), expected)


def test_margin_is_asked_for_on_top() -> None:
    chosen, rejected, margin = (torch.tensor([x], dtype=torch.float64) for x in (2.5, 0.5, 2.0))
    assert bradley_terry(chosen, rejected, margin).item() == pytest.approx(log(2))


def test_centering_is_the_square_of_the_sum() -> None:
    chosen, rejected = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)
    added = bradley_terry(chosen, rejected, centering=0.1) - bradley_terry(chosen, rejected)
    torch.testing.assert_close(added, torch.tensor([0.9, 0.0], dtype=torch.float64))


def test_large_differences_stay_finite() -> None:
    chosen, rejected = torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4])
    assert bradley_terry(chosen, rejected).tolist() == [2e4, 0.0]


def test_gradients() -> None:
    """Of the loss: sigma(-d) towards the chosen score, as much away from the rejected one."""
    scores = torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.4, -0.5]], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: bradley_terry(s[0], s[1], margin, 0.01), (scores,))
    bradley_terry(scores[0], scores[1]).sum().backward()
    slope = torch.sigmoid(scores[1] - scores[0]).detach()
    torch.testing.assert_close(scores.grad, torch.stack([-slope, slope]))


@pytest.mark.parametrize("margin", [True, False])
@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_mean_over_pairs_is_the_published_loss(margin: bool, centering: float) -> None:
    """Means of -log sigma(difference - margin) and of the squared sum, written out once more."""
    scores, margins = torch.tensor([1.5, 0.5, -0.25, 0.75, 2.0, 2.0], dtype=torch.float64), [0.5, 0.0, 1.0]
    made = RewardObjective(Reward(centering=centering, margin=margin))(Fixed(scores), batch((3, 2, 4, 4, 2, 5), margins=margins))
    good, bad = scores[0::2], scores[1::2]
    asked = torch.tensor(margins, dtype=torch.float64) * margin
    expected = torch.log1p(torch.exp(bad - good + asked)).mean() + centering * ((good + bad) ** 2).mean()
    torch.testing.assert_close(made.sum / 3, expected)


def test_pairs_count_by_their_weights_and_the_objective_does_not_divide() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0], requires_grad=True)
    lone = [bradley_terry(torch.tensor(1.0), torch.tensor(0.0)).item(), bradley_terry(torch.tensor(0.0), torch.tensor(1.0)).item()]
    for step_weight in (2.0, 50.0):
        made = RewardObjective(Reward())(Fixed(scores), batch((1, 1, 1, 1), weights=[2.0, 0.5], step_weight=step_weight))
        assert made.sum.item() == pytest.approx(2 * lone[0] + 0.5 * lone[1])
    assert made.sum.requires_grad


def test_cut_into_micro_batches_it_is_the_same_sum() -> None:
    scores, branches, margins = torch.randn(8, generator=torch.Generator().manual_seed(0)), (3, 2, 4, 4, 2, 5, 6, 1), [0.5, 0.0, 1.0, 0.25]
    objective = RewardObjective(Reward(centering=0.1))
    whole = objective(Fixed(scores), batch(branches, margins=margins))
    parts = [
        objective(Fixed(scores[2 * a : 2 * b]), batch(branches[2 * a : 2 * b], margins=margins[a:b])) for a, b in ((0, 1), (1, 1), (1, 4))
    ]
    torch.testing.assert_close(sum(part.sum for part in parts), whole.sum)
    for name, (total, count) in whole.metrics.items():
        found = [part.metrics[name] for part in parts if name in part.metrics]
        torch.testing.assert_close(sum(x for x, _ in found), total)
        assert sum(n for _, n in found) == count


def test_metrics() -> None:
    """Four pairs: right and longer, wrong and longer, a tie and shorter, right and of the same length."""
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 0.5, 0.0], requires_grad=True)
    made = RewardObjective(Reward())(Fixed(scores), batch((5, 2, 4, 3, 2, 6, 3, 3)))
    assert read(made.metrics) == {
        "reward_accuracy": (2.5, 4.0),
        "accuracy_longer": (1.0, 2.0),
        "accuracy_shorter": (0.5, 1.0),
        "reward_chosen": (3.5, 4.0),
        "reward_rejected": (5.0, 4.0),
        "reward_margin": (-1.5, 4.0),
    }
    assert not any(total.requires_grad for total, _ in made.metrics.values())


def test_it_asks_for_a_score_head_and_no_reference() -> None:
    assert Reward.judges == "answers"
    assert not RewardObjective.needs_reference
