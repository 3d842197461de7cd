"""Checkpoints on the disk: exact, whole or not there, and never the last one gone."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import CheckpointError
from burnish.engine import checkpoint
from burnish.engine.checkpoint import Checkpoint, flatten, folders, load, newest, prune, save, step_of, unflatten


def example(step: int = 3) -> Checkpoint:
    shared = torch.arange(6.0)
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {"map": shared[:3], "same": shared[3:], "n": 7}}
    return Checkpoint(
        step=step,
        weights={"a.weight": torch.randn(4, 2), "a.bias": torch.randn(2).bfloat16()},
        optimizer={"state": state, "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "fused": None}]},
        rng={"rank0.torch": torch.get_rng_state()},
        trainer={"epoch": 1 / 3, "best": None},
    )


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_a_checkpoint_comes_back_exactly(tmp_path: Path):
    saved = example()
    folder = save(tmp_path, saved)
    assert folder.name == "step-000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003"]
    loaded = load(folder)
    for part in ("weights", "optimizer", "rng", "trainer"):
        assert same(getattr(saved, part), getattr(loaded, part)), part


def test_nothing_is_pickled(tmp_path: Path):
    names = {path.name for path in save(tmp_path, example()).iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "trainer.json", "manifest.json"}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=12,
)


@given(values)
def test_any_state_survives_json(state: object):
    structure, tensors = flatten(state)
    assert same(unflatten(json.loads(json.dumps(structure)), tensors), state)


def test_what_cannot_be_held_is_named():
    with pytest.raises(CheckpointError, match=r"'state.3.odd' is a set"):
        flatten({"state": {3: {"odd": {1}}}})


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "trainer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_checkpoint_before_it_is_taken(tmp_path: Path, name: str, damage: str):
    good, bad = save(tmp_path, example(3)), save(tmp_path, example(12))
    file = bad / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(bytes(content) if damage == "flip" else bytes(content[:-5]))
    with pytest.raises(CheckpointError, match=name):
        load(bad)
    assert newest(tmp_path) == good


def test_a_missing_manifest_means_unfinished(tmp_path: Path):
    folder = save(tmp_path, example())
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*manifest.json is missing"):
        newest(tmp_path)


def test_where_all_are_damaged_each_is_named_once_and_briefly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for step, name in ((1, "optimizer.json"), (2, "model.safetensors"), (3, "trainer.json")):
        (save(tmp_path, example(step)) / name).unlink()
    with pytest.raises(CheckpointError) as refused:
        newest(tmp_path)
    missing = ["step-000003/trainer.json", "step-000002/model.safetensors", "step-000001/optimizer.json"]
    lines = [f"no checkpoint in {tmp_path} is whole:", *(f"  {name} is missing from the checkpoint" for name in missing)]
    assert str(refused.value).splitlines() == lines and capsys.readouterr().err == ""
    good = save(tmp_path, example(0))
    assert newest(tmp_path) == good and capsys.readouterr().err.count("is missing from the checkpoint; the checkpoint before it is") == 3


def test_no_checkpoint_at_all(tmp_path: Path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None


def test_the_newest_has_the_highest_step_whatever_the_width_of_the_number(tmp_path: Path):
    for step in (2, 1_000_000, 10):
        save(tmp_path, example(step))
    assert [step_of(folder) for folder in folders(tmp_path)] == [2, 10, 1_000_000]
    assert newest(tmp_path) == tmp_path / "step-1000000"


@pytest.mark.parametrize(("keep", "best", "left"), [(2, None, [4, 5]), (1, 2, [2, 5]), (3, 4, [3, 4, 5]), (9, None, [1, 2, 3, 4, 5])])
def test_old_checkpoints_go_the_best_and_the_newest_stay(tmp_path: Path, keep: int, best: int | None, left: list[int]):
    for step in range(1, 6):
        save(tmp_path, example(step))
    prune(tmp_path, keep=keep, best=best)
    assert [step_of(folder) for folder in folders(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


@pytest.mark.parametrize("call", ["save_file", "_write_json", "flush", "_fingerprint"])
def test_a_failing_write_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    good = save(tmp_path, example(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, call, full)
    with pytest.raises(CheckpointError, match=r"step-000002 could not be written: .*No space left"):
        save(tmp_path, example(2))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [good]
    assert newest(tmp_path) == good


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(CheckpointError, match="MB are free"):
        save(tmp_path, example())
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_replacing_a_checkpoint_brings_the_old_one_back(tmp_path: Path):
    folder = save(tmp_path, example(5))
    folder.rename(tmp_path / ".replaced-step-000005")
    (tmp_path / ".unfinished-step-000005").mkdir()
    assert newest(tmp_path) == folder
