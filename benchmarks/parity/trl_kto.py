"""TRL's numbers for KTO: runs inside .peers/trl and writes tests/golden/trl_kto.json.

    .peers/trl/bin/python benchmarks/parity/trl_kto.py tests/golden/trl_kto.json

The trainer's own loss method is called on a stand-in for the trainer, with models whose log-probabilities depend on the token alone.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import KTOTrainer

VOCABULARY = 11
ANSWERS = [[2, 5, 7], [1, 8], [9, 3, 4, 4], [6], [10, 2]]
LABELS = [True, False, True, True, False]
SETTINGS = [
    {"loss": "kto", "beta": 0.1},
    {"loss": "kto", "beta": 0.7, "desirable_weight": 1.33, "undesirable_weight": 0.5},
    {"loss": "apo_zero", "beta": 0.4},
    {"loss": "apo_zero", "beta": 0.4, "undesirable_weight": 2.0},
]
NAMES = {"kto": "kto", "apo_zero": "apo_zero_unpaired"}


class Table(torch.nn.Module):
    """A model whose log-probability of a token is written in a table."""

    is_gradient_checkpointing = False

    def __init__(self, table: list[float]) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float64))

    def forward(self, input_ids, labels, **_):
        after = labels[:, 1:]
        found = torch.where(after == -100, 0.0, self.table[after.clamp_min(0)])
        zeros = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=zeros, mean_logits=zeros)


def padded(answers: list[list[int]]) -> dict[str, torch.Tensor]:
    width = 1 + max(map(len, answers))
    ids = torch.zeros(len(answers), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        ids[row, 1 : 1 + len(answer)] = torch.tensor(answer)
        mask[row, 1 : 1 + len(answer)] = 1
    attention = mask.clone()
    attention[:, 0] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": mask}


def stand_in(policy: Table, reference: Table, settings: dict) -> SimpleNamespace:
    trainer = SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=settings["loss"] == "kto",
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_type=NAMES[settings["loss"]],
        beta=settings["beta"],
        desirable_weight=settings.get("desirable_weight", 1.0),
        undesirable_weight=settings.get("undesirable_weight", 1.0),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    return trainer


def main(output: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = {name: (-3 * torch.rand(VOCABULARY, generator=generator, dtype=torch.float64)).tolist() for name in ("policy", "reference")}
    mismatched = ANSWERS[-1:] + ANSWERS[:-1]
    inputs = padded(ANSWERS) | {f"KL_{name}": value for name, value in padded(mismatched).items()} | {"label": torch.tensor(LABELS)}
    cases = []
    for settings in SETTINGS:
        for first, second in (("policy", "reference"), ("reference", "policy")):  # one way round the estimate of the KL is negative
            policy, reference = Table(tables[first]), Table(tables[second])
            trainer = stand_in(policy, reference, settings)
            loss = KTOTrainer._compute_loss(trainer, policy, dict(inputs), False)
            loss.backward()
            metrics = {key: values[-1] for key, values in trainer._metrics["train"].items() if key.startswith(("rewards", "logps", "kl"))}
            cases.append(
                {"settings": settings, "policy": first, "loss": loss.item(), "gradient": policy.table.grad.tolist(), "metrics": metrics}
            )
    document = {
        "tables": tables,
        "answers": ANSWERS,
        "mismatched": mismatched,
        "labels": LABELS,
        "cases": cases,
    }
    Path(output).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
