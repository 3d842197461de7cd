"""What a person sees."""

import io

import pytest
from rich.console import Console

from burnish.engine.progress import TrainingProgress, short


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1.23456, "learning_rate": 2e-4, "tokens": 500, "seconds": 0.25}


def test_without_a_terminal_there_are_plain_lines_now_and_then():
    output = io.StringIO()
    with TrainingProgress(50, console=Console(file=output)) as progress:
        for step in range(1, 51):
            progress.step(line(step))
    first, last = output.getvalue().splitlines()  # no step takes five seconds here
    assert first == "step 1/50  loss 1.2346  lr 2.00e-04  2k tok/s  0:00:12 left"
    assert last == "step 50/50  loss 1.2346  lr 2.00e-04  2k tok/s  0:00:00 left"


def test_a_terminal_gets_a_bar():
    output = io.StringIO()
    with TrainingProgress(5, console=Console(file=output, force_terminal=True, width=120)) as progress:
        progress.status("evaluating")
        progress.step(line(5))
        progress.say("[eval] loss 1.0")
    text = output.getvalue()
    assert "loss 1.2346" in text and "5/5" in text and "2k tok/s" in text and "[eval] loss 1.0" in text


def test_other_ranks_are_silent():
    output = io.StringIO()
    with TrainingProgress(5, active=False, console=Console(file=output, force_terminal=True)) as progress:
        progress.step(line(1))
        progress.say("x")
    assert output.getvalue() == ""


@pytest.mark.parametrize(("number", "text"), [(0.5, "0.5"), (999, "999"), (1234, "1.23k"), (1_234_567, "1.23M"), (5e12, "5T")])
def test_short_numbers(number: float, text: str):
    assert short(number) == text
