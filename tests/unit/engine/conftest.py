"""A model small enough to train in a test, with everything that makes exactness hard: dropout, ragged examples, fractional weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from burnish.config.sections import Evaluation, Save, Train
from burnish.data.loader import Loader, eval_batches
from burnish.data.types import Batch, Example
from burnish.engine.backend import Backend
from burnish.engine.loop import Job
from burnish.engine.optim import build_optimizer
from burnish.objectives.base import Loss

VOCABULARY = 29


class TinyPolicy:
    """What the engine asks of a policy, around a model without attention: each token sees itself and its position."""

    def __init__(self, *, dropout: float = 0.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(VOCABULARY, 16),
                "up": nn.Linear(16, 32),
                "norm": nn.LayerNorm(32),
                "dropout": nn.Dropout(dropout),
                "lm_head": nn.Linear(32, VOCABULARY, bias=False),
            }
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    def logprobs(self, batch: Batch) -> torch.Tensor:
        layers = self.model
        hidden = layers["embed_tokens"](batch.input_ids) * torch.cos(batch.positions / 10)[:, None]
        hidden = layers["dropout"](layers["norm"](torch.relu(layers["up"](hidden))))
        logits = layers["lm_head"](hidden[batch.rows]).float()
        return logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]


class TinyObjective:
    needs_reference = False

    def __call__(self, policy: TinyPolicy, batch: Batch) -> Loss:
        logprobs = policy.logprobs(batch)
        loss = -(batch.token_weights * logprobs).sum()
        return Loss(loss, {"nll": (loss.detach(), batch.weight), "sure": ((logprobs > -1).sum(), float(len(batch.targets)))})


class TinyExamples:
    """In memory, what `data.cache.Examples` is on the disk."""

    def __init__(self, count: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self._examples = []
        for _ in range(count):
            size = int(draw.integers(4, 12))
            ids = (np.arange(size) * int(draw.integers(1, 4)) + int(draw.integers(0, 5))) % VOCABULARY
            self._examples.append(Example(ids.astype(np.int32), draw.choice([0, 0.5, 1, 1], size).astype(np.float32)))
            self._examples[-1].weights[-1] = 1.0
        self.lengths = np.array([len(e.input_ids) for e in self._examples], dtype=np.int32)
        self.trained = np.array([int((e.weights[1:] > 0).sum()) for e in self._examples], dtype=np.int32)
        self.weights = np.array([float(e.weights[1:].sum(dtype=np.float64)) for e in self._examples])
        self.leading = self.weights

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_job(folder: Path, *, precision: str = "float32", dropout: float = 0.0, held_out: bool = True, **settings: Any) -> Job:
    """A run over 40 examples: 10 steps of 8 examples make two epochs."""
    job_keys = {key: settings.pop(key) for key in ("callbacks", "identity", "resume") if key in settings}
    evaluation, save = settings.pop("evaluation", {}), settings.pop("save", {})
    train = Train.model_validate({"batch_size": 8, "steps": 10, "learning_rate": 0.01, **settings})
    policy = TinyPolicy(dropout=dropout)
    return Job(
        policy=policy,
        objective=TinyObjective(),
        source=Loader(TinyExamples(40), batch_size=train.batch_size, max_length=16, micro_batch_tokens=40, seed=train.seed),
        optimizer=build_optimizer(policy.trainable(), train),
        backend=Backend(precision=precision, cpu=True),  # pyright: ignore[reportArgumentType]
        train=train,
        evaluation=Evaluation.model_validate(evaluation),
        save=Save.model_validate(save),
        folder=folder,
        eval_batches=(lambda halvings: eval_batches(TinyExamples(9, seed=1), 40 >> halvings)) if held_out else None,
        **job_keys,
    )


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """Builds runs in folders of this test."""
    return lambda folder="run", **settings: build_job(tmp_path / folder, **settings)
