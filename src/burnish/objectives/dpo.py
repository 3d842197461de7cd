"""Direct preference optimisation and its relatives.

For a pair, pi is the policy, ref the reference, y+ the chosen answer and y- the rejected one; log pi(y) is a sum over the answer's tokens:

    r+ = log pi(y+) - log ref(y+)        r- = log pi(y-) - log ref(y-)        the log-ratios
    s+, s-                               the scores: the log-ratios, or what the f-divergence makes of them (`score`)
    d  = s+ - s-

beta r is the implicit reward (2305.18290, equation 5). Each loss is one small function below; LOSSES names them. Losses are summed over
pairs, each times its weight; the engine divides by the weight of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from burnish.config.objectives import DPO
from burnish.core.errors import TrainingError
from burnish.data.types import Batch
from burnish.objectives._pairs import Answers, chosen_nll, distance, pair_metrics, smoothed_sigmoid, split
from burnish.objectives.base import Loss, Policy, Totals, branch_sums, reference_logprobs

__all__ = ["LOSSES", "DPOObjective", "PairScores", "build", "score"]


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

    @property
    def difference(self) -> torch.Tensor:
        """D = s+ - s-."""
        return self.chosen_score - self.rejected_score

    @property
    def mean_difference(self) -> torch.Tensor:
        """S+ / |y+| - s- / |y-|: the scores a token."""
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens


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
    blend = torch.sigmoid(z / config.discopop_tau)
    return -F.logsigmoid(z) * (1 - blend) + torch.exp(-z) * blend


def aot(margin: torch.Tensor, reference: torch.Tensor, config: DPO) -> torch.Tensor:
    """AOT: DPO's loss of sorted values, margin [P] against reference [P], smallest with smallest (2406.05882).

    Paired, the margin is log pi(y+) - log pi(y-) and the reference the same of ref; unpaired, it is r+ and the reference r-. Both sorted:
    the preference is then one of first-order stochastic dominance between distributions.
    """
    return smoothed_sigmoid(config.beta * (margin - reference), config.label_smoothing)


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
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
"""The losses of one pair by itself. `aot` and `aot_unpaired` compare pairs with each other, `sft` is `_pairs.chosen_nll`."""


def score(logratio: torch.Tensor, config: DPO) -> torch.Tensor:
    """f'(u) at u = exp(logratio), for the divergence's f (f-DPO, 2309.16240), up to a constant.

    reverse_kl: log u. forward_kl: 1 - 1 / u. js: log(2 u / (1 + u)). alpha: (u^(alpha - 1) - 1) / (alpha - 1), and log u at alpha = 1.
    The power stops at exp(80), the largest that sums in float32 can hold.
    """
    match config.divergence:
        case "reverse_kl":
            return logratio
        case "forward_kl":
            return -torch.expm1(-logratio)
        case "js":
            return math.log(2) + F.logsigmoid(logratio)
        case "alpha":
            power = config.alpha - 1
            return logratio if abs(power) < 1e-6 else torch.expm1((power * logratio).clamp(max=80.0)) / power


class DPOObjective:
    """DPO in all its variants over pairs.

    Metrics: those of `_pairs.pair_metrics`, where the reward is beta times the log-ratio, and `kl`.
    """

    def __init__(self, config: DPO) -> None:
        self.config = config
        self.needs_reference = set(config.loss) != {"sft"}
        self._sorted = [name for name in config.loss if name in ("aot", "aot_unpaired")]
        self._weights = config.loss_weights or [1.0] * len(config.loss)
        self._want = frozenset({"log_sum_sq"} if config.wpo else ())
        self._partners: dict[str, _Partners] = {}

    def begin_step(self, policy: Policy, batches: Sequence[Batch], totals: Totals) -> None:
        """Where values are sorted over the step: one pass without gradients that finds each value's place.

        Raises:
            TrainingError: the step is spread over several processes, each of which sees its own share only.
        """
        if not self._sorted:
            return
        here = float(sum(batch.examples for batch in batches))
        if totals({"pairs": (here, 1.0)})["pairs"][1] > 1:
            raise TrainingError(
                f"the loss {self._sorted[0]} sorts the pairs of a step, which several processes do not see",
                hint="Train on one device, or choose another loss.",
            )
        with torch.no_grad():
            values = [self._values(*self._logprobs(policy, batch)[:2], batch) for batch in batches if batch.examples]
        for name in self._sorted:
            margins, references = zip(*(_sortable(name, pairs) for _, pairs in values), strict=True)
            self._partners[name] = _Partners(torch.cat(margins), torch.cat(references))

    def __call__(self, policy: Policy, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight` counts its pairs."""
        config = self.config
        logprobs, reference, concentration = self._logprobs(policy, batch)
        answers, pairs = self._values(logprobs, reference, batch)
        weights = batch.extras["weights"].to(logprobs.dtype)
        if concentration is not None:
            weights = weights * _likelihood(logprobs.detach() - concentration, batch)
        total = logprobs.sum() * 0
        for name, weight in zip(config.loss, self._weights, strict=True):
            if name == "sft":
                total = total + weight * chosen_nll(answers, batch)
            elif name in self._sorted:
                total = total + weight * self._partner(name, pairs, batch).loss(*_sortable(name, pairs), batch.examples, config)
            else:
                total = total + weight * (weights * LOSSES[name](pairs, config)).sum()
        metrics = pair_metrics(config.beta * pairs.chosen, config.beta * pairs.rejected, answers, batch)
        if self.needs_reference:
            metrics |= distance(logprobs, reference)
        return Loss(total, metrics)

    def _partner(self, name: str, pairs: PairScores, batch: Batch) -> _Partners:
        """The sorted values of the step; those of the micro-batch where it is the whole step."""
        if name in self._partners:
            return self._partners[name]
        if batch.weight != batch.step_weight:
            raise TrainingError(f"the loss {name} sorts the pairs of a whole step, so begin_step must see all its micro-batches first")
        return _Partners(*(values.detach() for values in _sortable(name, pairs)))

    def _logprobs(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Log-probabilities [K] of policy and reference, and what WPO needs."""
        reference = reference_logprobs(policy, batch) if self.needs_reference else None
        stats = policy.token_stats(batch, want=self._want)
        concentration = getattr(stats, "log_sum_sq", None)
        return stats.logprobs, stats.logprobs.detach() if reference is None else reference, concentration

    def _values(self, logprobs: torch.Tensor, reference: torch.Tensor, batch: Batch) -> tuple[Answers, PairScores]:
        """The answers' log-probabilities by the policy, and the pairs' scores."""
        weights = batch.token_weights
        if self.config.ld_alpha is not None:
            weights = weights * _length_weights(batch, self.config.ld_alpha)
        chosen, rejected = split(branch_sums(weights * logprobs, batch))
        chosen_reference, rejected_reference = split(branch_sums(weights * reference, batch))
        chosen_ratio, rejected_ratio = chosen - chosen_reference, rejected - rejected_reference
        answers = Answers.of(logprobs, batch)
        scores = PairScores(
            chosen_ratio,
            rejected_ratio,
            score(chosen_ratio, self.config),
            score(rejected_ratio, self.config),
            answers.chosen_tokens,
            answers.rejected_tokens,
            chosen - rejected,
            chosen_reference - rejected_reference,
        )
        return answers, scores


build = DPOObjective
"""What `objective: dpo` builds."""


class _Partners:
    """The sorted values of a whole step: each value's partner is the one of the same rank on the other side.

    The loss of the step is the sum over ranks k of l(m_(k), ref_(k)). A micro-batch adds the terms of its own margins as they are, with
    the partners held fixed, and for its own reference values their gradient alone: their value is counted with the margins.
    """

    def __init__(self, margins: torch.Tensor, references: torch.Tensor) -> None:
        self._margins, self._margin_order = torch.sort(margins)
        self._references, self._reference_order = torch.sort(references)
        self._margin_ranks = torch.argsort(self._margin_order)
        self._reference_ranks = torch.argsort(self._reference_order)
        self._begun = 0

    def loss(self, margins: torch.Tensor, references: torch.Tensor, count: int, config: DPO) -> torch.Tensor:
        """This micro-batch's share; micro-batches come in the order in which the values were gathered."""
        if self._begun >= len(self._margins):
            self._begun = 0
        part = slice(self._begun, self._begun + count)
        self._begun += count
        own = aot(margins, self._references[self._margin_ranks[part]], config)
        if not references.requires_grad:  # those of the reference
            return own.sum()
        other = aot(self._margins[self._reference_ranks[part]], references, config)
        return own.sum() + (other - other.detach()).sum()


def _sortable(name: str, pairs: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
    """What is sorted: the margin of the policy and of the reference, or the log-ratios of chosen and rejected."""
    return (pairs.chosen, pairs.rejected) if name == "aot_unpaired" else (pairs.margin, pairs.reference_margin)


def _length_weights(batch: Batch, alpha: float) -> torch.Tensor:
    """[K]: 1 for the first tokens of each answer, as many as the shorter has, alpha beyond (LD-DPO, 2409.06411)."""
    lengths = batch.extras["lengths"]
    shorter = torch.minimum(*split(lengths)).repeat_interleave(2)
    starts = lengths.cumsum(0) - lengths
    size = len(batch.targets)
    places = torch.arange(size, device=lengths.device) - torch.repeat_interleave(starts, lengths, output_size=size)
    shared = places < torch.repeat_interleave(shorter, lengths, output_size=size)
    return torch.where(shared, 1.0, alpha)


def _likelihood(aligned: torch.Tensor, batch: Batch) -> torch.Tensor:
    """WPO's weight of each pair [P]: the product of exp(mean over tokens of log p_y - log sum_v p_v^2) of its answers (2406.11827).

    The likelihood of a token is compared with what the policy's own samples have on the average, so that sharp and flat distributions count
    alike.
    """
    lengths = batch.extras["lengths"].to(aligned.dtype).clamp(min=1)
    chosen, rejected = split((branch_sums(aligned, batch) / lengths).exp())
    return chosen * rejected
