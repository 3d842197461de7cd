"""Who is named when nothing moves, and that a move is one. Real ranks that hang: tests/faults/test_launching.py."""

from __future__ import annotations

import os
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.engine import checkpoint, watchdog
from burnish.engine.checkpoint import Checkpoint
from burnish.engine.events import State
from burnish.engine.watchdog import Sign, Watchdog, culprits
from burnish.engine.writer import Writer


def signs(**changes: tuple[int, ...]) -> dict[int, Sign]:
    plain = [Sign(rank, 100 + rank, "host", beat=5, moves=3, collectives=7, step=2, place="here") for rank in range(4)]
    return {sign.rank: replace(sign, **{key: values[sign.rank] for key, values in changes.items()}) for sign in plain}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beat": (9, 9, 5, 9)}, [2]),  # its process is stopped
        ({"beat": (9, 9, 5, 5)}, [2, 3]),  # a machine is gone
        ({"beat": (9, 9, 9, 9), "collectives": (8, 8, 8, 7)}, [3]),  # it hangs by itself
        ({"beat": (9, 5, 9, 9), "collectives": (8, 8, 8, 7)}, [1]),  # what is stopped comes first
        ({"beat": (9, 9, 9, 9)}, []),  # all wait at the same place
    ],
)
def test_who_is_named(changes: dict[str, tuple[int, ...]], named: list[int]) -> None:
    assert culprits(signs(), signs(**changes), 4) == named


def test_a_rank_that_never_gave_a_sign_is_named() -> None:
    first, second = signs(), signs(beat=(9, 9, 9, 9))
    del first[1], second[1]
    assert culprits(first, second, 4) == [1]


class Notes:
    """A board for one process. Some of what belongs to other ranks is there already."""

    def __init__(self, **notes: str) -> None:
        self.notes = notes

    def set(self, key: str, value: str) -> None:
        self.notes[key] = value

    def get(self, key: str) -> bytes:
        return self.notes[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.notes for key in keys)

    def add(self, key: str, amount: int) -> int:
        raise NotImplementedError

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self.notes.setdefault(key, desired).encode()


def found_by(dog: Watchdog, monkeypatch: pytest.MonkeyPatch, others: dict[int, Sign], *written: int) -> str:
    """What the watchdog of rank 0 says, where the other ranks have left these signs, and some their stacks."""
    said: list[str] = []
    monkeypatch.setattr(dog, "_end", lambda text, *, tell: said.append(text))
    monkeypatch.setattr(watchdog, "_standing", lambda frame: ())  # this test itself moves
    dog._interval = 0.0
    dog._moves = dog._sign().moves
    board = Notes(**{f"stacks/{rank}": "written" for rank in written})
    for sign in others.values():
        watchdog._leave(board, sign)
    dog._look_around(board)
    return said[0]


def test_only_stacks_that_are_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog(0, 2, timeout=1.0, folder=tmp_path)
    dog.on_train_start(State(total=900, step=812))  # goes on from a checkpoint
    said = found_by(dog, monkeypatch, {1: signs(step=(812,) * 4)[1]})
    assert said.startswith("rank 1 does not answer: ")
    assert f"rank 0 (pid {os.getpid()} on {socket.gethostname()}) after step 812: " in said
    assert "rank 1 (pid 101 on host): no sign of life any more; the last one came after step 812, from here\n" in said
    assert said.endswith(f"where rank 0 stands: {tmp_path}/logs/stacks-rank-N.txt")
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["stacks-rank-0.txt"]


def test_stacks_of_all_but_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog(0, 4, timeout=1.0, folder=tmp_path)
    said = found_by(dog, monkeypatch, {rank: signs(step=(0,) * 4)[rank] for rank in (1, 2, 3)}, 1, 3)
    assert f"\n  where each one but rank 2 stands: {tmp_path}" in said and "came before the end of the first step" in said


def test_no_stacks_where_none_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").write_text("in the way")
    assert "stands" not in found_by(Watchdog(0, 2, timeout=1.0, folder=tmp_path), monkeypatch, {1: signs()[1]})


def test_a_single_process_is_not_watched(tmp_path: Path) -> None:
    before = threading.active_count()
    dog = Watchdog(0, 1, timeout=1.0, folder=tmp_path)
    dog.start()
    assert threading.active_count() == before
    dog.stop()


def test_what_is_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog(0, 2, timeout=1.0, folder=tmp_path)
    frame = sys._getframe()
    monkeypatch.setattr(watchdog.sys, "_current_frames", lambda: {threading.main_thread().ident: frame})
    monkeypatch.setattr(watchdog, "_standing", lambda frame: ())  # this test itself moves

    def moves() -> bool:
        sign = dog._sign()
        moved = sign.moves != dog._moves
        dog._moves = sign.moves
        return moved

    assert moves() and not moves() and not moves()
    dog.on_step_end(State(total=5, step=3), None)  # pyright: ignore[reportArgumentType]
    assert moves() and not moves() and dog._sign().step == 3
    batches = dog.counted([1, 2])
    assert next(batches) == 1 and moves() and not moves()
    monkeypatch.setattr(watchdog, "collectives", lambda: 9)
    assert moves() and not moves()


def test_a_thread_that_stands_still_looks_the_same() -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        inside.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    frames = [watchdog._standing(sys._current_frames()[thread.ident or 0]) for _ in range(50)]
    # Right after `inside.set()` the thread is still on its way to the next line.
    assert frames[-1] == frames[-2] and len(frames[-1]) >= 3
    leave.set()
    thread.join()


def test_who_waits_for_a_checkpoint_moves_as_long_as_it_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog, frames = Watchdog(0, 2, timeout=1.0, folder=tmp_path), sys._current_frames
    begun, on, there, end = (threading.Event() for _ in range(4))

    def write(root: Path, content: Checkpoint) -> None:
        begun.set()
        on.wait()
        there.set()
        end.wait()

    monkeypatch.setattr(checkpoint, "save", write)
    monkeypatch.setattr(watchdog.sys, "_current_frames", lambda: {**frames(), threading.main_thread().ident: None})  # it stands still
    monkeypatch.setattr(watchdog, "collectives", lambda: 0)
    with Writer(tmp_path, keep=1) as writer:
        writer.write(Checkpoint(1, {}, {"state": {}}, {}, {}))
        begun.wait()
        dog._moves = dog._sign().moves
        on.set()
        there.wait()
        moved = dog._sign().moves > dog._moves
        end.set()
    assert moved
