"""TRL's numbers for the losses over preference pairs: runs inside .peers/trl and writes tests/golden/trl_preference.json.

    .peers/trl/bin/python benchmarks/parity/trl_losses.py tests/golden/trl_preference.json

The trainers' own loss methods are called on stand-ins for the trainers, with a model whose log-probabilities are written in a table.
Prompts have one token, so that TRL's cross-entropy of ORPO, which takes prompts in, is that of the answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

LENGTHS = [(3, 5), (4, 4), (6, 2), (1, 3), (5, 1), (2, 7)]  # tokens of chosen and rejected
DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}
PLAIN = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
DPO = [
    *({"loss": [loss], "beta": beta} for loss in (*PLAIN, "discopop", "sft") for beta in (0.1, 0.8)),
    *({"loss": [loss], "beta": 0.3, "label_smoothing": 0.2} for loss in ("robust", "exo_pair", "aot", "aot_unpaired")),
    {"loss": ["discopop"], "beta": 0.3, "discopop_tau": 0.5},
    *({"loss": [loss], "beta": 0.3, "divergence": kind} for kind in ("forward_kl", "js", "alpha") for loss in ("sigmoid", "hinge", "ipo")),
    *({"loss": ["sigmoid"], "beta": 0.3, "divergence": "alpha", "alpha": alpha} for alpha in (0.0, 1.0, 2.0)),
    *({"loss": [loss], "beta": 0.3, "ld_alpha": alpha} for loss in ("sigmoid", "ipo", "aot", "apo_zero") for alpha in (0.0, 0.4)),
    *({"loss": [loss], "beta": 0.3, "wpo": True} for loss in ("sigmoid", "ipo", "bco_pair")),  # hinge fails there
    {"loss": ["sigmoid", "bco_pair", "sft"], "beta": 0.3, "loss_weights": [0.8, 0.2, 1.5]},
]
CPO = [
    *({"loss": loss, "beta": 0.3, "sft_weight": weight} for loss in ("sigmoid", "hinge", "ipo") for weight in (0.0, 1.0)),
    {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.5},
]
SIMPO = [
    {"beta": 2.0, "gamma": 1.0},
    {"beta": 2.5, "gamma": 1.3, "label_smoothing": 0.1, "sft_weight": 0.7},
    *({"beta": 2.5, "gamma": 0.5, "alpha": alpha} for alpha in (0.25, -0.5)),
]
ORPO = [{"beta": 0.1}, {"beta": 1.0}]


class Table(torch.nn.Module):
    """A model whose log-probability of each token of each answer is given: [2P, L], chosen ones first, padded."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: torch.Tensor, mask: torch.Tensor, log_sum_sq: torch.Tensor | None = None) -> None:
        super().__init__()
        self.logprobs = torch.nn.Parameter(logprobs.clone())
        self.mask = mask
        self.log_sum_sq = log_sum_sq

    def forward(self, *_, **__):
        found = torch.where(self.mask, self.logprobs, 0.0)
        zeros = torch.zeros_like(found)
        # Of two tokens, number 0 is always the right one; nothing is predicted after the last position.
        logits = torch.stack([found, torch.log(-torch.expm1(torch.where(self.mask, found, -1.0)))], dim=-1)
        return SimpleNamespace(
            log_probs=found,
            log_sum_sq_probs=self.log_sum_sq,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1),
        )


def trainer_of(model: Table, **settings) -> SimpleNamespace:
    """What the loss methods ask of a trainer."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    return SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def dpo(policy: Table, reference: Table, settings: dict) -> torch.Tensor:
    trainer = trainer_of(
        policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.get("discopop_tau", 0.05)),
        precompute_ref_logps=False,
        loss_types=settings["loss"],
        loss_weights=settings.get("loss_weights", [1.0] * len(settings["loss"])),
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        ld_alpha=settings.get("ld_alpha"),
        use_weighting=settings.get("wpo", False),
        f_divergence_type=DIVERGENCES[settings.get("divergence", "reverse_kl")],
        f_alpha_divergence_coef=settings.get("alpha", 0.5),
    )
    mask = torch.nn.functional.pad(policy.mask, (1, 0)).long()
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return DPOTrainer._compute_loss(trainer, policy, inputs, False)


def answers(policy: Table) -> dict[str, torch.Tensor]:
    """The batch of CPO and ORPO: a prompt of one token, then the answer."""
    batch = {}
    for side, mask in zip(("chosen", "rejected"), policy.mask.chunk(2), strict=True):
        ids = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.int64)
        attention = torch.nn.functional.pad(mask, (1, 0), value=True)
        labels = torch.where(torch.nn.functional.pad(mask, (1, 0)), ids, -100)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": attention.long(), f"{side}_labels": labels}
    return batch


def without_reference(kind: type, policy: Table, **settings) -> torch.Tensor:
    trainer = trainer_of(policy, **settings)
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, name):
            setattr(trainer, name, partial(getattr(kind, name), trainer))
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(kind, name))
    return kind.get_batch_loss_metrics(trainer, policy, answers(policy))[0]


def cpo(policy: Table, reference: Table, settings: dict) -> torch.Tensor:
    return without_reference(
        CPOTrainer,
        policy,
        loss_type=settings["loss"],
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        cpo_alpha=settings["sft_weight"],
        alpha=0.0,
    )


def simpo(policy: Table, reference: Table, settings: dict) -> torch.Tensor:
    return without_reference(
        CPOTrainer,
        policy,
        loss_type="simpo",
        beta=settings["beta"],
        simpo_gamma=settings["gamma"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        cpo_alpha=settings.get("sft_weight", 0.0),
        alpha=settings.get("alpha", 0.0),
    )


def orpo(policy: Table, reference: Table, settings: dict) -> torch.Tensor:
    return without_reference(ORPOTrainer, policy, beta=settings["beta"])


def main(output: str) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([pair[side] for side in (0, 1) for pair in LENGTHS])
    mask = torch.arange(int(counts.max()))[None] < counts[:, None]
    policy = (-0.02 - 3 * torch.rand(mask.shape, generator=generator)).round(decimals=4)
    reference = (policy + 0.8 * torch.randn(mask.shape, generator=generator)).clamp(max=-0.01).round(decimals=4)
    log_sum_sq = (-2.5 * torch.rand(mask.shape, generator=generator)).round(decimals=4)
    cases = []
    for kind, function, variants in (("dpo", dpo, DPO), ("cpo", cpo, CPO), ("simpo", simpo, SIMPO), ("orpo", orpo, ORPO)):
        for settings in variants:
            table = Table(policy, mask, log_sum_sq)
            loss = function(table, Table(reference, mask), settings)
            loss.backward()
            gradient = [row[on].tolist() for row, on in zip(table.logprobs.grad, mask, strict=True)]
            cases.append({"objective": {"kind": kind, **settings}, "loss": loss.item(), "gradient": _by_pair(gradient)})
    given = {
        name: _by_pair([[round(x, 4) for x in row[on].tolist()] for row, on in zip(table, mask, strict=True)])
        for name, table in (("policy", policy), ("reference", reference), ("log_sum_sq", log_sum_sq))
    }
    Path(output).write_text(json.dumps({**given, "cases": cases}) + "\n")


def _by_pair(rows: list) -> list:
    """Chosen and rejected of the first pair, then of the second, as burnish has them."""
    half = len(rows) // 2
    return [rows[side * half + number] for number in range(half) for side in (0, 1)]


if __name__ == "__main__":
    main(sys.argv[1])
