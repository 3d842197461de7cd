from __future__ import annotations

from typing import Any

import pytest

from burnish.data.types import Stepwise

from .converting import convert, malformed

ROW: dict[str, Any] = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}


@pytest.mark.parametrize("prompt", ["prompt", "question", "problem", "instruction"])
@pytest.mark.parametrize("steps", ["completions", "steps"])
def test_names_of_the_columns(prompt: str, steps: str) -> None:
    assert convert({prompt: "a", steps: ["b", " c"], "labels": [True, False], "id": 1}, "stepwise") == Stepwise(
        "a", ("b", " c"), (1.0, 0.0)
    )


def test_labels_are_right_or_wrong() -> None:
    for labels in ([True, False], [1, 0], [1.0, 0.0], "[true, false]"):
        assert convert({**ROW, "labels": labels}, "stepwise") == Stepwise("a", ("b", "c"), (1.0, 0.0))
    assert convert({**ROW, "completions": '["b", "c"]'}, "stepwise") == Stepwise("a", ("b", "c"), (1.0, 0.0))


def test_rows_without_steps_are_empty() -> None:
    assert convert({**ROW, "completions": [], "labels": []}, "stepwise") is None
    assert convert({**ROW, "completions": ["", " "]}, "stepwise") is None
    assert convert({**ROW, "completions": ["", "c"]}, "stepwise") == Stepwise("a", ("", "c"), (1.0, 0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [True]}, "field 'labels': expected one label for each of 2 steps, found 1"),
        ({"labels": [True, 2]}, "field 'labels[1]': expected true or false, found the number 2"),
        ({"labels": [None, True]}, "field 'labels[0]': expected true or false, found null"),
        ({"labels": None}, "field 'labels': expected a list of true or false, found null"),
        ({"labels": True}, "field 'labels': expected a list of true or false, found true"),
        ({"completions": ["b", 7]}, "field 'completions[1]': expected text, found the number 7"),
        ({"completions": None}, "field 'completions': expected a list of texts, found null"),
        ({"prompt": None}, "field 'prompt': expected text, found null"),
    ],
)
def test_malformed_rows(changes: dict[str, Any], message: str) -> None:
    assert malformed({**ROW, **changes}, "stepwise") == message
