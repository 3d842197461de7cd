"""Checkpoints of weights that lie in shards: written by all ranks at once, read back by any number of ranks under any strategy.

    checkpoints/step-000123/
        model-00001-of-00004.safetensors        the rows of each trained weight that the first shard has
        optimizer-00001-of-00004.safetensors    its part of the optimiser's state
        shards.json                             of every tensor: its shape, and which rows are in which file
        optimizer.json, rng.safetensors, trainer.json, manifest.json      as in every checkpoint (see `engine.checkpoint`)

Every rank writes and hashes its own files into the unfinished folder; the first one adds the rest and renames the folder once all are
there. A reader takes the rows that it wants out of whichever files hold them, so nobody ever has to hold a whole tensor who has but a
part of it; the unsharded form of a checkpoint is read in the same way, and sharded ones by a single process as whole tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from burnish.core.errors import CheckpointError
from burnish.engine import checkpoint
from burnish.engine.backend_fsdp import Part, Sharding, local_part
from burnish.engine.checkpoint import Checkpoint, flatten, unflatten

__all__ = ["load", "save"]

INDEX = checkpoint.SHARDS
_KINDS = ("model", "optimizer")


def save(root: Path, content: Checkpoint, sharding: Sharding) -> Path:
    """Writes a checkpoint whose weights are this rank's parts. All ranks take part; it exists when all have written theirs, or not at all.

    A thread may do it while training goes on, if `content` is a copy.

    Raises:
        StorageError: on every rank, where one of them could not write.
    """
    if not sharding.is_main:
        _follow(content, sharding)
        return root / f"step-{content.step:06d}"
    main = _Main(sharding, content)
    error: CheckpointError | None = None
    try:
        return checkpoint.save(root, content, parts=main.write)
    except CheckpointError as raised:
        error = raised
        raise
    finally:
        main.tell(error)


class _Main:
    """The first rank, which the others follow."""

    def __init__(self, sharding: Sharding, content: Checkpoint) -> None:
        self._sharding = sharding
        self._content = content

    def write(self, folder: Path) -> dict[str, Any]:
        """All parts, into the unfinished checkpoint; returns what the manifest says of their files."""
        self._sharding.gather(folder)
        written = self._sharding.gather(_tried(folder, self._content, self._sharding))
        problems = [f"rank {rank}: {found}" for rank, found in enumerate(written) if isinstance(found, str)]
        if problems:
            raise OSError("; ".join(problems))
        index = {"format": checkpoint.FORMAT, "tensors": _index([parts for _, parts in written])}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        return {file: entry for entries, _ in written for file, entry in entries.items()}

    def tell(self, error: CheckpointError | None) -> None:
        """How it ended: before the others had a folder to write into, or after."""
        self._sharding.gather((type(error), error.message, error.hint) if error is not None else None)


def _follow(content: Checkpoint, sharding: Sharding) -> None:
    """What every other rank does."""
    said = sharding.gather(None)[0]
    if isinstance(said, Path):
        sharding.gather(_tried(said, content, sharding))
        said = sharding.gather(None)[0]
    if said is not None:
        kind, message, hint = said
        raise kind(message, hint=hint)


def _tried(folder: Path, content: Checkpoint, sharding: Sharding) -> Any:
    """What `_write_parts` gives, or what is wrong."""
    try:
        return _write_parts(folder, content, sharding)
    except checkpoint.FAILURES as error:
        return str(error)


def load(folder: Path, layout: Mapping[str, Part]) -> Checkpoint:
    """Reads a checkpoint of either form, after checking it against its manifest.

    Args:
        folder: The checkpoint.
        layout: Which part of each trained weight this rank has; of the others, and of all where it is empty, it gets the whole.

    Raises:
        CheckpointError: a file is missing, torn or changed, or a weight has another shape.
    """
    manifest = checkpoint.verify(folder)
    structure = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    names = _parameter_names(structure)
    with ExitStack() as stack:
        weights, state = (_open(folder, kind, stack) for kind in _KINDS)
        moments = {name: state.read(name, _part_of(name, shape, names, layout)) for name, shape in state.shapes.items()}
        return Checkpoint(
            step=manifest["step"],
            weights={name: weights.read(name, local_part(layout, name)) for name in weights.shapes},
            optimizer=unflatten(structure, moments),
            rng=load_file(folder / "rng.safetensors"),
            trainer=checkpoint.trainer_of(folder),
        )


def weight_names(folder: Path) -> set[str]:
    """The weights that a checkpoint of either form holds, by what its files say, unverified.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        with ExitStack() as stack:
            return set(_open(folder, _KINDS[0], stack).shapes)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Stored:
    """Tensors on the disk: `places` are the file and the rows of it, each."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, list[tuple[Any, int, int]]]  # an open file, the rows of the whole tensor that it holds

    def read(self, name: str, part: Part | None) -> torch.Tensor:
        """A tensor, or the rows of it that are wanted."""
        shape = self.shapes[name]
        if part is not None and part.shape != shape:
            raise CheckpointError(f"{self.folder}: {name} has shape {shape}, expected {part.shape}")
        if not shape or (part is None and len(self.places[name]) == 1):
            return self.places[name][0][0].get_tensor(name)
        first, last = (part.start, part.stop) if part is not None else (0, shape[0])
        found = [
            file.get_slice(name)[max(first, start) - start : min(last, stop) - start]
            for file, start, stop in self.places[name]
            if max(first, start) < min(last, stop)
        ]
        # Of no rows at all, those of the first file have the right type.
        return torch.cat(found) if found else self.places[name][0][0].get_slice(name)[0:0]


def _open(folder: Path, kind: str, stack: ExitStack) -> _Stored:
    def opened(name: str) -> Any:
        return stack.enter_context(safe_open(folder / name, framework="pt"))

    if not (folder / INDEX).is_file():
        file = opened(f"{kind}.safetensors")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # it is no mapping
        return _Stored(folder, shapes, {name: [(file, 0, shape[0] if shape else 0)] for name, shape in shapes.items()})
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tensors"][kind]
    files = {name: opened(name) for name in sorted({file for entry in index.values() for file, _, _ in entry["parts"]})}
    return _Stored(
        folder,
        {name: tuple(entry["shape"]) for name, entry in index.items()},
        {name: [(files[file], start, stop) for file, start, stop in entry["parts"]] for name, entry in index.items()},
    )


_Parts = dict[str, dict[str, tuple[list[int], str, int, int]]]
"""By kind and tensor: its whole shape, the file, and the rows of the whole that the file holds."""


def _write_parts(folder: Path, content: Checkpoint, sharding: Sharding) -> tuple[dict[str, dict[str, Any]], _Parts]:
    """Writes this rank's parts; their entries for the manifest, and where each part is. The other copies of HSDP write nothing."""
    names = _parameter_names(flatten(content.optimizer)[0])
    entries: dict[str, dict[str, Any]] = {}
    parts: _Parts = {kind: {} for kind in _KINDS}
    if sharding.replica:
        return entries, parts
    tensors = {"model": content.weights, "optimizer": flatten(content.optimizer)[1]}
    for kind in _KINDS:
        file = f"{kind}-{sharding.shard + 1:05d}-of-{sharding.shards:05d}.safetensors"
        mine: dict[str, torch.Tensor] = {}
        for name, tensor in tensors[kind].items():
            part = local_part(sharding.layout, name if kind == "model" else names.get(name.rpartition(".")[0], ""))
            if part is not None and tensor.shape == (part.stop - part.start, *part.shape[1:]):
                parts[kind][name] = (list(part.shape), file, part.start, part.stop)
            elif sharding.shard == 0:  # a count of steps and the like: the same on every rank
                parts[kind][name] = (list(tensor.shape), file, 0, tensor.shape[0] if tensor.shape else 0)
            else:
                continue
            mine[name] = tensor
        entries[file] = checkpoint.write_tensors(folder / file, mine)
    return entries, parts


def _index(ranks: list[_Parts]) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
    for kind, name, (shape, *place) in _listed(ranks):
        index[kind].setdefault(name, {"shape": shape, "parts": []})["parts"].append(place)
    return index


def _listed(ranks: list[_Parts]) -> Iterator[tuple[str, str, tuple[list[int], str, int, int]]]:
    return ((kind, name, place) for parts in ranks for kind, found in parts.items() for name, place in found.items())


def _parameter_names(structure: Any) -> dict[str, str]:
    """`state.3` -> the name of the parameter that the third state belongs to, as the groups tell."""
    groups: list[Any] = next((unflatten(value, {}) for key, value in structure["map"] if key == "param_groups"), [])
    return {f"state.{number}": name for group in groups for number, name in zip(group["params"], group["names"], strict=True)}


def _part_of(name: str, shape: tuple[int, ...], names: Mapping[str, str], layout: Mapping[str, Part]) -> Part | None:
    """The part of a tensor of the optimiser's state: that of its parameter, where it has its shape."""
    part = layout.get(names.get(name.rpartition(".")[0], ""))
    return part if part is not None and shape == part.shape else None
