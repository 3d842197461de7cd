from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.config.objectives import SFT
from burnish.data.types import Batch
from burnish.kernels.linear_ce import stats_from_logits
from burnish.objectives.sft import SFTObjective, sft

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1])
ALL = frozenset({"logsumexp", "mean_logit"})


class Fixed:
    """A policy whose logits are given."""

    def __init__(self, logits):
        self.logits = logits

    def token_stats(self, batch, *, want=frozenset()):
        return stats_from_logits(self.logits, batch.targets, want)


def batch(weights):
    weights = torch.tensor(weights)
    return Batch(
        input_ids=torch.zeros(2, dtype=torch.int64),
        positions=torch.arange(2),
        doc_ends=(2,),
        parents=(-1,),
        rows=torch.tensor([0, 1]),
        targets=TARGETS,
        token_weights=weights,
        weight=float(weights.sum()),
        step_weight=10.0,
    )


def test_ten_numbers():
    losses = sft(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 0.5, 0.0]))
    assert losses.tolist() == [1.0, 1.0, 0.0]


def test_label_smoothing_is_torchs():
    stats = stats_from_logits(LOGITS, TARGETS, ALL)
    ours = sft(stats.logprobs, torch.ones(2), logsumexp=stats.logsumexp, mean_logit=stats.mean_logit, label_smoothing=0.3)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, TARGETS, label_smoothing=0.3, reduction="none"))


def test_z_loss_is_the_squared_log_partition():
    stats = stats_from_logits(LOGITS, TARGETS, ALL)
    ours = sft(stats.logprobs, torch.ones(2), logsumexp=stats.logsumexp, z_loss=0.1)
    plain = F.cross_entropy(LOGITS, TARGETS, reduction="none")
    torch.testing.assert_close(ours, plain + 0.1 * torch.log(LOGITS.exp().sum(-1)) ** 2)


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"z_loss": 0.1}])
def test_missing_statistics_are_named(settings):
    with pytest.raises(ValueError, match="needs logsumexp"):
        sft(torch.zeros(1), torch.ones(1), **settings)


@pytest.mark.parametrize("config", [SFT(), SFT(label_smoothing=0.2), SFT(z_loss=1e-2), SFT(label_smoothing=0.2, z_loss=1e-2)])
def test_objective_sums_and_reports_the_plain_loss(config):
    logits = LOGITS.clone().requires_grad_()
    loss = SFTObjective(config, entropy=True)(Fixed(logits), batch([1.0, 0.5]))
    nll = F.cross_entropy(LOGITS, TARGETS, reduction="none")
    smooth = F.cross_entropy(LOGITS, TARGETS, reduction="none", label_smoothing=config.label_smoothing)
    penalty = config.z_loss * torch.logsumexp(LOGITS, -1) ** 2
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(loss.sum.detach(), ((smooth + penalty) * weights).sum())
    assert loss.sum.requires_grad
    total, weight = loss.metrics["nll"]
    torch.testing.assert_close(total, (nll * weights).sum())
    assert weight == 1.5
    assert not total.requires_grad
    assert (loss.metrics["accuracy"][0].item(), loss.metrics["accuracy"][1]) == (1, 2.0)
    p = torch.softmax(LOGITS, -1)
    torch.testing.assert_close(loss.metrics["entropy"][0], -(p * p.log()).sum())


def test_only_what_is_used_is_asked_for():
    seen = []

    class Spy(Fixed):
        def token_stats(self, batch, *, want=frozenset()):
            seen.append(want)
            return super().token_stats(batch, want=want)

    for config in (SFT(), SFT(z_loss=1.0), SFT(label_smoothing=0.1)):
        SFTObjective(config)(Spy(LOGITS), batch([1.0, 1.0]))
    assert seen == [{"correct"}, {"correct", "logsumexp"}, {"correct", "logsumexp", "mean_logit"}]
