"""Checkpoints: what they hold, how they are written so that no crash can spoil one, and how a run goes on from them exactly.

    checkpoints/step-000123/
        model.safetensors        the trained weights, by parameter name
        optimizer.safetensors    every tensor of the optimiser's state
        optimizer.json           its scalars and its shape: where each tensor belongs
        rng.safetensors          random states of torch, of every rank
        trainer.json             step, loader, NumPy's and Python's random states, best result, identity of the run, versions
        manifest.json            size and sha256 of every other file, and a sha256 of its own

Nothing is pickled, so nothing in a checkpoint can run code. A checkpoint is written into a folder of another name, every file is flushed
to the disk, and one rename makes it exist. `newest` believes a checkpoint only when its manifest holds, and takes the one before otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from burnish.core.errors import CheckpointError, StorageError
from burnish.core.log import warn
from burnish.core.storage import flush, free_bytes

__all__ = [
    "Checkpoint",
    "flatten",
    "folder_of",
    "folders",
    "load",
    "newest",
    "prune",
    "save",
    "set_aside",
    "step_of",
    "unflatten",
    "verify",
]

FORMAT = 2
FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "trainer.json")
SHARDS = "shards.json"  # stands in place of the first two, and says which files hold what (see `engine.shards`)
FAILURES = (OSError, ValueError, SafetensorError, MemoryError, RuntimeError)  # of storage, and of memory for what goes there
_NAME = re.compile(r"^step-(\d{6,})$")
_DISCARDED = ".discarded-"
_REPLACED = ".replaced-"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All of a training run at one step."""

    step: int
    weights: dict[str, torch.Tensor]
    """Trained weights by parameter name."""
    optimizer: dict[str, Any]
    """The optimiser's `state_dict()`."""
    rng: dict[str, torch.Tensor]
    trainer: dict[str, Any]
    """JSON-able: everything else."""


Parts = Callable[[Path], Mapping[str, Any]]
"""Writes the tensors of weights and optimiser into a folder in another way; returns what the manifest says of each file."""


def save(root: Path, checkpoint: Checkpoint, *, parts: Parts | None = None) -> Path:
    """Writes a checkpoint under `root` and returns its folder. All or nothing: an error leaves the older checkpoints as they were.

    Args:
        root: Where the checkpoints are.
        checkpoint: What to write.
        parts: Who writes weights that lie in shards (see `engine.shards`).

    Raises:
        StorageError: the disk is full or refuses to be written, or memory has no room for what goes there.
    """
    target = folder_of(root, checkpoint.step)
    unfinished = root / f"{_UNFINISHED}{target.name}"
    structure, tensors = flatten(checkpoint.optimizer)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(root)
        _need_space(root, [checkpoint.weights, tensors, checkpoint.rng])
        unfinished.mkdir()
        known = parts(unfinished) if parts is not None else {}
        if parts is None:
            save_file(_plain(checkpoint.weights), unfinished / "model.safetensors", metadata={"format": "pt"})
            save_file(_plain(tensors), unfinished / "optimizer.safetensors")
        save_file(_plain(checkpoint.rng), unfinished / "rng.safetensors")
        _write_json(unfinished / "optimizer.json", structure)
        _write_json(unfinished / "trainer.json", checkpoint.trainer)
        files = {path.name: known.get(path.name) or _fingerprint(path) for path in sorted(unfinished.iterdir())}
        _write_json(unfinished / "manifest.json", _sealed({"format": FORMAT, "step": checkpoint.step, "files": files}))
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        if target.exists():  # the same step again, after a resume from an older one: it steps aside, to come back after a crash
            target.rename(root / f"{_REPLACED}{target.name}")
        unfinished.rename(target)
        flush(root)
        _clear_leftovers(root)
    except FAILURES as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StorageError(f"{target} could not be written: {error}", hint=_what_is_left(root)) from error
    return target


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint after checking it against its manifest.

    Raises:
        CheckpointError: a file is missing, torn or changed.
    """
    manifest = verify(folder)
    return Checkpoint(
        step=manifest["step"],
        weights=load_file(folder / "model.safetensors"),
        optimizer=unflatten(_read_json(folder / "optimizer.json"), load_file(folder / "optimizer.safetensors")),
        rng=load_file(folder / "rng.safetensors"),
        trainer=_read_json(folder / "trainer.json"),
    )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes one file of tensors and flushes it to the disk; returns what the manifest says of it.

    Raises:
        OSError: the disk is full or refuses to be written.
    """
    _need_space(path.parent, [tensors])
    save_file(_plain(tensors), path, metadata={"format": "pt"})
    flush(path)
    return _fingerprint(path)


def trainer_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint remembers beside its tensors, unverified: for a look before anything is loaded.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _read_json(folder / "trainer.json")


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = _manifest_of(folder)
    for name in FILES[2:] if SHARDS in manifest["files"] else FILES:
        if name not in manifest["files"]:
            raise CheckpointError(f"{folder / 'manifest.json'} does not list {name}, which belongs to a checkpoint")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing from the checkpoint")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} is torn: {size} bytes, expected {expected['bytes']}")
        if _fingerprint(file) != expected:
            raise CheckpointError(f"{file} has changed since it was written: its sha256 differs from the manifest's")
    return manifest


def _manifest_of(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no finished checkpoint: manifest.json is missing")
    manifest = _read_json(path)
    if not isinstance(manifest, dict) or _sealed(cast("dict[str, Any]", manifest)) != manifest:
        raise CheckpointError(f"{path} has changed since it was written: its own sha256 differs")
    found = cast("dict[str, Any]", manifest)
    if found.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {found.get('format')!r}, expected {FORMAT}", hint="it was written by another version")
    if found.get("step") != step_of(folder):
        raise CheckpointError(f"{path} is that of step {found.get('step')}, expected step {step_of(folder)}")
    return found


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a sha256 of its own."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def newest(root: Path) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none at all. Damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and every one of them is damaged.
    """
    problems: list[str] = []
    _recover(root)
    for folder in reversed(folders(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"{problem}; the checkpoint before it is tried")
        return folder
    if problems:
        # The folder is named already, and each of them is listed once.
        each = [problem.replace(f"{root}{os.sep}", "") for problem in problems]
        listed = f" {each[0]}" if len(each) == 1 else "".join(f"\n  {problem}" for problem in each)
        raise CheckpointError(f"no checkpoint in {root} is whole:{listed}", hint="move the folder away to start anew")
    return None


def set_aside(root: Path, newest: Path) -> None:
    """Renames what is newer than the newest whole checkpoint to `damaged-step-...`: it must not count as one that is kept."""
    for folder in folders(root):
        if step_of(folder) > step_of(newest):
            target = root / f"damaged-{folder.name}"
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


def folders(root: Path) -> list[Path]:
    """Finished checkpoints under `root`, oldest first. Ordered by step, not by name or time stamp."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and _NAME.match(path.name)), key=step_of)


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return root / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    match = _NAME.match(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint, expected a folder named like step-000123")
    return int(match[1])


def prune(root: Path, *, keep: int, best: int | None = None) -> None:
    """Deletes old checkpoints: the `keep` newest stay, the one of step `best`, and those that are marked as permanent.

    To be called after a `save` returned: then the newest one is on the disk in full. Steps alone decide, never time stamps, and a folder
    is renamed before it is emptied, so that a crash cannot leave half a checkpoint under a good name.
    """
    for folder in folders(root)[: -max(1, keep)]:
        if step_of(folder) != best and not _is_permanent(folder):
            folder.rename(root / f"{_DISCARDED}{folder.name}")
    _clear_leftovers(root)


def _is_permanent(folder: Path) -> bool:
    try:
        return bool(trainer_of(folder).get("permanent"))
    except CheckpointError:  # torn: nothing to keep
        return False


def flatten(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Splits a nested state into JSON and tensors. `unflatten` puts the same thing together again, key types and tuples included."""
    tensors: dict[str, torch.Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"map": [[key, visit(item, f"{path}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [visit(item, f"{path}.{number}".lstrip(".")) for number, item in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(f"the state at '{path}' is a {type(value).__name__}, which a checkpoint cannot hold")

    return visit(state, ""), tensors


def unflatten(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `flatten`."""
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    makers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[content],
        "map": lambda: {key: unflatten(item, tensors) for key, item in content},
        "list": lambda: [unflatten(item, tensors) for item in content],
        "tuple": lambda: tuple(unflatten(item, tensors) for item in content),
    }
    return makers[kind]()


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, and no two of them in the same memory: what safetensors can store."""
    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        # An empty tensor has no memory to share, a view has some of another's.
        pointer = copy.untyped_storage().data_ptr()
        if copy.numel() and (pointer in seen or copy.untyped_storage().nbytes() != copy.nbytes):
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        plain[name] = copy
    return plain


def _what_is_left(root: Path) -> str:
    """What to do after a failed save, by what there is to go on from."""
    there = folders(root) if root.is_dir() else []
    left = f"the newest checkpoint is that of step {step_of(there[-1]):,}" if there else "there is no checkpoint yet"
    return f"{left}; free some space and run the command again"


def _need_space(root: Path, groups: Iterable[Mapping[str, torch.Tensor]]) -> None:
    need = sum(tensor.nbytes for group in groups for tensor in group.values()) + (1 << 20)
    free = free_bytes(root)
    if free is not None and free < need:
        raise OSError(f"it needs {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")


def _clear_leftovers(root: Path) -> None:
    _recover(root)
    for path in list(root.iterdir()):
        if path.name.startswith((_UNFINISHED, _DISCARDED, _REPLACED)):
            shutil.rmtree(path, ignore_errors=True)


def _recover(root: Path) -> None:
    """Brings back a checkpoint that had stepped aside for one that was never finished."""
    for path in list(root.glob(f"{_REPLACED}*")):
        original = root / path.name.removeprefix(_REPLACED)
        if not original.exists():
            path.rename(original)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, value: Any) -> None:
    # Python writes the shortest text that reads back as the same float, so numbers are exact.
    path.write_text(json.dumps(value, allow_nan=False, indent=None), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
