"""From the logits of the next token to one chosen token.

Pure functions over the last dimension, so that one row or a batch of rows can be given. A token that is ruled out gets the logit -inf.
The filters are applied in this order, which is also that of `transformers`, so that the same numbers mean the same thing there:

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> softmax -> draw

With temperature 0 the likeliest token is taken and only the repetition penalty applies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from burnish.core.errors import ConfigError

RULED_OUT = float("-inf")


@dataclass(frozen=True, slots=True)
class Options:
    """How an answer is made. The defaults are greedy: always the likeliest token.

    Raises:
        ConfigError: when a value is outside its range.
    """

    max_tokens: int = 256
    """Longest answer, the end token included."""
    temperature: float = 0.0
    """Flattens (> 1) or sharpens (< 1) the distribution; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (nucleus sampling, 1904.09751); 1 is off."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest (2407.01082); 0 is off."""
    repetition_penalty: float = 1.0
    """Makes tokens that the prompt or the answer already holds less likely (CTRL, 1909.05858); 1 is off."""
    seed: int = 42
    """Each answer draws from a generator of its own: the same request gets the same answer, whatever was asked before."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 <= self.top_p <= 1, "top_p", self.top_p, "a probability from 0 to 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "a fraction from 0 to 1")
        _require(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "more than 0")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2^63 - 1")


def _require(holds: bool, name: str, found: float, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, found {found}")


def penalise_repeats(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of the `seen` token ids by `penalty`.

    Args:
        logits: [..., V].
        seen: [..., S] ids in the prompt and the answer so far; repeats in it have no further effect.
        penalty: More than 1 discourages repeats, less than 1 encourages them.
    """
    theirs = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(theirs > 0, theirs / penalty, theirs * penalty))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Rules out all but the k likeliest tokens of [..., V]. Ties with the k-th stay in."""
    if k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, RULED_OUT)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Rules out all but the smallest set of likeliest tokens of [..., V] whose probability reaches p. The likeliest always stays."""
    ranked, order = logits.sort(dim=-1, descending=True)
    probabilities = ranked.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities  # the mass in front of each token
    out = likelier >= p
    out[..., 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), RULED_OUT)


def keep_min_p(logits: torch.Tensor, fraction: float) -> torch.Tensor:
    """Rules out tokens of [..., V] that are less than `fraction` as likely as the likeliest. The likeliest always stays."""
    if fraction == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(fraction), RULED_OUT)


def distribution(logits: torch.Tensor, options: Options, seen: torch.Tensor | None = None) -> torch.Tensor:
    """The probabilities [..., V] in float32 that a token is drawn from. Greedy options give all mass to the likeliest token.

    Args:
        logits: [..., V] of any float type.
        options: The filters.
        seen: [..., S] ids so far, for the repetition penalty.
    """
    scores = _penalised(logits, options, seen)
    if options.temperature == 0:
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
    scores = scores / options.temperature
    if options.top_k:
        scores = keep_top_k(scores, options.top_k)
    if options.top_p < 1:
        scores = keep_top_p(scores, options.top_p)
    if options.min_p:
        scores = keep_min_p(scores, options.min_p)
    return scores.softmax(-1)


def choose(logits: torch.Tensor, options: Options, rng: torch.Generator, seen: Sequence[int] = ()) -> int:
    """The next token for the logits [V] of one sequence.

    Args:
        logits: [V], no NaN.
        options: The filters.
        rng: On the device of the logits. Not touched when the options are greedy.
        seen: Ids so far, for the repetition penalty.
    """
    before = torch.tensor(seen, dtype=torch.int64, device=logits.device) if seen and options.repetition_penalty != 1 else None
    if options.temperature == 0:
        return int(_penalised(logits, options, before).argmax())
    return int(torch.multinomial(distribution(logits, options, before), 1, generator=rng))


def _penalised(logits: torch.Tensor, options: Options, seen: torch.Tensor | None) -> torch.Tensor:
    scores = logits.float()
    if seen is None or options.repetition_penalty == 1:
        return scores
    return penalise_repeats(scores, seen, options.repetition_penalty)
