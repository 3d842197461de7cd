"""TRL's numbers for distillation: runs inside .peers/trl and writes tests/golden/trl_distill.json.

.peers/trl/bin/python benchmarks/parity/trl_distill.py tests/golden/trl_distill.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

SETTINGS = [
    {"divergence": "forward_kl"},
    {"divergence": "forward_kl", "temperature": 2.0},
    {"divergence": "reverse_kl"},
    {"divergence": "reverse_kl", "temperature": 0.7},
    {"divergence": "js", "mix": 0.5},
    {"divergence": "js", "mix": 0.1, "temperature": 1.5},
    {"divergence": "js", "mix": 0.9},
]
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}


def main(output: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": (5, 4), "weight": (9, 4), "teacher_hidden": (5, 6), "teacher_weight": (9, 6)}
    parts = {name: torch.randn(*size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    cases = []
    for settings in SETTINGS:
        beta, temperature = BETA.get(settings["divergence"], settings.get("mix")), settings.get("temperature", 1.0)
        hidden, weight = (parts[name].clone().requires_grad_() for name in ("hidden", "weight"))
        logits, theirs = hidden @ weight.T, parts["teacher_hidden"] @ parts["teacher_weight"].T
        rows = GKDTrainer.generalized_jsd_loss(logits, theirs, beta=beta, temperature=temperature, reduction="none").sum(-1)
        rows.sum().backward()
        chunked, _, _ = _chunked_divergence_loss(
            *(parts[name].float() for name in ("hidden", "teacher_hidden", "weight", "teacher_weight")),
            torch.ones(5),
            beta,
            num_items_in_batch=1,
            temperature=temperature,
        )
        assert abs(chunked.item() - rows.sum().item()) < 1e-4
        case = {"settings": settings, "rows": rows, "hidden": hidden.grad, "weight": weight.grad}
        cases.append({name: value if isinstance(value, dict) else value.tolist() for name, value in case.items()})
    document = {"parts": {name: value.tolist() for name, value in parts.items()}, "cases": cases}
    Path(output).write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
