"""Golden losses: twenty steps of a tiny model, whole and with LoRA, must come out as they always have.

The weights and the data are written down as formulas, so that no random generator stands between two versions of torch. A change that
moves these numbers on purpose stores new ones with `python tests/golden/test_sft.py`, and says why in its commit.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config.objectives import SFT
from burnish.config.sections import Adapter, Evaluation, Save, Train
from burnish.data.loader import Loader, eval_batches
from burnish.data.types import Example
from burnish.engine.backend import Backend
from burnish.engine.loop import Job, train
from burnish.engine.metrics import read_lines
from burnish.engine.optim import build_optimizer
from burnish.models.adapters import attach
from burnish.models.policy import Policy
from burnish.objectives.sft import SFTObjective

GOLDEN = Path(__file__).with_name("sft.json")
VOCABULARY = 61
STEPS = 20
CASES: dict[str, tuple[Adapter | None, dict[str, object]]] = {
    "full": (None, {"learning_rate": 1e-3, "weight_decay": 0.1}),
    "lora": (Adapter(rank=4, alpha=8), {"learning_rate": 5e-3, "optimizer": "adamw"}),
}


class Rows:
    """Forty-eight little sums, `a + b = c` in tokens, with the answer trained."""

    def __init__(self, start: int, count: int) -> None:
        self._examples = [self._row(number) for number in range(start, start + count)]
        self.lengths = np.array([len(e.input_ids) for e in self._examples], dtype=np.int32)
        self.trained = np.array([int((e.weights[1:] > 0).sum()) for e in self._examples], dtype=np.int32)
        self.weights = self.leading = np.array([float(e.weights[1:].sum()) for e in self._examples])

    @staticmethod
    def _row(number: int) -> Example:
        a, b = number * 7 % 23, number * 5 % 19
        ids = [1, 4 + a, 2, 4 + b, 3, 4 + a + b, *([2] * (number % 4)), 0]
        return Example(np.array(ids, dtype=np.int32), np.array([0] * 5 + [1] * (len(ids) - 5), dtype=np.float32))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def fill(parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
    """Weights from a formula: irregular, of the usual size, and the same on every machine."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(parameters):
            if parameter.ndim < 2 or "lora_B" in name:
                continue  # norms start at one, LoRA's B at zero
            places = np.arange(parameter.numel(), dtype=np.float64)
            values = np.modf(np.sin(places * 12.9898 + number * 78.233) * 43758.5453)[0]  # a hash in [-1, 1]
            size = 1 / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(values * size).reshape(parameter.shape))


def run(case: str, folder: Path) -> dict[str, list[float]]:
    adapter, settings = CASES[case]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    fill(model.named_parameters())
    policy = Policy(attach(model, adapter) if adapter else model)
    if adapter:
        fill(iter(policy.trainable().items()))
    config = Train.model_validate({"steps": STEPS, "batch_size": 8, **settings})
    job = Job(
        policy=policy,
        objective=SFTObjective(SFT()),
        source=Loader(Rows(0, 48), batch_size=8, max_length=16, micro_batch_tokens=32, seed=config.seed),
        optimizer=build_optimizer(policy.trainable(), config),
        backend=Backend(precision="float32", cpu=True),
        train=config,
        evaluation=Evaluation.model_validate({"every": "10st"}),
        save=Save(every=None, best=False),
        folder=folder,
        eval_batches=lambda halvings: eval_batches(Rows(48, 12), 32 >> halvings),
    )
    train(job)
    steps, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "eval.jsonl")
    return {
        "loss": [line["loss"] for line in steps],
        "grad_norm": [line["grad_norm"] for line in steps],
        "learning_rate": [line["learning_rate"] for line in steps],
        "eval_loss": [line["eval_loss"] for line in evaluations],
    }


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_golden_ones(case: str, tmp_path: Path):
    golden = json.loads(GOLDEN.read_text())[case]
    found = run(case, tmp_path)
    assert found["loss"][-1] < 0.95 * found["loss"][0]
    assert found["loss"] == pytest.approx(golden["loss"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(golden["eval_loss"], rel=1e-5)
    assert found["learning_rate"] == pytest.approx(golden["learning_rate"], rel=1e-12)
    assert found["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        GOLDEN.write_text(json.dumps({case: run(case, Path(place) / case) for case in CASES}, indent=1) + "\n")
