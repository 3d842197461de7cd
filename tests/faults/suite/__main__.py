"""`python -m tests.faults.suite`: runs the faults and prints a table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tests.faults.suite.processes import Server
from tests.faults.suite.tries import Lab, Result, Try, attempt

FAULTS = {
    "F1": "kill -9 at any instant",
    "F2": "signals, in every phase",
    "F3": "disk full",
    "F4": "a byte flipped",
    "F5": "files torn, missing, too many",
    "F6": "resumed again and again",
    "F7": "another number of processes",
    "F8": "settings or data changed",
    "F9": "gradients that are not finite",
    "F10": "a loss spike",
    "F11": "out of memory",
    "F12": "a rank hangs",
    "F13": "a rank dies",
    "F14": "retention goes wrong",
    "F15": "clocks and names lie",
    "F16": "storage that fails or vanishes",
    "F17": "two runs, one folder",
    "F18": "no optimiser state",
    "F19": "exactness of packing, ranks, cuts",
    "F20": "size of adapter checkpoints",
}
_MODULES = (
    "f01_kill",
    "f02_signals",
    "f03_disk",
    "f04_damage",
    "f06_resume",
    "f09_numbers",
    "f12_ranks",
    "f14_folder",
)


def tries(seed: int) -> Iterator[Try]:
    """All of them."""
    for name in _MODULES:
        yield from importlib.import_module(f"tests.faults.suite.{name}").tries(seed)


def main() -> int:
    """Runs what is asked for. Returns the exit code: 1 where any try was not survived."""
    words = argparse.ArgumentParser(prog="python -m tests.faults.suite", description="Put faults into real training runs.")
    words.add_argument("--only", metavar="F1,F4", help="these faults")
    words.add_argument("--match", metavar="WORD", help="the tries with this word in their name")
    words.add_argument("--tries", type=int, metavar="N", help="at most N tries of each fault, drawn")
    words.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    words.add_argument("--jobs", type=int, default=2, metavar="N", help="tries at the same time")
    words.add_argument("--json", type=Path, metavar="FILE", help="write every try's result")
    words.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders there")
    asked = words.parse_args()
    wanted = asked.only.upper().split(",") if asked.only else list(FAULTS)
    if unknown := [fault for fault in wanted if fault not in FAULTS]:
        words.error(f"there is no {unknown[0]}, expected some of {', '.join(FAULTS)}")
    chosen = [one for one in tries(asked.seed) if one.fault in wanted and (asked.match or "").lower() in one.name.lower()]
    if asked.tries:
        draw = random.Random(asked.seed)
        by_fault = {fault: [one for one in chosen if one.fault == fault] for fault in wanted}
        chosen = [one for some in by_fault.values() for one in draw.sample(some, min(asked.tries, len(some)))]
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="burnish-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        results = run(chosen, folder.resolve(), asked.seed, asked.jobs)
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    console = Console()
    console.print(table(results))
    for result in results:
        if not result.survived:
            console.print(f"{result.fault}  {result.name}: {result.said}", highlight=False, markup=False, soft_wrap=True)
    if asked.json:
        asked.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n")
    return 0 if results and all(result.survived for result in results) else 1


def run(chosen: list[Try], folder: Path, seed: int, jobs: int) -> list[Result]:
    """Makes the tries, several at a time."""
    server = Server()
    lab = Lab(folder, seed, server)
    results: list[Result] = []
    texts = [TextColumn("{task.description}"), TextColumn("{task.fields[failed]}")]
    columns = (texts[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), texts[1])
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
            task = progress.add_task("faults", total=len(chosen), failed="")
            for done in as_completed([pool.submit(attempt, one, lab) for one in chosen]):
                result = done.result()
                results.append(result)
                failed = sum(not one.survived for one in results)
                progress.update(task, advance=1, description=result.fault, failed=f"[red]{failed} not survived" if failed else "")
                if not result.survived:
                    progress.console.print(f"{result.fault}  {result.name}: not survived", markup=False, highlight=False)
    finally:
        server.close()
    order = {one.name: number for number, one in enumerate(chosen)}
    return sorted(results, key=lambda result: (int(result.fault[1:]), order[result.name]))


def table(results: list[Result]) -> Table:
    """A row a fault."""
    made = Table(title="Faults put into training runs", title_justify="left")
    for column in ("", "fault", "tries", "survived", "lost steps", "equal result"):
        made.add_column(column, justify="left" if column in ("", "fault", "equal result") else "right")
    for fault, what in FAULTS.items():
        rows = [result for result in results if result.fault == fault]
        if not rows:
            continue
        count, survived = sum(row.count for row in rows), sum(row.count for row in rows if row.survived)
        compared = [row.equal for row in rows if row.equal is not None]
        built = any(row.built for row in rows)
        share = f"{survived / count:.0%}"
        made.add_row(
            fault,
            what,
            str(count),
            share if built else "not built yet",
            str(max(row.lost for row in rows)),
            f"{sum(compared)} of {len(compared)}" if compared else "",
            style="" if survived == count else "red",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
