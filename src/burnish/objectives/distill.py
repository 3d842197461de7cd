"""Distillation: learn from a teacher's whole distribution at every trained token (2306.13649).

For one trained token, with the divergence D of teacher and student (kernels/divergence.py has the formulas) and its negative
log-likelihood nll:

    loss = w ((1 - a) D + a nll)

a is `sft_weight`, w the token's weight. D compares both models at `temperature` and is not multiplied by its square; nll is at
temperature 1. The engine divides the sum by the sum of w over the whole step.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from burnish.config.objectives import Distill
from burnish.core.errors import ModelError
from burnish.data.types import Batch
from burnish.kernels.divergence import HeadInputs, weighted_divergence
from burnish.objectives.base import Loss


class Headed(Protocol):
    """A model that gives its hidden states and its head apart (satisfied by `models.policy.Policy`)."""

    def head_inputs(self, batch: Batch) -> HeadInputs:
        """Hidden states [K, H] at the batch's rows, and the head."""
        ...


@runtime_checkable
class Shared(Protocol):
    """A model whose batches are on several ranks, which share the head's work (satisfied by `models.policy.Policy`)."""

    def own_rows(self, batch: Batch) -> Batch:
        """The batch with this rank's share of its predictions."""
        ...

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over these ranks."""
        ...


class Teacher(Headed, Protocol):
    """The same, for a model that is not trained."""

    def eval(self) -> Any:
        """Switches dropout off."""
        ...


def common_vocabulary(student: int, teacher: int, tokens: int | None = None) -> int:
    """How many entries of the vocabularies are compared.

    Families round their vocabulary up, each size as it likes (Qwen 2.5: 151936 and 152064). Entries from `tokens` on belong to no token:
    where sizes differ, both models are cut to `tokens` before the softmax.

    Args:
        student: Logits of the student.
        teacher: Logits of the teacher.
        tokens: Tokens that the tokenizer knows, the added ones among them. None: not known.

    Raises:
        ModelError: The sizes differ by more than such padding.
    """
    if student == teacher:
        return student
    if tokens is None or not 0 < tokens <= min(student, teacher):
        known = "is not known" if tokens is None else f"is {tokens}"
        raise ModelError(
            f"the student has {student} logits and the teacher {teacher}, expected the same vocabulary (the tokenizer's length {known})",
            hint="choose a teacher of the student's family: distillation compares the models token by token",
        )
    return tokens


class DistillObjective:
    """Distillation from a teacher.

    Args:
        config: The settings.
        teacher: A second policy on the same device, with the student's tokenizer. It is put into evaluation mode.
        tokens: The tokenizer's length, for models whose vocabularies are padded to different sizes.

    Metrics: `nll` and `divergence`, weighted means over trained tokens; `accuracy`, the share of trained tokens that are the student's
    first choice; `agreement`, the share where student and teacher have the same first choice.
    """

    needs_reference = False

    def __init__(self, config: Distill, *, teacher: Teacher, tokens: int | None = None) -> None:
        self.config = config
        self._teacher = teacher
        self._tokens = tokens
        teacher.eval()

    def __call__(self, policy: Headed, batch: Batch) -> Loss:
        """The summed loss of one micro-batch; `batch.weight`, the sum of the token weights, is what it sums over.

        Raises:
            ModelError: Student and teacher have different vocabularies.
        """
        own = policy.own_rows(batch) if isinstance(policy, Shared) else batch
        with torch.no_grad():
            teacher = self._teacher.head_inputs(own)
        student = policy.head_inputs(own)
        total, stats = weighted_divergence(
            student,
            teacher,
            own.targets,
            own.token_weights,
            kind=self.config.divergence,
            mix=self.config.mix,
            temperature=self.config.temperature,
            sft_weight=self.config.sft_weight,
            vocabulary=common_vocabulary(student.vocabulary, teacher.vocabulary, self._tokens),
        )
        count = float(batch.targets.shape[0])
        found = {
            "nll": (-(own.token_weights * stats.logprobs).sum(), batch.weight),
            "divergence": ((own.token_weights * stats.divergence).sum(), batch.weight),
            "accuracy": (stats.correct.sum(), count),
            "agreement": (stats.agree.sum(), count),
        }
        if not isinstance(policy, Shared):
            return Loss(total, found)
        total, *sums = policy.total(torch.stack([total, *(amount.to(total.dtype) for amount, _ in found.values())])).unbind()
        return Loss(total, {name: (amount.detach(), of) for amount, (name, (_, of)) in zip(sums, found.items(), strict=True)})


build = DistillObjective
"""What `objective: distill` builds, once it is given its teacher."""
