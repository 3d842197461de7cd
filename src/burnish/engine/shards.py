"""Checkpoints of weights that lie on several ranks in parts: written by all at once, read back by any number of them under any strategy.

    checkpoints/step-000123/
        model-00001-of-00004.safetensors        the part of each trained weight that the first rank has
        optimizer-00001-of-00004.safetensors    its part of the optimiser's state
        shards.json                             of every tensor: its shape, and which rows (or columns, ...) are in which file
        optimizer.json, rng.safetensors, trainer.json, manifest.json      as in every checkpoint (see `engine.checkpoint`)

Every rank writes and hashes its own files into the unfinished folder; the first one adds the rest and renames the folder once all are
there. Tensors that are whole on every rank are shared out by size. A reader takes the part that it wants out of whichever files hold it,
so nobody ever has to hold a whole tensor who has but a part of it; the plain form of a checkpoint is read in the same way, and one in
parts by a single process as whole tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from burnish.core.errors import CheckpointError
from burnish.engine import checkpoint
from burnish.engine.checkpoint import Checkpoint, flatten, unflatten
from burnish.engine.parts import Part, Writing, local_part

__all__ = ["load", "save"]

INDEX = checkpoint.SHARDS
_KINDS = ("model", "optimizer")


def save(root: Path, content: Checkpoint, ranks: Writing) -> Path:
    """Writes a checkpoint with all ranks, each its parts. It exists when all have written theirs, or not at all.

    A thread may do it while training goes on, if `content` is a copy.

    Raises:
        StorageError: on every rank, where one of them could not write.
    """
    if not ranks.is_main:
        _follow(content, ranks)
        return root / f"step-{content.step:06d}"
    main = _Main(ranks, content)
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

    def __init__(self, ranks: Writing, content: Checkpoint) -> None:
        self._ranks = ranks
        self._content = content

    def write(self, folder: Path) -> dict[str, Any]:
        """All parts, into the unfinished checkpoint; returns what the manifest says of their files."""
        self._ranks.gather(folder)
        written = self._ranks.gather(_tried(folder, self._content, self._ranks))
        problems = [f"rank {rank}: {found}" for rank, found in enumerate(written) if isinstance(found, str)]
        if problems:
            raise OSError("; ".join(problems))
        index = {"format": checkpoint.FORMAT, "tensors": _index([parts for _, parts in written])}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        return {file: entry for entries, _ in written for file, entry in entries.items()}

    def tell(self, error: CheckpointError | None) -> None:
        """How it ended: before the others had a folder to write into, or after."""
        self._ranks.gather((type(error), error.message, error.hint) if error is not None else None)


def _follow(content: Checkpoint, ranks: Writing) -> None:
    """What every other rank does."""
    said = ranks.gather(None)[0]
    if isinstance(said, Path):
        ranks.gather(_tried(said, content, ranks))
        said = ranks.gather(None)[0]
    if said is not None:
        kind, message, hint = said
        raise kind(message, hint=hint)


def _tried(folder: Path, content: Checkpoint, ranks: Writing) -> Any:
    """What `_write_parts` gives, or what is wrong."""
    try:
        return _write_parts(folder, content, ranks)
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
        moments = {name: state.read(name, _part_of(name, entry.shape, names, layout)) for name, entry in state.entries.items()}
        return Checkpoint(
            step=manifest["step"],
            weights={name: weights.read(name, local_part(layout, name)) for name in weights.entries},
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
            return set(_open(folder, _KINDS[0], stack).entries)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor on the disk."""

    shape: tuple[int, ...]
    dim: int  # that it is cut along
    places: list[tuple[Any, int, int]]  # an open file, and from where to where along `dim` it holds the tensor


@dataclass(frozen=True, slots=True)
class _Stored:
    """Tensors on the disk, by name."""

    folder: Path
    entries: dict[str, _Entry]

    def read(self, name: str, part: Part | None) -> torch.Tensor:
        """A tensor, or the part of it that is wanted."""
        entry = self.entries[name]
        if part is not None and part.shape != entry.shape:
            raise CheckpointError(f"{self.folder}: {name} has shape {entry.shape}, expected {part.shape}")
        if not entry.shape or (part is None and len(entry.places) == 1):
            return entry.places[0][0].get_tensor(name)
        wanted = [slice(0, size) for size in entry.shape]
        if part is not None:
            wanted[part.dim] = slice(part.start, part.stop)
        along = wanted[entry.dim]
        found: list[torch.Tensor] = []
        for file, start, stop in entry.places:
            first, last = max(along.start, start), min(along.stop, stop)
            # Of nothing at all, what the last file gives has the right type.
            if first < last or (not found and file is entry.places[-1][0]):
                here = [*wanted[: entry.dim], slice(first - start, max(first, last) - start), *wanted[entry.dim + 1 :]]
                found.append(file.get_slice(name)[tuple(here)])
        return torch.cat(found, dim=entry.dim)


def _open(folder: Path, kind: str, stack: ExitStack) -> _Stored:
    def opened(name: str) -> Any:
        return stack.enter_context(safe_open(folder / name, framework="pt"))

    if not (folder / INDEX).is_file():
        file = opened(f"{kind}.safetensors")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # it is no mapping
        return _Stored(folder, {name: _Entry(shape, 0, [(file, 0, shape[0] if shape else 0)]) for name, shape in shapes.items()})
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tensors"][kind]
    files = {name: opened(name) for name in sorted({file for entry in index.values() for file, _, _ in entry["parts"]})}
    places = {name: [(files[file], start, stop) for file, start, stop in entry["parts"]] for name, entry in index.items()}
    return _Stored(folder, {name: _Entry(tuple(entry["shape"]), entry.get("dim", 0), places[name]) for name, entry in index.items()})


_Parts = dict[str, dict[str, tuple[str, Part]]]
"""By kind and tensor: the file, and the part of the whole that it holds."""


def owned(content: Checkpoint, ranks: Writing) -> Checkpoint:
    """The same, with nothing (torch's meta device) in the place of tensors that other ranks write."""
    structure, state = flatten(content.optimizer)
    mine = _mine(content, ranks)
    weights, state = (
        {name: tensor if name in mine[kind] else tensor.to("meta") for name, tensor in tensors.items()}
        for kind, tensors in zip(_KINDS, (content.weights, state), strict=True)
    )
    return replace(content, weights=weights, optimizer=unflatten(structure, state))


def _mine(content: Checkpoint, ranks: Writing) -> dict[str, dict[str, Part]]:
    """What this rank writes, by kind and name: its parts, and its share, by size, of tensors that are whole on every rank."""
    structure, state = flatten(content.optimizer)
    names = _parameter_names(structure)
    found: dict[str, dict[str, Part]] = {kind: {} for kind in _KINDS}
    for kind, tensors in zip(_KINDS, (content.weights, state), strict=True) if ranks.replica == 0 else ():
        whole: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            part = local_part(ranks.layout, name if kind == "model" else names.get(name.rpartition(".")[0], ""))
            if part is not None and tensor.shape == part.size:
                found[kind][name] = part
            else:
                whole[name] = tensor
        total, before = sum(tensor.nbytes for tensor in whole.values()), 0
        for name, tensor in whole.items():
            if min(before * ranks.shards // max(total, 1), ranks.shards - 1) == ranks.shard:
                found[kind][name] = Part(tuple(tensor.shape), 0, tensor.shape[0] if tensor.shape else 0)
            before += tensor.nbytes
    return found


def _write_parts(folder: Path, content: Checkpoint, ranks: Writing) -> tuple[dict[str, dict[str, Any]], _Parts]:
    """Writes what is this rank's to write; its entries for the manifest, and where each part is."""
    entries: dict[str, dict[str, Any]] = {}
    parts: _Parts = {kind: {} for kind in _KINDS}
    tensors = {"model": content.weights, "optimizer": flatten(content.optimizer)[1]}
    for kind, mine in _mine(content, ranks).items():
        if ranks.replica == 0:
            file = f"{kind}-{ranks.shard + 1:05d}-of-{ranks.shards:05d}.safetensors"
            entries[file] = checkpoint.write_tensors(folder / file, {name: tensors[kind][name] for name in mine})
            parts[kind] = {name: (file, part) for name, part in mine.items()}
    return entries, parts


def _index(ranks: list[_Parts]) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
    for kind, name, file, part in _listed(ranks):
        entry = index[kind].setdefault(name, {"shape": part.shape, "parts": []} | ({"dim": part.dim} if part.dim else {}))
        entry["parts"].append((file, part.start, part.stop))
    return index


def _listed(ranks: list[_Parts]) -> Iterator[tuple[str, str, str, Part]]:
    return ((kind, name, *place) for parts in ranks for kind, found in parts.items() for name, place in found.items())


def _parameter_names(structure: Any) -> dict[str, str]:
    """`state.3` -> the name of the parameter that the third state belongs to, as the groups tell."""
    groups: list[Any] = next((unflatten(value, {}) for key, value in structure["map"] if key == "param_groups"), [])
    return {f"state.{number}": name for group in groups for number, name in zip(group["params"], group["names"], strict=True)}


def _part_of(name: str, shape: tuple[int, ...], names: Mapping[str, str], layout: Mapping[str, Part]) -> Part | None:
    """The part of a tensor of the optimiser's state: that of its parameter, where it has its shape."""
    part = layout.get(names.get(name.rpartition(".")[0], ""))
    return part if part is not None and shape == part.shape else None
