"""Who works, who waits, and how a failure ends all: ranks as threads around one board."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from burnish.core.errors import DataError, Elsewhere
from burnish.core.signals import Stopped
from burnish.engine import together
from burnish.engine.together import Seat, _Meeting, agree, once_per_machine


class Board:
    """What a TCPStore does, in this process."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str, /) -> None:
        with self._lock:
            self._notes[key] = value

    def get(self, key: str, /) -> bytes:
        with self._lock:
            return self._notes[key].encode()

    def check(self, keys: list[str], /) -> bool:
        with self._lock:
            return all(key in self._notes for key in keys)

    def add(self, key: str, amount: int, /) -> int:
        with self._lock:
            self._notes[key] = str(int(self._notes.get(key, "0")) + amount)
            return int(self._notes[key])

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        with self._lock:
            if self._notes.get(key, "") == expected:
                self._notes[key] = desired
            return self._notes[key].encode()


def meet(work: Callable[[int], Any], *, machines: int = 2, each: int = 3) -> list[Any]:
    """What each rank got, or the exception that it raised."""
    board, found = Board(), [None] * (machines * each)

    def rank(number: int) -> None:
        seat = Seat(number, number % each, machines * each)
        try:
            found[number] = _Meeting(board, seat, "prepare the data", pause=0.001).hold(lambda: work(number))
        except (Exception, Stopped) as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(machines * each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_the_first_of_each_machine_works_before_the_others() -> None:
    order: list[int] = []

    def work(rank: int) -> int:
        order.append(rank)
        return rank * 10

    assert meet(work) == [0, 10, 20, 30, 40, 50]
    assert all(order.index(0) < order.index(rank) for rank in (1, 2))
    assert all(order.index(3) < order.index(rank) for rank in (4, 5))


def test_nobody_goes_on_before_all_are_ready() -> None:
    ready: list[int] = []
    board = Board()

    def rank(number: int) -> None:
        _Meeting(board, Seat(number, 0, 2), "x", pause=0.001).hold(lambda: ready.append(number))
        assert len(ready) == 2

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
        thread.join(timeout=0.05)  # the first is alone for a while
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(ready) == [0, 1]


@pytest.mark.parametrize(("error", "code"), [(DataError("row 7 is bad"), 2), (RuntimeError("a fault"), 1)])
def test_a_failure_is_said_by_one_and_ends_all(error: Exception, code: int) -> None:
    worked: list[int] = []

    def work(rank: int) -> None:
        worked.append(rank)
        raise error

    found = meet(work)
    speakers = [rank for rank, outcome in enumerate(found) if outcome is error]
    assert len(speakers) == 1 and set(worked) <= {0, 3}
    others = [outcome for outcome in found if outcome is not error]
    assert all(isinstance(outcome, Elsewhere) and outcome.exit_code == code for outcome in others)


def test_waiting_is_said_after_a_while(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(together, "_SAID_AFTER", 0.0)
    go = threading.Event()
    threading.Timer(0.3, go.set).start()
    meet(lambda rank: go.wait(60) if rank == 0 else None, machines=1)
    said = capsys.readouterr().err
    assert said.count("rank 1 waits for rank 0 to prepare the data") == 1 and "rank 2 waits" not in said


class Alone:
    rank, world_size = 0, 1

    def __init__(self, rank: int = 0, contents: tuple[str, ...] = ("a",)) -> None:
        self.rank = rank
        self.contents = contents

    def gather(self, value: str) -> list[str]:
        return list(self.contents)


def test_one_process_just_works() -> None:
    assert once_per_machine(lambda: 7, what="x", backend=Alone()) == 7  # pyright: ignore[reportArgumentType]


def test_machines_with_other_rows_are_named() -> None:
    agree("a", what="the training rows", backend=Alone(0, ("a", "a", "a")))  # pyright: ignore[reportArgumentType]
    unlike = ("a", "a", "b", "b")
    with pytest.raises(DataError, match="the training rows differ: ranks 2, 3 read other ones than rank 0"):
        agree("a", what="the training rows", backend=Alone(0, unlike))  # pyright: ignore[reportArgumentType]
    with pytest.raises(Elsewhere):
        agree("b", what="the training rows", backend=Alone(2, unlike))  # pyright: ignore[reportArgumentType]


def test_a_signal_to_all_is_not_waited_for_until_all_have_heard_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_HEARD_WITHIN", 600.0)
    came, check = threading.Event(), Board.check

    def interrupted(board: Board, keys: list[str]) -> bool:
        if came.is_set():
            raise Stopped("stopped by SIGTERM")
        return check(board, keys)

    def work(rank: int) -> None:
        came.set()
        raise Stopped("stopped by SIGTERM")

    monkeypatch.setattr(Board, "check", interrupted)
    assert [type(found) for found in meet(work, machines=1)] == [Stopped] * 3
