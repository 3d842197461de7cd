"""Trained reward models in use.

    reward = burnish.load_reward("runs/reward")
    reward.score([[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]])      # [1.7]

    judge = burnish.load_process_reward("runs/steps")
    judge.score([("2 + 2 + 2?", ["2 + 2 = 4", "4 + 2 = 7"])])                                           # [[0.98, 0.03]]

Texts are computed side by side in flat batches, as in training: a conversation is scored at its last token, a step at its own last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from burnish.config.sections import Model
from burnish.core.errors import ModelError, RowError, Where
from burnish.core.log import warn
from burnish.data.collate import collate
from burnish.data.formats import messages
from burnish.data.formats.base import Binding, Fields
from burnish.data.packing import plan_micro_batches
from burnish.data.render import Renderer
from burnish.data.sources.row import Row
from burnish.data.types import Answer, Completion, Conversation, Example, Stepwise
from burnish.engine.backend import Backend, Precision
from burnish.models.inference import load_for_inference
from burnish.models.policy import Policy
from burnish.models.positions import reach
from burnish.models.score import Judges, judged_by

Dialogue = Answer | Sequence[Mapping[str, Any]]
"""A conversation, its messages as OpenAI writes them, or a prompt with its completion as plain text."""
Solution = tuple[str, Sequence[str]]
"""A prompt, and the steps of its solution."""

_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class _Scorer:
    """A policy with a score head, on flat batches."""

    judges: Judges

    def __init__(self, policy: Policy, renderer: Renderer, backend: Backend) -> None:
        if (found := judged_by(policy.model)) != self.judges:
            wanted = (
                "whole answers, with a score head of one output" if self.judges == "answers" else "steps, with a score head of two outputs"
            )
            what = {"answers": "one that scores whole answers", "steps": "one that scores steps", None: "a model without a score head"}[
                found
            ]
            hint = {"answers": "burnish.load_reward takes it.", "steps": "burnish.load_process_reward takes it.", None: None}[found]
            raise ModelError(f"expected a reward model that scores {wanted}, found {what}", hint=hint)
        self.policy = policy.eval()
        self.renderer = renderer
        self.backend = backend

    def _outputs(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """The head's outputs [S, n] for every example, in fp32: at the end of each branch, or of a plain example."""
        self._look_at_lengths(examples)
        found: dict[int, torch.Tensor] = {}
        budget = _MICRO_BATCH_TOKENS.get(self.backend.device.type, 8192)
        (plan,) = plan_micro_batches([len(example.input_ids) for example in examples], budget)
        for places in filter(None, plan):
            batch = collate([examples[place] for place in places], step_weight=1.0)
            batch.extras.setdefault("ends", torch.tensor(batch.doc_ends) - 1)
            with torch.no_grad(), self.backend.autocast():
                outputs = self.policy.scores(batch.to(self.backend.device)).float().cpu()
            counts = [max(1, len(examples[place].values)) for place in places]
            found |= zip(places, outputs.split(counts), strict=True)
        return [found[place] for place in range(len(examples))]

    def _look_at_lengths(self, examples: Sequence[Example]) -> None:
        """What is longer than the model knows is scored, and said; where positions are rows of a table, it cannot be scored."""
        positions, table = reach(self.policy.model)
        number, longest = max(enumerate((len(one.input_ids) for one in examples), start=1), key=lambda pair: pair[1], default=(0, 0))
        if positions is None or longest <= positions:
            return
        said = f"has {longest:,} tokens, and the model was made for {positions:,}"
        if table:
            raise ModelError(f"number {number} {said}: it cannot be scored")
        warn(f"number {number} {said}: its score means little")


class RewardModel(_Scorer):
    """Scores conversations by their last turn.

    Args:
        policy: A model with a score head of one output, with its tokenizer.
        renderer: Turns conversations into tokens.
        backend: Devices and precision.

    Raises:
        ModelError: the model has no such head.
    """

    judges = "answers"

    def score(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """One number for each conversation, higher is better; only differences mean something.

        Raises:
            RowError: a conversation is malformed; the row is its number, from 1.
            ModelError: it is longer than the model's table of positions.
        """
        if any(isinstance(one, str | Mapping) for one in dialogues):
            raise RowError("expected a list of conversations, each a list of messages (or a Completion of prompt and answer)")
        places = [Where(file="dialogues", row=number) for number in range(1, len(dialogues) + 1)]
        read = [_read(one, number) for number, one in enumerate(dialogues, start=1)]
        outputs = self._outputs([self.renderer.render(one, where=where) for one, where in zip(read, places, strict=True)])
        return [float(output) for output in outputs]


class ProcessRewardModel(_Scorer):
    """Judges the steps of solutions.

    Args:
        policy: A model with a score head of two outputs (wrong, right), with its tokenizer.
        renderer: Turns solutions into tokens.
        backend: Devices and precision.

    Raises:
        ModelError: the model has no such head.
    """

    judges = "steps"

    def score(self, solutions: Sequence[Solution]) -> list[list[float]]:
        """The probability that a step is right, for every step of every solution, each in the light of what stands before it.

        Raises:
            RowError: a solution is malformed; the row is its number, from 1.
        """
        examples: list[Example] = []
        for number, (prompt, steps) in enumerate(solutions, start=1):
            where = Where(file="solutions", row=number)
            if isinstance(steps, str) or not steps:
                raise RowError("expected the solution as a list of steps", where=where)
            example = self.renderer.render(Stepwise(prompt, tuple(steps), (0.0,) * len(steps)), where=where)
            if len(example.ends) != len(steps) + 1:
                raise RowError("nothing stands before the steps, so there is no prompt whose solution they could be", where=where)
            examples.append(example)
        return [output.softmax(dim=-1)[:, 1].tolist() for output in self._outputs(examples)]


def load_reward(target: str, *, precision: Precision = "auto", base: str | None = None) -> RewardModel:
    """Loads a reward model: a run folder, an adapter folder, or a folder (or hub id) of a sequence classification model.

    Args:
        target: Which one.
        precision: Type of the matrix products; `auto` is bfloat16 where the device computes it fast.
        base: The base model of an adapter, where it is no longer where the adapter says.

    Raises:
        ModelError: it cannot be loaded, or is no reward model.
    """
    return RewardModel(*_load(target, precision, base))


def load_process_reward(target: str, *, precision: Precision = "auto", base: str | None = None) -> ProcessRewardModel:
    """Loads a process reward model: as `load_reward`, of a token classification model with the two classes wrong and right.

    Raises:
        ModelError: it cannot be loaded, or is no process reward model.
    """
    return ProcessRewardModel(*_load(target, precision, base))


def _load(target: str, precision: Precision, base: str | None) -> tuple[Policy, Renderer, Backend]:
    backend = Backend(precision=precision)
    loaded = load_for_inference(target, dtype=backend.storage_dtype, device=backend.device, base=base, scorer=True)
    policy = Policy(loaded.model, loaded.tokenizer, attention=Model(path=target).attention)
    return policy, Renderer(loaded.tokenizer), backend


def _read(dialogue: Dialogue, number: int) -> Answer:
    if isinstance(dialogue, Conversation | Completion):
        return dialogue
    fields = Fields(Row("dialogues", number, {"messages": list(dialogue)}), Binding({}))
    read = messages.read_messages(fields, "messages", fields.json("messages"))
    if read[-1].role != "assistant":
        raise RowError(f"the conversation ends with a {read[-1].role} message, expected the answer to score", where=fields.row.where())
    return messages.whole(fields, read)
