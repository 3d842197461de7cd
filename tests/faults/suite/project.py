"""A tiny but real project, and what a finished run of it left behind."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tests.faults.suite.processes import Ended, Server, Started, command, start

STEPS = 14
SAVE_EVERY = 2

_COMMON = """
model: {shared}/model
data: {{train: {shared}/{rows}, eval: 0.2, max_length: 96, cache: ./cache, workers: 1}}
train: {{steps: 14, batch_size: 7, micro_batch_tokens: 200, learning_rate: {rate}, schedule: cosine, precision: {precision}}}
evaluation: {{every: 3st}}
save: {{every: 2st}}
output: run
{more}
"""
_LORA = "adapter: {kind: lora, rank: 4, dropout: 0.1}"
KINDS = {
    "lora": {"rows": "chats.jsonl", "rate": 0.01, "precision": "float32", "more": _LORA},
    "full": {"rows": "chats.jsonl", "rate": 0.001, "precision": "bfloat16", "more": ""},
    "dpo": {"rows": "pairs.jsonl", "rate": 0.01, "precision": "bfloat16", "more": f"{_LORA}\nobjective: dpo"},
    "dpo-full": {
        "rows": "pairs.jsonl",
        "rate": 0.001,
        "precision": "float32",
        "more": "objective: {kind: dpo, sync: {every: 3st, mix: 0.5}}",
    },
}
"""Adapter with dropout, whole model; SFT, DPO, DPO with a reference that moves; float32 and bfloat16. 32 examples in steps of 7, packed
into several micro-batches: an epoch has a last step that is smaller."""

SHARED = "shared"
EXACT = ("train.batch_size=8", "adapter.dropout=0")
"""For comparing runs that differ in the cut of their steps: no dropout."""

_UNTIMED = frozenset({"seconds", "tokens_per_second", "eval_seconds"})


@dataclass(frozen=True)
class Finished:
    """What a finished run left behind, without anything that the clock had a hand in."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    weights: dict[str, str]
    """sha256 of every tensor of the model that was saved and of the last checkpoint."""

    def assert_equal(self, other: Finished) -> None:
        """Bit-equal, or an AssertionError that names the first difference."""
        for what in ("steps", "evaluations"):
            mine, theirs = ({line["step"]: line for line in getattr(one, what)} for one in (self, other))
            numbers = [line["step"] for line in getattr(self, what)]
            assert len(set(numbers)) == len(numbers), f"{what} are there twice: {numbers}"
            assert numbers == [line["step"] for line in getattr(other, what)], f"{what} are {numbers}, expected {list(theirs)}"
            for number in mine:
                assert mine[number] == theirs[number], f"{what}, step {number}: {mine[number]} != {theirs[number]}"
        assert self.weights.keys() == other.weights.keys(), sorted(self.weights.keys() ^ other.weights.keys())
        different = [name for name in self.weights if self.weights[name] != other.weights[name]]
        assert not different, f"{len(different)} tensors differ, the first is {different[0]}"

    def assert_close(self, other: Finished, *, relative: float = 1e-5) -> None:
        """The same examples in each step, exactly, and the same loss up to the order of additions."""
        assert [line["step"] for line in self.steps] == [line["step"] for line in other.steps]
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            for key in ("tokens", "trained_tokens", "learning_rate"):
                assert mine[key] == theirs[key], f"step {mine['step']}: {key} is {mine[key]}, expected {theirs[key]}"
            for key in ("loss", "grad_norm"):
                assert abs(mine[key] - theirs[key]) <= relative * abs(theirs[key]), f"step {mine['step']}: {key} {mine[key]}, {theirs[key]}"


@dataclass
class Project:
    """A folder with a model, rows and a run file; its run folder is `run`."""

    folder: Path
    overrides: tuple[str, ...]
    server: Server
    processes: list[Started] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def checkpoints(self) -> list[Path]:
        """Those under a good name, oldest first."""
        root = self.run / "checkpoints"
        return sorted(root.glob("step-*"), key=lambda path: int(path.name[5:]))

    @property
    def steps_logged(self) -> int:
        """The last step that metrics.jsonl tells of."""
        lines = read_lines(self.run / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def start(self, *overrides: str, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None, **options: Any) -> Started:
        """`burnish train run.yaml` as anybody starts it."""
        words = command(*prefix, "train", "run.yaml", *self.overrides, *overrides)
        return start(words, self.folder, environment, **options)

    def train(self, *faults: Mapping[str, Any], overrides: Sequence[str] = (), timeout: float = 120) -> Ended:
        """Trains with faults put in: until it ends by itself."""
        return self.begin(*faults, overrides=overrides).wait(timeout)

    def begin(self, *faults: Mapping[str, Any], overrides: Sequence[str] = (), **options: Any) -> Started:
        """Starts to train, with faults put in."""
        return self.server.start(["train", "run.yaml", *self.overrides, *overrides], self.folder, list(faults), **options)

    def finished(self) -> Finished:
        """What the run left behind."""
        newest = self.checkpoints[-1]
        kept = [file for file in sorted(newest.glob("*.safetensors")) if not file.name.startswith("rng")]  # in shards or whole
        assert kept, f"there are no tensors in {newest}"
        files = [*sorted((self.run / "model").glob("*.safetensors")), *kept]
        tensors = {f"{newest.name if file.parent == newest else 'model'}/{file.name}": file for file in files}
        return Finished(
            [untimed(line) for line in read_lines(self.run / "metrics.jsonl")],
            [untimed(line) for line in read_lines(self.run / "eval.jsonl")],
            {f"{place}:{name}": digest for place, file in tensors.items() for name, digest in digests(file).items()},
        )

    def copy(self, folder: Path) -> Project:
        """The same in another folder; the model and the rows are where they were, as the checkpoints remember."""
        shutil.copytree(self.folder, folder)
        settings = folder / "run" / "run.yaml"
        settings.write_text(settings.read_text().replace(str(self.folder), str(folder)))
        return Project(folder, self.overrides, self.server)

    def picture(self, *without: str) -> dict[str, str]:
        """Every file of the run folder and its sha256, to see that nothing was touched."""
        return {str(p.relative_to(self.run)): sha256(p) for p in sorted(self.run.rglob("*")) if p.is_file() and p.name not in without}

    def assert_tidy(self) -> None:
        """Nothing half-done is left lying about after a run that ended well."""
        half = re.compile(r"unfinished|discarded|replaced|\.new-")
        left = [str(path.relative_to(self.run)) for path in self.run.rglob("*") if half.search(path.name)]
        assert not left, f"left behind: {left}"


def build(folder: Path, kind: str, overrides: Sequence[str], *, server: Server) -> Project:
    """Writes a project of one of KINDS."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(_COMMON.format(**KINDS[kind], shared=folder.parent / SHARED))
    if "adapter" not in KINDS[kind]["more"]:
        overrides = [word for word in overrides if not word.startswith("adapter.")]
    return Project(folder, tuple(overrides), server)


def prepare(folder: Path) -> None:
    """Writes the model and the rows of all projects; a checkpoint remembers where they are."""
    from tests.conftest import write_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_model(folder / "model")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"the user asks {n} " * (1 + n % 3)},
                {"role": "assistant", "content": f"the assistant answers {n} " * (1 + n % 4)},
            ]
        }
        for n in range(40)
    ]
    pairs = [
        {
            "prompt": f"the user asks {n} ",
            "chosen": f"the assistant answers {n} " * (1 + n % 3),
            "rejected": f"in full sentences {n} " * (1 + n % 2),
        }
        for n in range(40)
    ]
    for name, rows in (("chats.jsonl", chats), ("pairs.jsonl", pairs)):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a .jsonl file; a last one that is cut off is left out, any other is an error."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def untimed(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics without what the clock says."""
    return {key: value for key, value in line.items() if key not in _UNTIMED}


def digests(file: Path) -> dict[str, str]:
    """sha256 of each tensor of a safetensors file: of its bytes, so that NaNs compare too."""
    import torch

    with safe_open(file, "pt") as tensors:
        return {
            name: hashlib.sha256(tensors.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name in tensors.keys()  # no mapping
        }


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def resumed_from(said: str) -> int | None:
    """The step that a run said it goes on from."""
    found = re.search(r"going on from \S*step-0*(\d+)", said)
    return int(found[1]) if found else None
