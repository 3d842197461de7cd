"""Checkpoints of shards: ranks are threads here, which meet where processes would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from burnish.core.errors import CheckpointError
from burnish.engine import checkpoint, shards
from burnish.engine.checkpoint import Checkpoint
from burnish.engine.parts import Part

SHAPES = {"embed": (7, 3), "norm": (5,), "scale": (1,), "reference/embed": (7, 3)}
ORDER = ["norm", "embed", "scale"]  # of the optimiser, in two groups


class Meeting:
    """Where the ranks of one save meet."""

    def __init__(self, world: int) -> None:
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=20)


class Ranks:
    """What a checkpoint asks of `parts.Writing`, for one of several threads."""

    def __init__(self, meeting: Meeting, rank: int, shards: int, layout: Callable[[int, int], dict[str, Part]]) -> None:
        self._meeting, self._rank = meeting, rank
        self.shards, self.shard, self.replica = shards, rank % shards, rank // shards
        self.is_main = rank == 0
        self.layout = layout(rank % shards, shards)

    def gather(self, value: Any) -> list[Any]:
        self._meeting.values[self._rank] = value
        self._meeting.barrier.wait()
        found = list(self._meeting.values)
        self._meeting.barrier.wait()
        return found


def layout(shard: int, shards: int) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name in ORDER:
        rows = SHAPES[name][0]
        full = -(-rows // shards)
        start = min(shard * full, rows)
        parts[name] = Part(SHAPES[name], start, min(start + full, rows))
    return parts


def columns(shard: int, shards: int) -> dict[str, Part]:
    """As layers are cut: some weights by columns, the others whole."""
    assert shards == 3
    return {"embed": Part(SHAPES["embed"], shard, shard + 1, dim=1)}


def content(parts: dict[str, Part]) -> Checkpoint:
    """The same state whoever holds which part of it."""
    draw = torch.Generator().manual_seed(0)  # of its own: threads share the other one
    wholes = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    moments = {name: torch.randn(SHAPES[name], generator=draw) for name in ORDER}

    def cut(name: str, whole: torch.Tensor) -> torch.Tensor:
        part = parts.get(name.removeprefix("reference/"))
        return whole if part is None else whole.narrow(part.dim, part.start, part.stop - part.start)

    state = {n: {"step": torch.tensor(4.0), "exp_avg": cut(name, moments[name])} for n, name in enumerate(ORDER)}
    groups = [{"lr": 0.1, "params": [0], "names": ORDER[:1]}, {"lr": 0.2, "params": [1, 2], "names": ORDER[1:]}]
    return Checkpoint(
        step=4,
        weights={name: cut(name, whole) for name, whole in wholes.items()},
        optimizer={"state": state, "param_groups": groups},
        rng={"rank0.torch": torch.arange(3, dtype=torch.uint8)},
        trainer={"state": {"step": 4}},
    )


def save(root: Path, world: int, shards_: int, layout: Callable[[int, int], dict[str, Part]] = layout) -> list[Any]:
    meeting = Meeting(world)

    def one(rank: int) -> Any:
        ranks = Ranks(meeting, rank, shards_, layout)
        try:
            return shards.save(root, content(ranks.layout), ranks)  # pyright: ignore[reportArgumentType]
        except CheckpointError as error:
            return str(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    assert found.optimizer["param_groups"] == expected.optimizer["param_groups"]
    for number, state in expected.optimizer["state"].items():
        assert all(torch.equal(found.optimizer["state"][number][key], value) for key, value in state.items())
    assert (found.step, found.trainer) == (expected.step, expected.trainer)
    assert torch.equal(found.rng["rank0.torch"], expected.rng["rank0.torch"])


@pytest.mark.parametrize(("world", "cut"), [(2, 2), (3, 3), (4, 2), (8, 8)])
@pytest.mark.parametrize("readers", [1, 2, 3, 5, 9])
def test_written_by_some_and_read_by_others(tmp_path: Path, world: int, cut: int, readers: int):
    folder = tmp_path / "step-000004"
    assert save(tmp_path, world, cut) == [folder] * world
    assert len(list(folder.glob("model-*.safetensors"))) == cut
    assert_equal(shards.load(folder, {}), content({}))
    for reader in range(readers):
        parts = layout(reader, readers)
        assert_equal(shards.load(folder, parts), content(parts))


@pytest.mark.parametrize("world", [3, 6])
def test_cut_by_columns_or_by_rows_is_the_same_checkpoint(tmp_path: Path, world: int):
    folder = tmp_path / "step-000004"
    assert save(tmp_path, world, 3, columns) == [folder] * world
    names = [set(safetensors.torch.load_file(file)) for file in sorted(folder.glob("model-*"))]
    parts = {"embed", "reference/embed"}
    assert names == [parts | {"norm"}, parts, parts | {"scale"}]  # what is whole is shared out by size
    assert_equal(shards.load(folder, {}), content({}))
    other = save(tmp_path / "rows", 2, 2)[0]
    for reader in range(3):
        for cut in (columns, layout):
            assert_equal(shards.load(folder, cut(reader, 3)), content(cut(reader, 3)))
            assert_equal(shards.load(other, cut(reader, 3)), content(cut(reader, 3)))


@pytest.mark.parametrize(("world", "writers"), [(2, 2), (3, 3), (5, 3)])
def test_ranks_that_hold_everything_write_a_share_each(tmp_path: Path, world: int, writers: int):
    folder = tmp_path / "step-000004"
    assert save(tmp_path, world, writers, lambda shard, shards: {}) == [folder] * world
    held = [safetensors.torch.load_file(file) for file in sorted(folder.glob("*-of-*.safetensors"))]
    assert len(held) == 2 * writers
    names = [name for file in held for name in file]
    assert len(names) == len(set(names)) == len(SHAPES) + 2 * len(ORDER)
    assert_equal(shards.load(folder, {}), content({}))
    assert_equal(shards.load(folder, layout(1, 2)), content(layout(1, 2)))


def test_what_others_write_takes_no_memory(tmp_path: Path):
    meeting = Meeting(2)
    found = [shards.owned(content({}), Ranks(meeting, rank, 2, lambda shard, shards: {})) for rank in range(2)]  # pyright: ignore[reportArgumentType]
    for name in SHAPES:
        assert sorted(one.weights[name].is_meta for one in found) == [False, True]
    for number in range(len(ORDER)):
        for key in ("step", "exp_avg"):
            assert sorted(one.optimizer["state"][number][key].is_meta for one in found) == [False, True]


@pytest.mark.parametrize("readers", [2, 3])
def test_shards_go_on_from_a_whole_checkpoint(tmp_path: Path, readers: int):
    folder = checkpoint.save(tmp_path, content({}))
    assert_equal(shards.load(folder, {}), checkpoint.load(folder))
    for reader in range(readers):
        parts = layout(reader, readers)
        assert_equal(shards.load(folder, parts), content(parts))


def test_a_change_in_any_rank_s_file_is_found(tmp_path: Path):
    (folder, *_) = save(tmp_path, 2, 2)
    file = folder / "optimizer-00002-of-00002.safetensors"
    torn = bytearray(file.read_bytes())
    torn[-1] ^= 1
    file.write_bytes(torn)
    with pytest.raises(CheckpointError, match=r"optimizer-00002-of-00002\.safetensors has changed"):
        shards.load(folder, {})
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoint.newest(tmp_path)


def test_a_weight_of_another_shape_is_named(tmp_path: Path):
    (folder, *_) = save(tmp_path, 2, 2)
    with pytest.raises(CheckpointError, match=r"norm has shape \(5,\), expected \(6,\)"):
        shards.load(folder, layout(0, 2) | {"norm": Part((6,), 0, 3)})


def failing(which: str, error: Exception) -> Callable[..., Any]:
    write = checkpoint.write_tensors

    def written(path: Path, tensors: Any) -> Any:
        if which in path.name:
            raise error
        return write(path, tensors)

    return written


@pytest.mark.parametrize("which", ["model-00001", "optimizer-00002"])
def test_one_rank_that_fails_is_heard_of_by_all(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "write_tensors", failing(which, OSError(28, "No space left on device")))
    heard = save(tmp_path, 2, 2)
    assert len(set(heard)) == 1
    assert f"rank {int(which[-1]) - 1}: [Errno 28] No space left on device" in heard[0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_heard_of_by_all(tmp_path: Path):
    (tmp_path / "file").write_text("")
    heard = save(tmp_path / "file", 2, 2)
    assert len(set(heard)) == 1 and "could not be written" in heard[0]


@pytest.mark.parametrize("which", ["model-00001", "optimizer-00002"])
def test_a_rank_without_memory_for_its_files_is_heard_of_by_all(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "write_tensors", failing(which, RuntimeError("can't allocate memory")))
    heard = save(tmp_path, 2, 2)
    assert len(set(heard)) == 1
    assert f"rank {int(which[-1]) - 1}: can't allocate memory" in heard[0]


def test_what_the_first_rank_fails_at_beside_its_shards_is_heard_of_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no memory for the random states")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda path, tensors: path.write_bytes(b"") and {})
    heard = save(tmp_path, 2, 2)
    assert len(set(heard)) == 1 and "step-000004 could not be written: no memory for the random states" in heard[0]
