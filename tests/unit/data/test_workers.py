from __future__ import annotations

import importlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.core.errors import DataError, RowError
from burnish.core.signals import POLITE
from burnish.data import workers as module
from burnish.data.pipeline import Chunk, Pipeline, Task, chunks
from burnish.data.sources.row import Row
from burnish.data.workers import Workers, prepared

PipelineOf = Callable[..., Pipeline]


@pytest.fixture
def pipeline_of(monkeypatch: pytest.MonkeyPatch) -> PipelineOf:
    """Makes pipelines whose parts a fresh Python process can import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    fakes: Any = importlib.import_module("fakes")

    def make(**options: Any) -> Pipeline:
        settings = {"max_length": 8, "overlong": "split", "skip_malformed": True}
        return Pipeline([fakes.Words()], fakes.Letters(), **{**settings, **options})

    return make


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.data.pipeline.CHUNK_ROWS", 5)


def task(number: int, completion: str) -> Task:
    return Task(0, Row("rows.jsonl", number, {"prompt": "p" * (number % 4), "completion": completion}))


def run(pipeline: Pipeline, tasks: list[Task], workers: Any) -> list[tuple[list[Task], Chunk]]:
    return list(prepared(chunks(tasks), pipeline, workers))


def contents(results: list[tuple[list[Task], Chunk]]) -> list[Any]:
    """Everything in the results, comparable bit by bit."""
    return [
        (
            [task.row.number for task in tasks],
            chunk.fates.tolist(),
            chunk.rendered.tolist(),
            chunk.identities,
            chunk.reasons,
            *(getattr(chunk.block, name).tobytes() for name in chunk.block.__slots__),
        )
        for tasks, chunk in results
    ]


def test_the_result_is_bit_equal_for_any_number_of_workers(pipeline_of: PipelineOf) -> None:
    tasks = [task(number, "abc" * (number % 7)) for number in range(1, 48)] + [Task(0, Row("rows.jsonl", 48, {"other": 1}))]
    alone = contents(run(pipeline_of(), tasks, 1))
    assert len(alone) == 10
    assert contents(run(pipeline_of(), tasks, 2)) == alone
    assert contents(run(pipeline_of(), tasks, 4)) == alone
    assert contents(run(pipeline_of(), tasks, "auto")) == alone


def test_small_data_starts_no_process(pipeline_of: PipelineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(module, "Workers", lambda pipeline, count: started.append(count))
    run(pipeline_of(), [task(number, "a") for number in range(1, 20)], "auto")
    assert started == []


def test_large_data_starts_a_worker_for_each_core(pipeline_of: PipelineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", module.CHUNK_ROWS)
    monkeypatch.setattr(module, "cores", lambda: 2)
    started: list[int] = []

    class Noted(Workers):
        def __init__(self, pipeline: Pipeline, count: int) -> None:
            started.append(count)
            super().__init__(pipeline, count)

    monkeypatch.setattr(module, "Workers", Noted)
    results = run(pipeline_of(), [task(number, "ab") for number in range(1, 30)], "auto")
    assert started == [2]
    assert [t.row.number for tasks, _ in results for t in tasks] == list(range(1, 30))


def test_a_dead_worker_is_reported_with_the_row_it_died_on(pipeline_of: PipelineOf) -> None:
    tasks = [task(number, "die" if number == 13 else "a") for number in range(1, 30)]
    with pytest.raises(
        DataError, match=r"rows.jsonl, row 13: a tokenising worker died on this row \(killed by SIGKILL\); it held .*row 11.*row 15"
    ) as caught:
        run(pipeline_of(), tasks, 2)
    assert "data.workers" in (caught.value.hint or "")


def test_an_error_in_a_worker_keeps_its_place(pipeline_of: PipelineOf) -> None:
    tasks = [*(task(number, "a") for number in range(1, 20)), Task(0, Row("rows.jsonl", 20, {"other": 1}))]
    with pytest.raises(RowError, match=r"rows.jsonl, row 20, field 'prompt': the field 'prompt' is missing"):
        run(pipeline_of(skip_malformed=False), tasks, 2)


def test_the_first_error_is_the_one_that_is_reported(pipeline_of: PipelineOf) -> None:
    tasks = [Task(0, Row("rows.jsonl", number, {"other": 1})) for number in range(1, 40)]
    with pytest.raises(RowError, match=r"row 1,"):
        run(pipeline_of(skip_malformed=False), tasks, 3)


def test_a_fault_of_ours_comes_with_its_traceback(pipeline_of: PipelineOf) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError: a bug.*rows.jsonl, row 2"):
        run(pipeline_of(), [task(1, "a"), task(2, "bug")], 2)


def test_what_a_library_prints_does_no_harm(pipeline_of: PipelineOf) -> None:
    results = run(pipeline_of(), [task(number, "print") for number in range(1, 12)], 2)
    assert sum(len(chunk.block.lengths) for _, chunk in results) == 11


def test_no_process_stays_behind(pipeline_of: PipelineOf) -> None:
    with Workers(pipeline_of(), 2) as pool:
        assert np.all(pool.submit([task(1, "ab")]).result().block.lengths == 3)
        processes = [worker._process for worker in pool._all]
        assert [process.poll() for process in processes] == [None, None]
    assert [process.poll() for process in processes] == [0, 0]
    assert not any(Path(worker._beat_file).exists() for worker in pool._all)


@pytest.mark.parametrize("number", POLITE)
def test_a_signal_to_all_processes_is_for_the_main_one(pipeline_of: PipelineOf, number: signal.Signals) -> None:
    """Batch systems send it to every process of a job, and the main one saves and stops."""
    with Workers(pipeline_of(), 1) as pool:
        assert np.all(pool.submit([task(1, "ab")]).result().block.lengths == 3)
        pool._all[0]._process.send_signal(number)
        assert np.all(pool.submit([task(2, "ab")]).result().block.lengths == 4)


def test_processes_are_killed_when_the_main_process_gives_up(pipeline_of: PipelineOf) -> None:
    with pytest.raises(KeyboardInterrupt), Workers(pipeline_of(), 1) as pool:
        raise KeyboardInterrupt
    assert pool._all[0]._process.poll() is not None
