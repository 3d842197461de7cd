"""The metrics files."""

import csv
import json
import math
from pathlib import Path

import pytest

from burnish.engine.metrics import MetricsLog, read_lines, step_line
from burnish.engine.step import StepResult


def result(step: int, **changes: object) -> StepResult:
    values = {"loss": 1.5, "grad_norm": 0.5, "learning_rate": 0.1, "tokens": 100, "trained_tokens": 60, "examples": 4, "fault": None}
    return StepResult(step=step, **{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_the_line_of_a_step():
    line = step_line(result(3, metrics={"accuracy": 0.25}), seconds=0.5)
    assert list(line.items()) == [
        *(("step", 3), ("loss", 1.5), ("learning_rate", 0.1), ("grad_norm", 0.5), ("tokens", 100), ("trained_tokens", 60)),
        *(("seconds", 0.5), ("tokens_per_second", 200.0), ("accuracy", 0.25)),
    ]


def test_an_objective_cannot_overwrite_the_contract():
    line = step_line(result(1, metrics={"loss": 9.0, "seconds": 9.0}), seconds=0.5)
    assert (line["loss"], line["seconds"]) == (1.5, 0.5)


def test_lines_are_on_the_disk_at_once_and_never_nan(tmp_path: Path):
    log = MetricsLog(tmp_path)
    log.step(step_line(result(1, loss=math.nan, grad_norm=math.inf), seconds=0.5))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: 1 / 0)["loss"] is None
    log.close()


def test_a_resumed_run_cuts_what_comes_after_its_checkpoint(tmp_path: Path):
    with MetricsLog(tmp_path) as log:
        log.evaluation({"step": 0, "eval_loss": 3.0})
        for step in range(1, 6):
            log.step(step_line(result(step), seconds=0.5))
            log.evaluation({"step": step, "eval_loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    with MetricsLog(tmp_path, after=3, evaluated=3) as log:
        log.step(step_line(result(4, loss=7.0), seconds=0.5))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_lines(tmp_path / "eval.jsonl")] == [0, 1, 2, 3]


def test_damaged_lines_are_counted_and_the_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.step(step_line(result(step), seconds=0.5))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff\xfe\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    with MetricsLog(tmp_path, after=4):
        pass
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(lines)
    said = " ".join(capsys.readouterr().err.split())
    assert "has 1 line that cannot be read" in said and "metrics.jsonl has 3 of the 4 steps that are done" in said


def test_lines_that_are_missing_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with MetricsLog(tmp_path, after=4, evaluated=4):
        pass
    assert "metrics.jsonl has 0 of the 4 steps that are done" in " ".join(capsys.readouterr().err.split())


def test_a_fresh_run_starts_with_empty_files(tmp_path: Path):
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.evaluation({"step": 0, "eval_loss": 3.0})
            log.step(step_line(result(1), seconds=0.5))
    assert len(read_lines(tmp_path / "metrics.jsonl")) == len(read_lines(tmp_path / "eval.jsonl")) == 1


def test_the_table_joins_steps_and_evaluations(tmp_path: Path):
    with MetricsLog(tmp_path) as log:
        log.step(step_line(result(1), seconds=0.5))
        log.step(step_line(result(2, metrics={"late": 1.0}), seconds=0.5))
        log.evaluation({"step": 2, "eval_loss": 1.25})
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["step"], row["loss"], row["late"], row["eval_loss"]) for row in rows]
    assert found == [
        ("1", "1.5", "", ""),
        ("2", "1.5", "1.0", "1.25"),
    ]


def test_other_ranks_write_nothing(tmp_path: Path):
    with MetricsLog(tmp_path / "run", active=False) as log:
        log.step(step_line(result(1), seconds=0.5))
    assert not (tmp_path / "run").exists()
