"""Supervised fine-tuning, burnish beside other tools: same model, rows, order, types and trained parameters, one process each.

    python -m benchmarks.sft                                                    everything that is installed (make peers)
    python -m benchmarks.sft --rows alpaca.json --rounds 3 --json out.json --plot losses.png
    python -m benchmarks.sft --peers burnish,reference,trl --precision bfloat16 --forms stock --steps 4 --rounds 1

SmolLM2-135M-Instruct, LoRA of rank 16 and alpha 32 on all seven linear layers, AdamW at a constant 2e-4, 4 rows a step of at most 512
tokens, loss on the answer only. Each tool runs in two forms: `stock` (its defaults) and `best` (its fastest exact settings; the docstring
of benchmarks/peers/NAME_sft.py says which). The rounds are interleaved, so that a slow minute of the machine hits everyone.

Printed are medians over the rounds with the smallest and largest: real tokens (no padding) a second over the steps after the warm-up,
peak resident memory (on a GPU: allocated memory), seconds from the start of the process to its first step and to the end of that step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: a child's peak memory starts from its parent's.

ROOT = Path(__file__).resolve().parents[1]
OWN = ("burnish", "reference")  # these run in this environment, the others in .peers/NAME
PEERS = ("trl", "llamafactory", "litgpt", *OWN)
FORMS = ("stock", "best")
PRECISIONS = ("float32", "bfloat16")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what the model's chat template adds by itself
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    precision: str
    form: str
    peer: str

    def __str__(self) -> str:
        return f"{self.peer} {self.form} {self.precision}"


@dataclass
class Result:
    """What one process said, and what the system says of it."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    ready: float = 0.0  # seconds from the start of the process to the first step
    memory: int = 0  # bytes
    versions: dict[str, str] = field(default_factory=dict)

    def timed(self, warmup: int) -> list[dict[str, Any]]:
        return self.steps[warmup:]

    def rate(self, warmup: int, what: str = "tokens") -> float:
        timed = self.timed(warmup)
        return sum(step[what] for step in timed) / sum(step["seconds"] for step in timed)


Results = dict[Entry, list[Result]]


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="burnish-sft-") as folder:
        peers = prepare(Path(folder), options)
        entries = [Entry(p, f, peer) for p in options.precision for f in options.forms for peer in peers]
        results: Results = {entry: [] for entry in entries}
        for number in range(1, options.rounds + 1):
            for entry in entries:
                attempt(entry, Path(folder), options, results[entry], f"round {number}/{options.rounds}")
    measured = {entry: runs for entry, runs in results.items() if runs}
    report = [summary(entry, runs, options.warmup) for entry, runs in measured.items()]
    table(report)
    same_work(measured, options.warmup)
    if options.json:
        save(options, report, measured)
    if options.plot:
        plot(options.plot, measured)
    return 0 if len(measured) == len(entries) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=among(PEERS), default=list(PEERS), help=f"default: all of {','.join(PEERS)}")
    parser.add_argument("--forms", type=among(FORMS), default=list(FORMS))
    parser.add_argument("--precision", type=among(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="timed optimiser steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rows", type=Path, help="JSON list of Alpaca rows; default: made from recipes/data/service_desk.jsonl")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--malloc",
        choices=("keep", "stock"),
        default="keep",
        help="keep: nobody's malloc returns freed pages to the system; stock: glibc's own way",
    )
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one process")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="draw the loss curves here (PNG)")
    return parser.parse_args()


def among(known: tuple[str, ...]) -> Any:
    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}, expected some of {','.join(known)}")
        return names

    return read


# What everyone starts from


def prepare(folder: Path, options: argparse.Namespace) -> list[str]:
    """Writes the model and the rows; returns the peers that are there."""
    peers = [peer for peer in options.peers if Path(python_of(peer)).exists()]
    for peer in sorted(set(options.peers) - set(peers)):
        print(f"{peer}: not installed (make peers), left out", file=sys.stderr)
    setup("burnish", [str(folder / "model")], folder)
    if "litgpt" in peers:
        setup("litgpt", [str(folder / "model"), str(folder / "litgpt")], folder)
    rows = alpaca_rows(options.rows)
    random.Random(0).shuffle(rows)  # once, for everyone: the tools then take them in order
    (folder / "rows.json").write_text(json.dumps(rows))
    return peers


def setup(peer: str, arguments: list[str], folder: Path) -> None:
    command = [python_of(peer), "-m", f"benchmarks.peers.{peer}_sft", "--prepare", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(peer, folder), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{peer} could not prepare the model:\n{done.stderr[-3000:]}")


def alpaca_rows(file: Path | None) -> list[dict[str, str]]:
    """Rows whose input is already part of the instruction, so that no tool joins them in another way."""
    if file is not None:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [
            {"instruction": "\n".join(filter(None, (row["instruction"], row.get("input")))), "input": "", "output": row["output"]}
            for row in rows
            if row["output"].strip()
        ]
    lines = (ROOT / "recipes/data/service_desk.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [[turn for turn in json.loads(line)["messages"] if turn["role"] != "system"] for line in lines]
    once = [{"instruction": first["content"], "input": "", "output": second["content"]} for first, second, *_ in turns]
    return once * 8


# One process


def attempt(entry: Entry, folder: Path, options: argparse.Namespace, into: list[Result], where: str) -> None:
    try:
        result = run(entry, folder, options)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"{where}  {entry}: FAILED\n{error}", file=sys.stderr)
        return
    into.append(result)
    print(f"{where}  {entry}: {result.rate(options.warmup):.0f} tokens/s, {result.memory / 2**20:.0f} MiB", file=sys.stderr)


def run(entry: Entry, folder: Path, options: argparse.Namespace) -> Result:
    """Runs one tool once, in a folder of its own, so that it finds no cache of the run before.

    Raises:
        RuntimeError: the tool failed, or did fewer steps than it was asked for.
    """
    with tempfile.TemporaryDirectory(dir=folder) as own:
        job = write_job(entry, folder, Path(own), options)
        command = [python_of(entry.peer), "-m", f"benchmarks.peers.{entry.peer}_{getattr(options, 'stage', 'sft')}", str(job)]
        with open(Path(own, "stderr"), "w+") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(entry.peer, Path(own), options), stdout=subprocess.PIPE, stderr=errors, text=True
            )
            output, usage = watch(process, options.timeout)
            errors.seek(0)
            tail = errors.read()[-3000:]
    result = read_lines(output)
    if process.returncode or len(result.steps) != options.warmup + options.steps:
        raise RuntimeError(f"exit code {process.returncode}, {len(result.steps)} steps\n{tail}")
    result.memory = result.memory or usage
    return result


def write_job(entry: Entry, folder: Path, own: Path, options: argparse.Namespace) -> Path:
    job = {
        "model": str(folder / "model"),
        "litgpt": str(folder / "litgpt"),
        "rows": str(folder / "rows.json"),
        "folder": str(own),
        "form": entry.form,
        "precision": entry.precision,
        "steps": options.warmup + options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "learning_rate": 2e-4,
        "rank": 16,
        "alpha": 32,
        "seed": 0,
        "system": SYSTEM,
        "started": time.monotonic(),
    }
    file = own / "job.json"
    file.write_text(json.dumps(job))
    return file


def watch(process: subprocess.Popen[str], timeout: float) -> tuple[str, int]:
    """The whole output, and the peak resident memory in bytes. A process that hangs is killed."""
    import threading

    alarm = threading.Timer(timeout, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        alarm.cancel()
    return output, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_lines(output: str) -> Result:
    result = Result()
    for line in output.splitlines():
        if line.startswith('{"step": '):
            result.steps.append(json.loads(line))
        elif line.startswith('{"event": '):
            event = json.loads(line)
            result.ready = event.get("seconds", result.ready)
            result.memory = event.get("gpu_memory") or 0
            result.versions |= event.get("versions", {})
    return result


def python_of(peer: str) -> str:
    return sys.executable if peer in OWN else str(ROOT / ".peers" / peer / "bin/python")


def environment(peer: str, own: Path, options: argparse.Namespace | None = None) -> dict[str, str]:
    """Offline, one number of threads, caches in the run's folder, and the same malloc for everyone."""
    variables = {name: value for name, value in os.environ.items() if name not in MALLOC and (peer in OWN or name != "PYTHONPATH")}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(own / "hf"), "TOKENIZERS_PARALLELISM": "true"}
    if options is not None:
        variables["OMP_NUM_THREADS"] = str(options.threads)
        variables |= MALLOC if options.malloc == "keep" else {}
    return variables


# What came out


def summary(entry: Entry, runs: list[Result], warmup: int) -> dict[str, Any]:
    return asdict(entry) | {
        "rounds": len(runs),
        "tokens_per_second": spread(run.rate(warmup) for run in runs),
        "trained_tokens_per_second": spread(run.rate(warmup, "trained_tokens") for run in runs),
        "memory_mib": spread(run.memory / 2**20 for run in runs),
        "seconds_to_first_step": spread(run.ready for run in runs),
        "seconds_to_first_update": spread(run.ready + run.steps[0]["seconds"] for run in runs),
        "tokens_per_step": runs[0].rate(warmup) and statistics.mean(step["tokens"] for step in runs[0].timed(warmup)),
        "first_loss": runs[0].steps[0]["loss"],
        "mean_loss": mean_loss(runs[0].timed(warmup)),
        "versions": runs[0].versions,
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    found = sorted(values)
    return {"median": statistics.median(found), "min": found[0], "max": found[-1]}


def mean_loss(steps: list[dict[str, Any]]) -> float:
    """The mean over trained tokens, which does not depend on how rows are shared out over steps."""
    return sum(step["loss"] * step["trained_tokens"] for step in steps) / sum(step["trained_tokens"] for step in steps)


def table(report: list[dict[str, Any]]) -> None:
    ours = {(line["precision"], line["form"]): line["tokens_per_second"]["median"] for line in report if line["peer"] == "burnish"}
    heads = ("tokens/s", "min - max", "of burnish", "MiB", "to 1st step", "to 1st update", "tokens/step", "1st loss", "mean loss")
    print(f"{'':32}" + "".join(f"{head:>14}" for head in heads))
    for line in sorted(report, key=lambda line: (line["precision"], line["form"], line["tokens_per_second"]["median"])):
        rate, own = line["tokens_per_second"], ours.get((line["precision"], line["form"]))
        cells = (
            f"{rate['median']:.0f}",
            f"{rate['min']:.0f} - {rate['max']:.0f}",
            f"{rate['median'] / own:.2f}" if own else "",
            f"{line['memory_mib']['median']:.0f}",
            f"{line['seconds_to_first_step']['median']:.1f} s",
            f"{line['seconds_to_first_update']['median']:.1f} s",
            f"{line['tokens_per_step']:.0f}",
            f"{line['first_loss']:.4f}",
            f"{line['mean_loss']:.4f}",
        )
        print(f"{line['precision']:10}{line['form']:7}{line['peer']:15}" + "".join(f"{cell:>14}" for cell in cells))


def same_work(results: Results, warmup: int) -> None:
    """How far the loss of each step is from the median tool's, where all take the same rows in the same order."""
    for precision in PRECISIONS:
        stock = {e.peer: runs[0].steps for e, runs in results.items() if e.precision == precision and e.form == "stock"}
        if len(stock) < 2:
            continue
        middle = [statistics.median(step["loss"] for step in steps) for steps in zip(*stock.values(), strict=True)]
        print(f"\n{precision}, stock: largest distance of a step's loss from the median of all tools, and trained tokens in all")
        for peer, steps in stock.items():
            far = max(abs(step["loss"] - m) / m for step, m in zip(steps, middle, strict=True))
            print(f"  {peer:15}{far:9.2%}{sum(step['trained_tokens'] for step in steps):10}")


def save(options: argparse.Namespace, report: list[dict[str, Any]], results: Results) -> None:
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "summary": report,
        "runs": [asdict(entry) | {"rounds": [asdict(run) for run in runs]} for entry, runs in results.items()],
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n")


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def plot(file: Path, results: Results) -> None:
    """Loss against trained tokens, a panel for each precision and form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(entry.precision, entry.form) for entry in results}, reverse=True)
    figure, grid = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axes, (precision, form) in zip(grid[0], panels, strict=True):
        for entry, runs in results.items():
            if (entry.precision, entry.form) != (precision, form):
                continue
            tokens, seen = [], 0
            for step in runs[0].steps:
                seen += step["trained_tokens"]
                tokens.append(seen)
            axes.plot(tokens, [step["loss"] for step in runs[0].steps], label=entry.peer, linewidth=1.2, alpha=0.8)
        axes.set(title=f"{precision}, {form}", xlabel="trained tokens", ylabel="loss")
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
