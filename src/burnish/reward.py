"""A trained reward model in use.

    reward = burnish.load_reward("runs/reward")
    reward.score([[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]])      # [1.7]

Conversations are computed side by side in flat batches, as in training, and each is scored at its last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from burnish.config.sections import Model
from burnish.core.errors import ModelError
from burnish.data.collate import collate
from burnish.data.formats import messages
from burnish.data.formats.base import Binding, Fields
from burnish.data.packing import plan_micro_batches
from burnish.data.render import Renderer
from burnish.data.sources.row import Row
from burnish.data.types import Conversation
from burnish.engine.backend import Backend, Precision
from burnish.models.inference import load_for_inference
from burnish.models.policy import Policy
from burnish.models.score import judged_by

Dialogue = Conversation | Sequence[Mapping[str, Any]]
"""A conversation, or its messages as OpenAI writes them."""

_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class RewardModel:
    """Scores conversations by their last turn.

    Args:
        policy: A model with a score head of one output, with its tokenizer.
        renderer: Turns conversations into tokens.
        backend: Devices and precision.

    Raises:
        ModelError: the model has no such head.
    """

    def __init__(self, policy: Policy, renderer: Renderer, backend: Backend) -> None:
        if judged_by(policy.model) != "answers":
            raise ModelError("expected a reward model that scores whole answers, with a score head of one output")
        self.policy = policy.eval()
        self.renderer = renderer
        self.backend = backend

    def score(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """One number for each conversation, higher is better; only differences mean something.

        Raises:
            RowError: a conversation is malformed; the row is its number, from 1.
        """
        read = [one if isinstance(one, Conversation) else _read(one, number) for number, one in enumerate(dialogues, start=1)]
        examples = [self.renderer.render(one) for one in read]
        found = np.zeros(len(examples))
        budget = _MICRO_BATCH_TOKENS.get(self.backend.device.type, 8192)
        (plan,) = plan_micro_batches([len(example.input_ids) for example in examples], budget)
        for places in filter(None, plan):
            batch = collate([examples[place] for place in places], step_weight=1.0)
            batch.extras["ends"] = torch.tensor(batch.doc_ends) - 1
            with torch.no_grad(), self.backend.autocast():
                found[places] = self.policy.scores(batch.to(self.backend.device)).squeeze(-1).float().cpu().numpy()
        return found.tolist()


def load_reward(target: str, *, precision: Precision = "auto", base: str | None = None) -> RewardModel:
    """Loads a reward model: a run folder, an adapter folder, or a folder (or hub id) of a sequence classification model.

    Args:
        target: Which one.
        precision: Type of the matrix products; `auto` is bfloat16 where the device computes it fast.
        base: The base model of an adapter, where it is no longer where the adapter says.

    Raises:
        ModelError: it cannot be loaded, or is no reward model.
    """
    backend = Backend(precision=precision)
    loaded = load_for_inference(target, dtype=backend.storage_dtype, device=backend.device, base=base, scorer=True)
    policy = Policy(loaded.model, loaded.tokenizer, attention=Model(path=target).attention)
    return RewardModel(policy, Renderer(loaded.tokenizer), backend)


def _read(dialogue: Sequence[Mapping[str, Any]], number: int) -> Conversation:
    fields = Fields(Row("dialogues", number, {"messages": list(dialogue)}), Binding({}))
    return messages.whole(fields, messages.read_messages(fields, "messages", fields.json("messages")))
