"""DPO by hand, against TRL, and however a step is cut."""

from __future__ import annotations

import math
import threading
from typing import get_args

import pytest
import torch

from burnish.config.objectives import DPO, DPOLoss
from burnish.core.errors import TrainingError
from burnish.objectives.base import StepObjective
from burnish.objectives.dpo import LOSSES, SORTED, DPOObjective, PairScores, build, length_weights, likelihood, score

from .pairing import LENGTHS, Ranks, Table, assert_nothing_waits, golden_cases, golden_run, run, same, step, table

ALL = get_args(DPOLoss)
BETA = 0.4
CHOSEN, REJECTED = [0.7, -1.2, 2.5], [-0.4, 0.9, 1.5]  # log-ratios
MARGIN, REFERENCE = [2.0, -0.5, 1.0], [0.9, 1.6, 0.0]  # log pi(y+) - log pi(y-), and that of the reference: their difference is r+ - r-
TOKENS = [(4, 2), (1, 3), (5, 5)]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def nls(x):
    """Negative log sigmoid."""
    return math.log(1 + math.exp(-x))


def scores(dtype=torch.float64, **changed):
    given = {
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "chosen_score": CHOSEN,
        "rejected_score": REJECTED,
        "chosen_tokens": [a for a, _ in TOKENS],
        "rejected_tokens": [b for _, b in TOKENS],
        "margin": MARGIN,
        "reference_margin": REFERENCE,
        "chosen_nll": [3.0, 4.0, 5.0],
    }
    return PairScores(**{name: torch.as_tensor(value, dtype=dtype) for name, value in (given | changed).items()})


def config(name, **settings):
    smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    return DPO(loss=[name], beta=BETA, **(smoothing | settings))


BY_HAND = {
    "sigmoid": lambda c, r, n, m: nls(BETA * (c - r)),
    "sigmoid_norm": lambda c, r, n, m: nls(BETA * (c / n - r / m)),
    "hinge": lambda c, r, n, m: max(0.0, 1 - BETA * (c - r)),
    "ipo": lambda c, r, n, m: (c / n - r / m - 1 / (2 * BETA)) ** 2,
    "robust": lambda c, r, n, m: (0.9 * nls(BETA * (c - r)) - 0.1 * nls(-BETA * (c - r))) / 0.8,
    "exo_pair": lambda c, r, n, m: sum(p * math.log(p / q) for p, q in ((sigma(BETA * (c - r)), 0.9), (sigma(-BETA * (c - r)), 0.1))),
    "nca_pair": lambda c, r, n, m: nls(BETA * c) + (nls(-BETA * c) + nls(-BETA * r)) / 2,
    "bco_pair": lambda c, r, n, m: nls(BETA * c) + nls(-BETA * r),
    "sppo_hard": lambda c, r, n, m: (c - 1.25) ** 2 + (r + 1.25) ** 2,
    "apo_zero": lambda c, r, n, m: sigma(-BETA * c) + sigma(BETA * r),
    "apo_down": lambda c, r, n, m: sigma(BETA * c) + sigma(-BETA * (c - r)),
    "discopop": lambda c, r, n, m: (
        nls(BETA * (c - r)) * (1 - sigma(BETA * (c - r) / 0.05)) + math.exp(-BETA * (c - r)) * sigma(BETA * (c - r) / 0.05)
    ),
}


@pytest.mark.parametrize("case", golden_cases("dpo"), ids=lambda case: "-".join(str(x) for x in case["objective"].values()))
def test_loss_and_gradient_are_trls(case):
    ours, theirs = golden_run(case, build)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_loss_is_there_and_compared():
    assert set(LOSSES) == set(ALL) == set(BY_HAND) | SORTED | {"sft"}
    assert {name for case in golden_cases("dpo") for name in case["objective"]["loss"]} == set(ALL)


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    expected = [BY_HAND[name](c, r, n, m) for c, r, (n, m) in zip(CHOSEN, REJECTED, TOKENS, strict=True)]
    assert LOSSES[name](scores(), config(name)).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_sorted_ones_by_hand():
    # margins -0.5, 1, 2 meet reference margins 0, 0.9, 1.6; chosen -1.2, 0.7, 2.5 meet rejected -0.4, 0.9, 1.5
    assert LOSSES["aot"](scores(), config("aot")).tolist() == pytest.approx([nls(BETA * d) for d in (-0.5, 0.1, 0.4)])
    assert LOSSES["aot_unpaired"](scores(), config("aot_unpaired")).tolist() == pytest.approx([nls(BETA * d) for d in (-0.8, -0.2, 1.0)])
    smoothed = LOSSES["aot"](scores(), config("aot", label_smoothing=0.2)).tolist()
    assert smoothed == pytest.approx([0.8 * nls(BETA * d) + 0.2 * nls(-BETA * d) for d in (-0.5, 0.1, 0.4)])


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name, divergence):
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED))
    settings = config(name, divergence=divergence)

    def losses(c, r):
        return LOSSES[name](
            scores(
                chosen=c, rejected=r, chosen_score=score(c, settings), rejected_score=score(r, settings), margin=c - r, chosen_nll=c.exp()
            ),
            settings,
        )

    assert torch.autograd.gradcheck(losses, [chosen, rejected])


def test_label_smoothing_is_conservative_dpo():
    found = LOSSES["sigmoid"](scores(), config("sigmoid", label_smoothing=0.2)).tolist()
    assert found == pytest.approx([0.8 * nls(BETA * (c - r)) + 0.2 * nls(-BETA * (c - r)) for c, r in zip(CHOSEN, REJECTED, strict=True)])


def test_robust_dpo_is_unbiased_under_flipped_labels():
    settings = config("robust", label_smoothing=0.3)
    right = LOSSES["robust"](scores(), settings)
    flipped = LOSSES["robust"](scores(chosen_score=REJECTED, rejected_score=CHOSEN), settings)
    torch.testing.assert_close(0.7 * right + 0.3 * flipped, LOSSES["sigmoid"](scores(), config("sigmoid")))


def test_divergences_by_hand():
    ratio = torch.tensor([1.5, -0.7, 0.0], dtype=torch.float64)
    u = [math.exp(x) for x in ratio.tolist()]
    expected = {
        "reverse_kl": [math.log(x) for x in u],
        "forward_kl": [1 - 1 / x for x in u],
        "js": [math.log(2 * x / (1 + x)) for x in u],
        "alpha": [(x ** (0.3 - 1) - 1) / (0.3 - 1) for x in u],
    }
    for name, values in expected.items():
        assert score(ratio, DPO(divergence=name, alpha=0.3)).tolist() == pytest.approx(values, abs=1e-12)
    assert score(ratio, DPO(divergence="alpha", alpha=1.0)).tolist() == ratio.tolist()
    near = score(ratio, DPO(divergence="alpha", alpha=1.0 + 1e-5))
    torch.testing.assert_close(near, ratio, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"divergence": d} for d in ("forward_kl", "js", "alpha")] + [{"divergence": "alpha", "alpha": 3.0}])
@pytest.mark.parametrize("ratio", [-2000.0, 2000.0])
def test_far_from_the_reference_scores_stay_finite(settings, ratio):
    given = torch.tensor([ratio], requires_grad=True)
    found = score(given, DPO(**settings))
    found.sum().backward()
    assert found.isfinite().all()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sppo_hard", "ipo")])
@pytest.mark.parametrize("sign", [-1, 1])
def test_far_from_the_reference_losses_stay_finite(name, sign):
    far = torch.tensor([3000.0 * sign, 0.0, 0.0], requires_grad=True)
    if name == "discopop":
        assert sign < 0 or math.exp(-BETA * 3000) == 0.0
    losses = LOSSES[name](scores(torch.float32, chosen=far, chosen_score=far, margin=far), config(name))
    losses.sum().backward() if losses.requires_grad else None
    assert losses.isfinite().all()
    assert far.grad is None or far.grad.isfinite().all()


def test_sums_over_tokens_are_weighted():
    policy = Table(torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64), torch.tensor([-1.5, -1.0, -0.25], dtype=torch.float64))
    (batch,) = step([(2, 1)], weights=[3.0], token_weights=[1.0, 0.5, 2.0])
    value, gradient, _ = run(build(DPO(beta=0.5)), policy, [batch])
    difference = (0.5 - 0.5) - 2 * (-0.25)  # r+ = 1 x 0.5 + 0.5 x -1, r- = 2 x -0.25
    assert value == pytest.approx(nls(0.5 * difference))
    assert gradient.tolist() == pytest.approx([-0.5 * sigma(-0.5 * difference) * w for w in (1, 0.5, -2)])


def test_several_losses_add_up():
    several = DPO(loss=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5])
    value, gradient, _ = run(build(several), table(), step())
    parts = [run(build(DPO(loss=[name])), table(), step())[:2] for name in several.loss]
    assert value == pytest.approx(sum(w * part[0] for w, part in zip(several.loss_weights, parts, strict=True)))
    torch.testing.assert_close(gradient, sum(w * part[1] for w, part in zip(several.loss_weights, parts, strict=True)))
    assert run(build(DPO(loss=["sigmoid", "sft"])), table(), step())[0] == pytest.approx(parts[0][0] + parts[2][0])


def test_sft_is_the_mean_over_the_steps_chosen_tokens():
    policy = table()
    value, gradient, metrics = run(build(DPO(loss=["sft"])), policy, step(cut=[2, 3]))
    starts = [sum(map(sum, LENGTHS[:pair])) for pair in range(len(LENGTHS))]
    chosen = [start + token for start, (n, _) in zip(starts, LENGTHS, strict=True) for token in range(n)]
    assert value == pytest.approx(-policy.policy[chosen].mean().item())
    assert {round(x, 12) for x in gradient[chosen].tolist()} == {round(-1 / len(chosen), 12)}
    assert policy.asked == ["policy", "policy"]
    assert not build(DPO(loss=["sft"])).needs_reference
    assert "kl" not in metrics


@pytest.mark.parametrize("wpo", [False, True])
def test_weights_of_pairs_do_not_touch_the_mean_over_tokens(wpo):
    settings = DPO(loss=["sft"], wpo=wpo)
    same(run(build(settings), table(), step(weights=[2.0, 0.5, 1.0, 0.0, 1.5])), run(build(DPO(loss=["sft"])), table(), step()))


@pytest.mark.parametrize("settings", [{}, {"wpo": True}])
def test_every_weight_multiplies(settings):
    weights = [2.0, 0.5, 1.0, 0.0, 1.5]
    parts = [run(build(DPO(**settings)), table(), [batch]) for batch in step(cut=[1] * 5)]  # each already divided by the step's 5
    value, gradient, _ = run(build(DPO(**settings)), table(), step(weights=weights))
    assert value == pytest.approx(sum(w * part[0] for w, part in zip(weights, parts, strict=True)))
    torch.testing.assert_close(gradient, sum(w * part[1] for w, part in zip(weights, parts, strict=True)))


def test_length_desensitised_by_hand():
    policy = Table(
        torch.tensor([-1.0, -2.0, -4.0, -0.5], dtype=torch.float64), torch.tensor([-1.5, -1.0, -1.0, -0.25], dtype=torch.float64)
    )
    (batch,) = step([(3, 1)])
    assert length_weights(batch, 0.25).tolist() == [1.0, 0.25, 0.25, 1.0]
    value, gradient, _ = run(build(DPO(beta=0.5, ld_alpha=0.25)), policy, [batch])
    difference = (0.5 - 0.25 - 0.75) - (-0.25)
    assert value == pytest.approx(nls(0.5 * difference))
    assert gradient.tolist() == pytest.approx([-0.5 * sigma(-0.5 * difference) * w for w in (1, 0.25, 0.25, -1)])


def test_length_weights_are_those_of_each_answer():
    (batch,) = step([(1, 3), (2, 2), (4, 2)])
    assert length_weights(batch, 0.5).tolist() == [1, 1, 0.5, 0.5, 1, 1, 1, 1, 1, 1, 0.5, 0.5, 1, 1]
    same(run(build(DPO(ld_alpha=1.0)), table(), step()), run(build(DPO()), table(), step()))


def test_weighted_preference_by_hand():
    policy = Table(
        torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64),
        torch.tensor([-1.5, -1.0, -0.25], dtype=torch.float64),
        torch.tensor([-0.8, -1.2, -0.1], dtype=torch.float64),
    )
    (batch,) = step([(2, 1)], weights=[3.0])
    weight = math.exp((-0.2 - 0.8) / 2) * math.exp(-0.4)
    assert likelihood(policy.policy.detach() - policy.log_sum_sq, batch).tolist() == pytest.approx([weight])
    value, gradient, _ = run(build(DPO(beta=0.5, wpo=True)), policy, [batch])
    plain, plain_gradient, _ = run(build(DPO(beta=0.5)), policy, [batch])
    assert value == pytest.approx(weight * plain)
    torch.testing.assert_close(gradient, weight * plain_gradient)  # no gradient through the weight


CUTS = [[2, 3], [1, 1, 1, 1, 1], [4, 1]]
OPTIONS = [{}, {"ld_alpha": 0.3}, {"wpo": True}, {"divergence": "js"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_cut_into_micro_batches_does_not_matter(name, options):
    if name in SORTED and "wpo" in options:
        return
    settings = config(name, **options)
    weights = [2.0, 0.5, 1.0, 1.25, 1.5]
    whole = run(build(settings), table(), step(weights=weights))
    for cut in CUTS:
        same(run(build(settings), table(), step(cut=cut, weights=weights, order=[3, 1, 4, 0, 2])), whole)


@pytest.mark.parametrize("name", sorted(SORTED))
def test_a_step_in_pieces_is_the_sort_over_the_whole_step(name):
    settings, policy = config(name, label_smoothing=0.1), table()
    answers = torch.cat([batch.extras["lengths"] for batch in step()]).tolist()
    sums = [torch.stack([part.sum() for part in column.split(answers)]) for column in (policy.policy, policy.own_reference)]
    ratio = sums[0] - sums[1]
    pairs = scores(
        chosen=ratio[0::2], rejected=ratio[1::2], margin=sums[0][0::2] - sums[0][1::2], reference_margin=sums[1][0::2] - sums[1][1::2]
    )
    expected = LOSSES[name](pairs, settings).mean()
    (gradient,) = torch.autograd.grad(expected, policy.policy)
    for cut in ([5], *CUTS):
        value, found, _ = run(build(settings), policy, step(cut=cut))
        assert value == pytest.approx(expected.item())
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("name", sorted(SORTED))
def test_a_pair_of_weight_two_is_the_pair_twice(name):
    twice = [*LENGTHS, LENGTHS[2]]
    policy, start, size = table(), sum(map(sum, LENGTHS[:2])), sum(LENGTHS[2])
    longer = Table(*(torch.cat([x.detach(), x.detach()[start : start + size]]) for x in (policy.policy, policy.own_reference)))
    weighted = run(build(config(name)), policy, step(cut=[3, 2], weights=[1.0, 1.0, 2.0, 1.0, 1.0]))
    repeated = run(build(config(name)), longer, step(twice, cut=[4, 2]))
    assert weighted[0] == pytest.approx(repeated[0])
    gradient = repeated[1][:-size].clone()
    gradient[start : start + size] += repeated[1][-size:]
    torch.testing.assert_close(weighted[1], gradient)


@pytest.mark.parametrize(("cut", "first"), [([1, 2, 2, 0], 2), ([3, 2], 1)])
@pytest.mark.parametrize("losses", [["aot"], ["aot_unpaired"], ["aot", "sigmoid", "aot_unpaired"]])
def test_ranks_see_each_others_pairs(losses, cut, first):
    settings, weights = DPO(loss=losses, beta=BETA), [1.0, 2.0, 1.0, 0.5, 1.0]
    batches = step(cut=cut, weights=weights)
    whole = run(build(settings), table(), step(weights=weights))
    ranks, found = Ranks(2), {}

    def rank(number):
        found[number] = run(build(settings), table(), [batches[:first], batches[first:]][number], ranks.totals(number))

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0][0] + found[1][0] == pytest.approx(whole[0])
    torch.testing.assert_close(found[0][1] + found[1][1], whole[1])


def test_equal_values_share_their_partners():
    # At the start of training all log-ratios are 0: every order of the pairs must give the same gradient.
    policy = table()
    policy.own_reference = policy.policy.detach().clone()
    value, gradient, _ = run(build(config("aot_unpaired")), policy, step(cut=[2, 3]))
    assert value == pytest.approx(math.log(2))
    signs = [sign for n, m in LENGTHS for sign in [-1.0] * n + [1.0] * m]
    assert gradient.tolist() == pytest.approx([BETA / 2 / 5 * sign for sign in signs])


def test_only_losses_that_sort_begin_a_step():
    for name in ALL:
        assert isinstance(build(config(name)), StepObjective) == (name in SORTED)


def test_how_often_models_are_asked():
    policy = table()
    run(build(DPO()), policy, step(cut=[2, 3]))
    assert policy.asked == ["reference", "policy"] * 2  # the reference first
    policy.asked.clear()
    run(build(config("aot")), policy, step())
    assert policy.asked == ["reference", "policy"]  # one micro-batch is the whole step
    policy.asked.clear()
    run(build(config("aot")), policy, step(cut=[2, 3]))
    assert policy.asked == ["reference", "policy"] * 2 + ["policy"] * 2


def test_a_part_of_a_step_cannot_be_sorted():
    objective, policy = build(config("aot")), table()
    first, second = step(cut=[2, 3])
    with pytest.raises(TrainingError, match="a micro-batch of weight 2 of 5, expected begin_step"):
        objective(policy, first)
    objective.begin_step(policy, [first, second], dict)
    objective(policy, first)
    with pytest.raises(TrainingError, match="begin_step"):
        objective(policy, step(cut=[2, 3])[0])  # another step's


def test_what_sorts_has_no_weights_of_likelihood():
    with pytest.raises(ValueError, match="the loss aot takes apart"):
        build(DPO(loss=["sigmoid", "aot"], wpo=True))


def test_a_reference_that_is_known_is_not_asked():
    policy = table()
    expected = run(build(DPO()), policy, step())
    (batch,) = step()
    batch.extras["reference"] = policy.own_reference[batch.targets]
    policy.asked.clear()
    same(run(build(DPO()), policy, [batch]), expected)
    assert policy.asked == ["policy"]


@pytest.mark.parametrize("name", ["sigmoid", "aot", "sft"])
def test_a_placeholder_is_nothing(name):
    objective, policy = build(config(name)), table()
    batches = step(cut=[5, 0])
    same(run(objective, policy, batches), run(objective, policy, step()))
    loss = objective(policy, batches[1])
    assert (loss.sum.item(), loss.metrics) == (0.0, {})
    assert loss.sum.requires_grad


@pytest.mark.parametrize("name", [name for name in ALL if name not in SORTED])
def test_nothing_waits_for_the_device(name):
    assert_nothing_waits(build(config(name, ld_alpha=0.5, wpo=True)))


def test_metrics():
    policy = table()
    _, _, metrics = run(DPOObjective(DPO(beta=0.3)), policy, step(cut=[2, 3]))
    sums = [[part.sum().item() for part in x.split([n for pair in LENGTHS for n in pair])] for x in (policy.policy, policy.own_reference)]
    rewards = [0.3 * (a - b) for a, b in zip(*sums, strict=True)]
    assert metrics["reward_chosen"] == pytest.approx((sum(rewards[0::2]), 5))
    assert metrics["reward_margin"] == pytest.approx((sum(rewards[0::2]) - sum(rewards[1::2]), 5))
    assert metrics["logp_rejected"] == pytest.approx((sum(sums[0][1::2]), 5))
    assert metrics["kl"] == pytest.approx(((policy.policy - policy.own_reference).square().sum().item() / 2, 34))
    assert "nll" not in metrics
