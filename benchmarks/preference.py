"""DPO, burnish beside other tools: same model, pairs, order, types and trained parameters, one process each.

    python -m benchmarks.preference --rows dpo_en_demo.json                     everything that is installed (make peers)
    python -m benchmarks.preference --prompt-tokens 2048 --answer-tokens 200    long prompts, made up of random words
    python -m benchmarks.preference --peers burnish,trl --precision bfloat16 --forms best --steps 4 --rounds 1

SmolLM2-135M-Instruct, LoRA of rank 16 and alpha 32 on all seven linear layers, DPO with beta 0.1, AdamW at a constant 2e-4, 4 pairs a step,
the reference is the model without its adapter. Each tool runs in two forms, `stock` and `best`, as benchmarks/peers/NAME_dpo.py says. The
rounds are interleaved, so that a slow minute of the machine hits everyone.

Printed are medians over the rounds with the smallest and largest: pairs a second over the steps after the warm-up, and peak resident
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.sft import FORMS, PRECISIONS, ROOT, Entry, Result, Results, among, attempt, python_of, save, setup, spread

PEERS = ("trl", "llamafactory", "burnish")


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="burnish-dpo-") as folder:
        peers = [peer for peer in options.peers if Path(python_of(peer)).exists()]
        setup("burnish", [str(Path(folder, "model"))], Path(folder))
        rows = long_rows(options) if options.prompt_tokens else read_rows(options.rows)
        Path(folder, "rows.json").write_text(json.dumps(rows))
        entries = [Entry(p, f, peer) for p in options.precision for f in options.forms for peer in peers]
        results: Results = {entry: [] for entry in entries}
        for number in range(1, options.rounds + 1):
            for entry in entries:
                attempt(entry, Path(folder), options, results[entry], f"round {number}/{options.rounds}")
    measured = {entry: runs for entry, runs in results.items() if runs}
    report = [summary(entry, runs, options) for entry, runs in measured.items()]
    table(report)
    if options.json:
        save(options, report, measured)
    return 0 if len(measured) == len(entries) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=among(PEERS), default=list(PEERS), help=f"default: all of {','.join(PEERS)}")
    parser.add_argument("--forms", type=among(FORMS), default=list(FORMS))
    parser.add_argument("--precision", type=among(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed optimiser steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rows", type=Path, help="JSON list of ShareGPT ranking rows; default: recipes/data/preferences.jsonl")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="make up pairs with prompts of about this length")
    parser.add_argument("--answer-tokens", type=int, default=200, help="and answers of about this one")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--malloc", choices=("keep", "stock"), default="keep", help="as in benchmarks.sft")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one process")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    options.stage = "dpo"
    if options.prompt_tokens:
        options.max_length = max(options.max_length, options.prompt_tokens + options.answer_tokens + 64)
    return options


def read_rows(file: Path | None) -> list[dict]:
    """ShareGPT ranking rows, shuffled once for everyone. Only prompts that are a user's turn, with or without a system prompt before it."""
    if file is not None:
        rows = json.loads(file.read_text(encoding="utf-8"))
    else:
        lines = (ROOT / "recipes/data/preferences.jsonl").read_text(encoding="utf-8").splitlines()
        names = {"user": "human", "assistant": "gpt", "system": "system"}

        def turn(message: dict) -> dict:
            return {"from": names[message["role"]], "value": message["content"]}

        rows = [
            {"conversations": [turn(m) for m in row["prompt"]], "chosen": turn(row["chosen"][0]), "rejected": turn(row["rejected"][0])}
            for row in map(json.loads, lines)
        ]
    rows = [row for row in rows if [turn["from"] for turn in row["conversations"]] in (["human"], ["system", "human"])]
    random.Random(0).shuffle(rows)
    return rows


def long_rows(options: argparse.Namespace) -> list[dict]:
    """Made-up pairs: a word of these is about 1.25 tokens."""
    draw = random.Random(0)
    words = (ROOT / "recipes/data/service_desk.jsonl").read_text(encoding="utf-8").replace('"', " ").split()

    def text(tokens: int) -> str:
        return " ".join(draw.choices(words, k=int(tokens / 1.25)))

    count = options.batch_size * (options.warmup + options.steps)
    return [
        {
            "conversations": [{"from": "human", "value": text(options.prompt_tokens)}],
            "chosen": {"from": "gpt", "value": text(options.answer_tokens)},
            "rejected": {"from": "gpt", "value": text(options.answer_tokens)},
        }
        for _ in range(count)
    ]


def summary(entry: Entry, runs: list[Result], options: argparse.Namespace) -> dict:
    def pairs_per_second(run: Result) -> float:
        timed = run.timed(options.warmup)
        return options.batch_size * len(timed) / sum(step["seconds"] for step in timed)

    return {
        "precision": entry.precision,
        "form": entry.form,
        "peer": entry.peer,
        "rounds": len(runs),
        "pairs_per_second": spread(pairs_per_second(run) for run in runs),
        "memory_mib": spread(run.memory / 2**20 for run in runs),
        "tokens_per_step": sum(step["tokens"] for step in runs[0].steps) / len(runs[0].steps),
        "losses": [step["loss"] for step in runs[0].steps],
        "versions": runs[0].versions,
    }


def table(report: list[dict]) -> None:
    ours = {(line["precision"], line["form"]): line for line in report if line["peer"] == "burnish"}
    heads = ("pairs/s", "min - max", "burnish x", "MiB", "of theirs", "tokens/step", "last loss")
    print(f"{'':32}" + "".join(f"{head:>16}" for head in heads))
    for line in sorted(report, key=lambda line: (line["precision"], line["form"], line["pairs_per_second"]["median"])):
        rate, memory = line["pairs_per_second"], line["memory_mib"]["median"]
        own = ours.get((line["precision"], line["form"]))
        cells = (
            f"{rate['median']:.3f}",
            f"{rate['min']:.3f} - {rate['max']:.3f}",
            f"{own['pairs_per_second']['median'] / rate['median']:.2f}" if own else "",
            f"{memory:.0f}",
            f"{own['memory_mib']['median'] / memory:.2f}" if own else "",
            f"{line['tokens_per_step']:.0f}",
            f"{line['losses'][-1]:.4f}",
        )
        print(f"{line['precision']:10}{line['form']:7}{line['peer']:15}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
