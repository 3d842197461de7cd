"""Checkpoints beside the training: what was copied is what is written, one at a time, and storage that fails ends no run."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from burnish.core.errors import StorageError
from burnish.engine import checkpoint
from burnish.engine import writer as module
from burnish.engine.checkpoint import Checkpoint
from burnish.engine.writer import Writer


def content(step: int, *, permanent: bool = False) -> Checkpoint:
    weights = {"a": torch.full((3,), float(step))}
    optimizer = {"state": {0: {"exp_avg": torch.full((3,), -float(step))}}, "param_groups": [{"lr": 0.1}]}
    return Checkpoint(step, weights, optimizer, {"torch": torch.get_rng_state()}, {"permanent": permanent})


def steps(root: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.folders(root)]


@pytest.mark.parametrize("background", [True, False])
def test_what_the_weights_were_is_written_and_not_what_they_became(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    go, real = threading.Event(), checkpoint.save

    def slow(root: Path, saved: Checkpoint) -> Path:
        if background:
            assert go.wait(20)
        return real(root, saved)

    monkeypatch.setattr(checkpoint, "save", slow)
    with Writer(tmp_path, keep=2, background=background) as writer:
        saved = content(3)
        writer.write(saved)
        for tensor in (saved.weights["a"], saved.optimizer["state"][0]["exp_avg"]):
            tensor.zero_()  # the next step
        assert [written.step for written in writer.finished()] == ([] if background else [3])
        go.set()
    found = checkpoint.load(tmp_path / "step-000003")
    assert found.weights["a"].tolist() == [3.0] * 3 and found.optimizer["state"][0]["exp_avg"].tolist() == [-3.0] * 3


def test_one_after_the_other_and_the_old_ones_go(tmp_path: Path) -> None:
    with Writer(tmp_path, keep=2) as writer:
        for step in (1, 2, 3, 4, 5, 6):
            writer.write(content(step, permanent=step == 3), best=1)
        writer.wait()
        assert [(written.step, written.error) for written in writer.finished()] == [(step, None) for step in range(1, 7)]
        assert writer.finished() == []
    assert steps(tmp_path) == [1, 3, 5, 6]


def test_without_room_for_a_copy_the_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 30.0)
    writer = Writer(tmp_path, keep=1)
    writer.write(content(1))
    assert [written.step for written in writer.finished()] == [1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Writer(tmp_path / "none", keep=1, active=False) as writer:
        writer.write(content(1))
    assert writer.finished() == [] and not (tmp_path / "none").exists()


@pytest.mark.parametrize(("number", "tries"), [(errno.EIO, 3), (errno.ESTALE, 3), (errno.ENOSPC, 1), (errno.EROFS, 1), (errno.EACCES, 1)])
def test_storage_that_hesitates_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tries: int) -> None:
    asked: list[int] = []

    def fail(root: Path, saved: Checkpoint) -> Path:
        asked.append(saved.step)
        raise StorageError("no") from OSError(number, "no")

    monkeypatch.setattr(checkpoint, "save", fail)
    with Writer(tmp_path, keep=1, delays=(0.0, 0.0)) as writer:
        writer.write(content(1))
        writer.wait()
        (written,) = writer.finished()
    assert written.error is not None and asked == [1] * tries


def test_storage_that_comes_back_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failures, real = [errno.EIO, errno.EIO], checkpoint.save

    def fail_twice(root: Path, saved: Checkpoint) -> Path:
        if failures:
            raise StorageError("not now") from OSError(failures.pop(), "no")
        return real(root, saved)

    monkeypatch.setattr(checkpoint, "save", fail_twice)
    with Writer(tmp_path, keep=1, delays=(0.0, 0.0)) as writer:
        writer.write(content(1))
        writer.wait()
        assert [written.error for written in writer.finished()] == [None]
    assert steps(tmp_path) == [1] and capsys.readouterr().err.count("not now; once more in 0 s") == 2


def test_what_safetensors_says_of_the_disk_is_understood(tmp_path: Path) -> None:
    error = StorageError("no")
    error.__cause__ = ValueError("I/O error: Input/output error (os error 5)")
    assert module._is_passing(error)  # pyright: ignore[reportPrivateUsage]
    error.__cause__ = ValueError("I/O error: No space left on device (os error 28)")
    assert not module._is_passing(error)  # pyright: ignore[reportPrivateUsage]


def test_an_old_checkpoint_that_cannot_be_deleted_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(root: Path, *, keep: int, best: int | None = None) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    with Writer(tmp_path, keep=1) as writer:
        writer.write(content(1))
        writer.write(replace(content(2)))
        writer.wait()
        assert [written.error for written in writer.finished()] == [None, None]
    assert steps(tmp_path) == [1, 2] and "could not be deleted" in capsys.readouterr().err


@pytest.mark.parametrize("background", [True, False])
def test_whatever_goes_wrong_in_the_thread_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    def fail(root: Path, saved: Checkpoint) -> Path:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(checkpoint, "save", fail)
    with Writer(tmp_path, keep=1, background=background) as writer:
        writer.write(content(1))
        writer.wait()
        (written,) = writer.finished()
    assert written.error is not None and "step-000001 could not be written: can't allocate memory" in str(written.error)


def test_a_best_one_that_cannot_be_written_does_not_take_an_older_one_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save

    def full(root: Path, saved: Checkpoint) -> Path:
        if saved.step == 3:
            raise StorageError("full")
        return real(root, saved)

    monkeypatch.setattr(checkpoint, "save", full)
    with Writer(tmp_path, keep=1) as writer:
        for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
            writer.write(content(step), best=best)
        writer.wait()
        assert writer.best == 1 and steps(tmp_path) == [1, 5]
        writer.write(content(6), best=6)
        writer.wait()
        assert writer.best == 6 and steps(tmp_path) == [6]


def test_a_failed_save_says_what_there_is_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hint(step: int) -> str:
        with pytest.raises(StorageError) as caught, monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            checkpoint.save(tmp_path, content(step))
        return caught.value.hint or ""

    assert hint(1).startswith("there is no checkpoint yet;")
    checkpoint.save(tmp_path, content(2))
    assert hint(3).startswith("the newest checkpoint is that of step 2;")
