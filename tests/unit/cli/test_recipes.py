from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import burnish
from burnish.cli import recipes
from burnish.cli.check import notes, summary
from burnish.cli.main import main
from burnish.config.load import load_run
from burnish.core.errors import BurnishError


def test_the_recipes() -> None:
    assert recipes.names() == ["dpo", "full", "kto", "lora", "orpo", "pretrain", "qlora", "reference", "reward", "sft", "simpo"]


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "reference"])
def test_each_recipe_is_a_valid_run_with_comments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes.main("new", name, Path("run.yaml"))
    text = Path("run.yaml").read_text()
    config = load_run("run.yaml").config
    assert summary(config) and not [note for note in notes(config) if "learning_rate" in note]
    assert text.startswith("# ") and text.count("#") >= 4 and len(text.splitlines()) <= 50
    assert config.output == str(tmp_path / "runs" / name)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "kto", "reward"])
def test_preference_recipes_train_a_tiny_model(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Path(__file__).parents[3] / "recipes" / "data" / "preferences.jsonl"
    monkeypatch.chdir(tmp_path)
    recipes.main("new", name, Path("run.yaml"))
    changes = [f"model.path={tiny_model}", f"data.train={{path: {rows}, limit: 30}}", "data.eval=0.2", f"data.cache={tmp_path / 'cache'}"]
    outcome = burnish.train("run.yaml", *changes, "data.max_length=256", "train.batch_size=8", "train.learning_rate=0.01", "train.epochs=2")
    first, *_, last = [json.loads(line) for line in Path("runs", name, "eval.jsonl").read_text().splitlines()]
    assert outcome.evaluation is not None and last["eval_loss"] < first["eval_loss"]
    assert 0 <= first["eval_reward_accuracy"] <= 1 and "eval_perplexity" not in last
    assert "Preference accuracy" in Path("runs", name, "report.html").read_text()


def test_recipes_do_what_their_names_say() -> None:
    configs = {name: recipes.text_of(name) for name in recipes.names()}
    assert "quantize: nf4" in configs["qlora"] and "adapter" not in configs["full"].split("\n", 1)[1]
    assert all(recipes.purpose(name) for name in configs)


def test_list_and_print(capsys: pytest.CaptureFixture[str]) -> None:
    recipes.main("list", None, None)
    assert "  sft        Supervised fine-tuning" in capsys.readouterr().out
    recipes.main("new", "sft", None)
    assert capsys.readouterr().out == recipes.text_of("sft")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["new", "sftt"], "no recipe 'sftt'; did you mean 'sft'?"),
        (["new"], "needs a name: dpo, full, kto, lora"),
        (["lst"], "unknown action 'lst'; did you mean 'list'?"),
        (["new", "sft", "-o", "there.yaml"], "there.yaml exists already, and is left as it is"),
        (["new", "sft", "-o", "no/such/run.yaml"], "there is no folder no/such"),
    ],
)
def test_wrong_requests_write_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["burnish", "recipes", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"] and Path("there.yaml").read_text() == "mine"


def test_unknown_recipes_are_input_errors() -> None:
    with pytest.raises(BurnishError, match="no recipe"):
        recipes.text_of("../check")
