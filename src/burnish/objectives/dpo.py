"""Direct preference optimisation and its relatives.

For a pair, pi is the policy, ref the reference, y+ the chosen answer and y- the rejected one; log pi(y) is a sum over the answer's tokens:

    r+ = log pi(y+) - log ref(y+)        r- = log pi(y-) - log ref(y-)        the log-ratios
    s+, s-                               the scores: the log-ratios, or what the f-divergence makes of them (`score`)
    d  = s+ - s-

beta r is the implicit reward (2305.18290, equation 5). Each loss is one small function below; LOSSES names them. Losses are summed over
pairs, each times its weight; the engine divides by the weight of the whole step.

`ld_alpha` a (LD-DPO, 2409.06411): log pi(y) and log ref(y) count the tokens beyond the length of the shorter answer a times.
`wpo` (2406.11827): a pair's loss is multiplied by how likely the policy makes its answers, see `likelihood`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from burnish.config.objectives import DPO
from burnish.core.errors import TrainingError
from burnish.data.types import Batch
from burnish.objectives._pairs import Answers, chosen_nll, distance, pair_metrics, smoothed_sigmoid, split
from burnish.objectives._transport import Matches, match_step, transported
from burnish.objectives.base import Loss, Policy, Totals, branch_sums, reference_logprobs

__all__ = ["LOSSES", "DPOObjective", "PairScores", "build", "length_weights", "likelihood", "score"]

SORTED = frozenset({"aot", "aot_unpaired"})
"""Losses that compare pairs with each other, by rank over the whole step."""


@dataclass(frozen=True, slots=True)
class PairScores:
    """What the losses are functions of; all [P]."""

    chosen: torch.Tensor  # r+
    rejected: torch.Tensor  # r-
    chosen_score: torch.Tensor  # s+
    rejected_score: torch.Tensor  # s-
    chosen_tokens: torch.Tensor  # |y+|
    rejected_tokens: torch.Tensor  # |y-|
    margin: torch.Tensor  # log pi(y+) - log pi(y-)
    reference_margin: torch.Tensor  # the same of ref
    chosen_nll: torch.Tensor  # the pair's share of the cross-entropy on the step's chosen tokens; 0 where no loss asks

    @property
    def difference(self) -> torch.Tensor:
        """The difference of the scores, d."""
        return self.chosen_score - self.rejected_score

    @property
    def mean_difference(self) -> torch.Tensor:
        """The difference of the scores a token, s+ / |y+| - s- / |y-|."""
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens

    def sides(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What a loss of SORTED couples: margins of policy and reference, or log-ratios of chosen and rejected."""
        return (self.margin, self.reference_margin) if name == "aot" else (self.chosen, self.rejected)


def sigmoid(pairs: PairScores, config: DPO) -> torch.Tensor:
    """DPO: -log sigma(beta d) (2305.18290, equation 7).

    With label smoothing e it is cDPO: -(1 - e) log sigma(beta d) - e log sigma(-beta d) (Mitchell, "A note on DPO with noisy preferences").
    """
    return smoothed_sigmoid(config.beta * pairs.difference, config.label_smoothing)


def sigmoid_norm(pairs: PairScores, config: DPO) -> torch.Tensor:
    """Length-normalised DPO: -log sigma(beta (s+ / |y+| - s- / |y-|)) (2411.15124)."""
    return -F.logsigmoid(config.beta * pairs.mean_difference)


def hinge(pairs: PairScores, config: DPO) -> torch.Tensor:
    """SLiC's hinge loss with DPO's margin: max(0, 1 - beta d) (2305.10425; with a reference, 2309.06657)."""
    return torch.relu(1 - config.beta * pairs.difference)


def ipo(pairs: PairScores, config: DPO) -> torch.Tensor:
    """IPO: (s+ / |y+| - s- / |y-| - 1 / (2 beta))^2 (2310.12036, equation 17); scores are means over tokens, beta is the paper's tau."""
    return (pairs.mean_difference - 1 / (2 * config.beta)).square()


def robust(pairs: PairScores, config: DPO) -> torch.Tensor:
    """Robust DPO: [-(1 - e) log sigma(beta d) + e log sigma(-beta d)] / (1 - 2 e) (2403.00409).

    Unbiased where a share e of the labels is the wrong way round.
    """
    z, e = config.beta * pairs.difference, config.label_smoothing
    return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)


def exo_pair(pairs: PairScores, config: DPO) -> torch.Tensor:
    """EXO: KL(p || q) of p = (sigma(beta d), sigma(-beta d)) from q = (1 - e, e) (2402.00856, equation 16)."""
    z, e = config.beta * pairs.difference, config.label_smoothing
    better, worse = F.logsigmoid(z), F.logsigmoid(-z)
    return better.exp() * (better - math.log1p(-e)) + worse.exp() * (worse - math.log(e))


def nca_pair(pairs: PairScores, config: DPO) -> torch.Tensor:
    """NCA: -log sigma(beta r+) - [log sigma(-beta r+) + log sigma(-beta r-)] / 2 (2402.05369, two answers)."""
    chosen, rejected = config.beta * pairs.chosen, config.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: PairScores, config: DPO) -> torch.Tensor:
    """BCO on pairs, without a reward shift: -log sigma(beta r+) - log sigma(-beta r-) (2404.04656)."""
    return -F.logsigmoid(config.beta * pairs.chosen) - F.logsigmoid(-config.beta * pairs.rejected)


def sppo_hard(pairs: PairScores, config: DPO) -> torch.Tensor:
    """SPPO with certain wins: (r+ - 1 / (2 beta))^2 + (r- + 1 / (2 beta))^2 (2405.00675, equation 4.7)."""
    half = 0.5 / config.beta
    return (pairs.chosen - half).square() + (pairs.rejected + half).square()


def apo_zero(pairs: PairScores, config: DPO) -> torch.Tensor:
    """APO-zero, for answers better than the model's own: 1 - sigma(beta r+) + sigma(beta r-) (2408.06266, equation 7)."""
    return 1 - torch.sigmoid(config.beta * pairs.chosen) + torch.sigmoid(config.beta * pairs.rejected)


def apo_down(pairs: PairScores, config: DPO) -> torch.Tensor:
    """APO-down, for answers worse than the model's own: sigma(beta r+) + 1 - sigma(beta (r+ - r-)) (2408.06266, equation 8)."""
    return torch.sigmoid(config.beta * pairs.chosen) + 1 - torch.sigmoid(config.beta * (pairs.chosen - pairs.rejected))


def discopop(pairs: PairScores, config: DPO) -> torch.Tensor:
    """DiscoPOP: a blend (1 - m) (-log sigma(z)) + m exp(-z) of z = beta d, where m = sigma(z / tau) (2406.08414, equation 5)."""
    z = config.beta * pairs.difference
    log_blend = F.logsigmoid(z / config.discopop_tau)
    # exp(-z) m as one exponential: where exp(-z) is beyond all numbers, m is smaller still.
    return -F.logsigmoid(z) * torch.sigmoid(-z / config.discopop_tau) + torch.exp(log_blend - z)


def aot(pairs: PairScores, config: DPO) -> torch.Tensor:
    """AOT on pairs: DPO's loss of sorted margins, those of pi against those of ref, by rank (2406.05882).

    The k-th is -log sigma(beta (sort(m)_k - sort(m_ref)_k)), with label smoothing as in `sigmoid`; `pairs` are those of a whole step. The
    preference is then one of first-order stochastic dominance between distributions, and not of every single pair.
    """
    return _by_rank(pairs.sides("aot"), config)


def aot_unpaired(pairs: PairScores, config: DPO) -> torch.Tensor:
    """AOT on answers: -log sigma(beta (sort(r+)_k - sort(r-)_k)), so that r+ dominates r- (2406.05882)."""
    return _by_rank(pairs.sides("aot_unpaired"), config)


def _by_rank(sides: tuple[torch.Tensor, torch.Tensor], config: DPO) -> torch.Tensor:
    left, right = (torch.sort(values).values for values in sides)
    return dominance(left, right, config)


def dominance(left: torch.Tensor, right: torch.Tensor, config: DPO) -> torch.Tensor:
    """The cost of two values that are coupled, -log sigma(beta (left - right)), with label smoothing."""
    return smoothed_sigmoid(config.beta * (left - right), config.label_smoothing)


def sft(pairs: PairScores, config: DPO) -> torch.Tensor:
    """Cross-entropy on the chosen answers, a mean over the tokens of the step: every token counts the same, whatever its pair weighs."""
    return pairs.chosen_nll


LOSSES: dict[str, Callable[[PairScores, DPO], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
}
"""The losses by the names of `objective.loss`."""


def score(logratio: torch.Tensor, config: DPO) -> torch.Tensor:
    """f'(u) at u = exp(logratio), for the divergence's f (f-DPO, 2309.16240), up to a constant.

    reverse_kl: log u. forward_kl: 1 - 1 / u. js: log(2 u / (1 + u)). alpha: (u^(alpha - 1) - 1) / (alpha - 1), and log u at alpha = 1.
    Powers stop at exp(80), about the largest that sums in float32 can hold.
    """
    match config.divergence:
        case "reverse_kl":
            return logratio
        case "forward_kl":
            return -torch.expm1((-logratio).clamp(max=80.0))
        case "js":
            return math.log(2) + F.logsigmoid(logratio)
        case "alpha":
            power = config.alpha - 1
            return logratio if abs(power) < 1e-6 else torch.expm1((power * logratio).clamp(max=80.0)) / power


@dataclass(frozen=True, slots=True)
class _Begun:
    """What the pass over a whole step found out about one of its micro-batches."""

    batch: Batch  # held, so that no other one gets its identity
    reference: torch.Tensor  # [K]
    matches: dict[str, tuple[Matches, Matches]]


class DPOObjective:
    """DPO in all its variants over pairs.

    Losses that sort over the step (`aot`, `aot_unpaired`) make it a `StepObjective`: `begin_step` computes all log-probabilities once
    without gradients, unless one micro-batch is the whole step. Loss and gradient are then those of the sort over all pairs, however the
    step is cut into micro-batches and ranks; pairs with weights are coupled by mass (see `_transport`).

    Metrics: those of `_pairs.pair_metrics`, where the reward is beta times the log-ratio (beta log pi where nothing needs a reference), and
    `kl` (`_pairs.distance`).

    Raises:
        ValueError: `wpo` weighs pairs, and a loss that sorts takes them apart.
    """

    def __init__(self, config: DPO) -> None:
        self.config = config
        self.needs_reference = set(config.loss) != {"sft"}
        self._sorted = [name for name in dict.fromkeys(config.loss) if name in SORTED]
        if config.wpo and self._sorted:
            raise ValueError(f"wpo weighs pairs, which the loss {self._sorted[0]} takes apart; leave one of them out")
        self._weights = config.loss_weights or [1.0] * len(config.loss)
        self._want = frozenset({"log_sum_sq"} if config.wpo else ())
        self._begun: dict[int, _Begun] = {}  # by identity of the batch
        if self._sorted:  # only then: with it, all micro-batches of a step are on the device at once
            self.begin_step = self._begin_step

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight`, the sum of its pairs' weights, is what it sums over.

        Raises:
            TrainingError: A loss sorts over the step, and `begin_step` has not seen this micro-batch of it.
        """
        config, begun = self.config, self._begun.get(id(batch))
        # The reference first: its activations are gone before the policy's come.
        reference = begun.reference if begun is not None else self._reference(policy, batch)
        stats = policy.token_stats(batch, want=self._want)
        logprobs = stats.logprobs
        if not batch.branches:  # a placeholder of a rank without pairs
            return Loss(logprobs.sum())
        answers, pairs = self._values(logprobs, reference, batch)
        weights = batch.extras["weights"]
        if stats.log_sum_sq is not None:
            weights = weights * likelihood(logprobs.detach() - stats.log_sum_sq, batch)
        matches = self._matches(pairs, batch, begun) if self._sorted else {}
        total = logprobs.new_zeros(())
        for name, share in zip(config.loss, self._weights, strict=True):
            if name in SORTED:
                total = total + share * transported(partial(dominance, config=config), *pairs.sides(name), matches[name])
            else:
                losses = LOSSES[name](pairs, config)
                total = total + share * (losses if name == "sft" else weights * losses).sum()
        metrics = pair_metrics(config.beta * pairs.chosen, config.beta * pairs.rejected, answers, batch)
        if reference is not None:
            metrics |= distance(logprobs, reference)
        return Loss(total, metrics)

    def _begin_step(self, policy: Policy, batches: Sequence[Batch], totals: Totals) -> None:
        """Finds the partner of every value of the step. Every rank makes its passes, for strategies that compute together."""
        self._begun.clear()
        _, ranks = totals({"ranks": (0.0, 1.0)})["ranks"]
        if ranks == 1 and len(batches) == 1:
            return
        references: list[torch.Tensor] = []
        found: list[PairScores] = []
        with torch.no_grad():
            for batch in batches:
                references.append(reference_logprobs(policy, batch))
                logprobs = policy.token_stats(batch).logprobs
                found.append(self._values(logprobs, references[-1], batch)[1])
        weights = [batch.extras["weights"] for batch in batches]
        matches = {name: match_step([pairs.sides(name) for pairs in found], weights, totals) for name in self._sorted}
        for number, (batch, reference) in enumerate(zip(batches, references, strict=True)):
            self._begun[id(batch)] = _Begun(batch, reference, {name: matches[name][number] for name in self._sorted})

    def _matches(self, pairs: PairScores, batch: Batch, begun: _Begun | None) -> dict[str, tuple[Matches, Matches]]:
        """Those that `begin_step` found, or those among the pairs at hand where they are the whole step."""
        if begun is not None:
            return begun.matches
        if not math.isclose(batch.weight, batch.step_weight, rel_tol=1e-6):
            raise TrainingError(
                f"the loss {self._sorted[0]} sorts over all pairs of a step, found a micro-batch of weight {batch.weight:g} of "
                f"{batch.step_weight:g}, expected begin_step to have seen it"
            )
        return {name: match_step([pairs.sides(name)], [batch.extras["weights"]], dict)[0] for name in self._sorted}

    def _reference(self, policy: Policy, batch: Batch) -> torch.Tensor | None:
        return reference_logprobs(policy, batch) if self.needs_reference else None

    def _values(self, logprobs: torch.Tensor, reference: torch.Tensor | None, batch: Batch) -> tuple[Answers, PairScores]:
        """The answers' log-probabilities by the policy, and what the losses are functions of."""
        weights = batch.token_weights
        if self.config.ld_alpha is not None:
            weights = weights * length_weights(batch, self.config.ld_alpha)
        chosen, rejected = split(branch_sums(weights * logprobs, batch))
        if reference is None:
            reference = torch.zeros_like(logprobs)
        chosen_reference, rejected_reference = split(branch_sums(weights * reference, batch))
        chosen_ratio, rejected_ratio = chosen - chosen_reference, rejected - rejected_reference
        answers = Answers.of(logprobs, batch)
        scores = PairScores(
            chosen=chosen_ratio,
            rejected=rejected_ratio,
            chosen_score=score(chosen_ratio, self.config),
            rejected_score=score(rejected_ratio, self.config),
            chosen_tokens=answers.chosen_tokens,
            rejected_tokens=answers.rejected_tokens,
            margin=chosen - rejected,
            reference_margin=chosen_reference - rejected_reference,
            chosen_nll=chosen_nll(answers, batch) if "sft" in self.config.loss else torch.zeros_like(answers.chosen),
        )
        return answers, scores


build = DPOObjective
"""What `objective: dpo` builds."""


def length_weights(batch: Batch, alpha: float) -> torch.Tensor:
    """[K]: 1 for the first tokens of each answer, as many as the shorter has, alpha beyond (LD-DPO, 2409.06411)."""
    lengths = batch.extras["lengths"]
    shorter = torch.minimum(*split(lengths)).repeat_interleave(2)
    starts = lengths.cumsum(0) - lengths
    size = len(batch.targets)
    places = torch.arange(size, device=lengths.device) - torch.repeat_interleave(starts, lengths, output_size=size)
    shared = places < torch.repeat_interleave(shorter, lengths, output_size=size)
    return torch.where(shared, 1.0, alpha)


def likelihood(aligned: torch.Tensor, batch: Batch) -> torch.Tensor:
    """WPO's weight of each pair [P]: the product of exp(mean over tokens of log p_y - log sum_v p_v^2) of its answers (2406.11827).

    The likelihood of a token is compared with what the policy's own samples have on the average, so that sharp and flat distributions count
    alike.
    """
    lengths = batch.extras["lengths"].to(aligned.dtype).clamp(min=1)
    chosen, rejected = split((branch_sums(aligned, batch) / lengths).exp())
    return chosen * rejected
