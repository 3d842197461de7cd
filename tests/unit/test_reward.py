"""Reward models in use: many texts at once are scored as each one alone, and as plain transformers scores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

import burnish
from burnish import reward as module
from burnish.config.sections import Adapter, Model
from burnish.core.errors import ModelError, RowError
from burnish.data.types import Completion, Conversation, Message
from burnish.models import adapters
from burnish.models.load import load_model
from burnish.models.save import save_model
from burnish.models.score import Judges, attach_score
from burnish.models.tokenizer import load_tokenizer

ANSWERS = ["the assistant answers", "no", "in full sentences, the assistant answers the user", ""]


def dialogue(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "the user asks"}, {"role": "assistant", "content": answer}]


def saved(tiny_model: Path, folder: Path, judges: Judges, *, adapter: bool = False) -> str:
    settings = Model(path=str(tiny_model))
    torch.manual_seed(0)
    model: Any = load_model(settings, compute_dtype=torch.float32)
    if adapter:
        model = adapters.attach(model, Adapter(rank=4))
    attach_score(model, judges)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 if "lora_B" in name or "score" in name else 0)
    return str(save_model(model, load_tokenizer(settings), folder))


@pytest.mark.parametrize("adapter", [False, True])
def test_scores_are_those_of_transformers_one_by_one(tiny_model: Path, tmp_path: Path, adapter: bool) -> None:
    folder = saved(tiny_model, tmp_path / "model", "answers", adapter=adapter)
    reward = burnish.load_reward(folder, precision="float32")
    scores = reward.score([dialogue(answer) for answer in ANSWERS])
    assert len(set(scores)) == len(ANSWERS)
    for answer, score in zip(ANSWERS, scores, strict=True):
        assert reward.score([dialogue(answer)]) == pytest.approx([score], rel=1e-4)
    if adapter:
        return
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for answer, score in zip(ANSWERS, scores, strict=True):
        ids = tokenizer.apply_chat_template(dialogue(answer), return_tensors="pt", return_dict=True)
        assert plain(**ids).logits.item() == pytest.approx(score, rel=1e-4)


def test_cut_into_batches_the_order_stays(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = burnish.load_reward(saved(tiny_model, tmp_path / "model", "answers"), precision="float32")
    dialogues = [dialogue(answer) for answer in ANSWERS * 3]
    scores = reward.score(dialogues)
    monkeypatch.setattr(module, "_MICRO_BATCH_TOKENS", {"cpu": 40, "cuda": 40})
    assert reward.score(dialogues) == pytest.approx(scores, rel=1e-4)
    assert reward.score([]) == []


def test_what_can_be_scored(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model, tmp_path / "model", "answers")
    reward = burnish.load_reward(folder, precision="float32")
    (as_dicts,) = reward.score([dialogue("no")])
    (as_messages,) = reward.score([Conversation((Message("user", "the user asks"), Message("assistant", "no")))])
    assert as_messages == as_dicts
    (plain,) = reward.score([Completion("the user asks: ", "no")])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the user asks: ")["input_ids"] + tokenizer("no")["input_ids"] + [tokenizer.eos_token_id]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()(input_ids=torch.tensor([ids]))
    assert plain == pytest.approx(theirs.logits.item(), rel=1e-4)


def test_malformed_conversations_are_named(tiny_model: Path, tmp_path: Path) -> None:
    reward = burnish.load_reward(saved(tiny_model, tmp_path / "model", "answers"), precision="float32")
    with pytest.raises(RowError, match="dialogues, row 2"):
        reward.score([dialogue("no"), [{"role": "user"}]])


def test_steps_are_judged_as_transformers_does(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model, tmp_path / "model", "steps")
    judge = burnish.load_process_reward(folder, precision="float32")
    solutions = [("the user asks", ["full", "sentences in full", "no"]), ("no", ["the assistant answers"])]
    found = judge.score(solutions)
    assert [len(one) for one in found] == [3, 1]
    plain, tokenizer = AutoModelForTokenClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for (prompt, steps), probabilities in zip(solutions, found, strict=True):
        ids, ends = tokenizer(prompt)["input_ids"], []
        for step in steps:
            ids += tokenizer(step + "\n")["input_ids"]
            ends.append(len(ids) - 1)
        logits = plain(input_ids=torch.tensor([ids])).logits[0, ends]
        assert logits.softmax(-1)[:, 1].tolist() == pytest.approx(probabilities, rel=1e-4)
    assert judge.score(solutions[1:])[0] == pytest.approx(found[1], rel=1e-4)
    assert judge.score([]) == []


@pytest.mark.parametrize(
    ("solution", "why"),
    [
        (("the user asks", []), "solutions, row 1: expected the solution as a list of steps"),
        (("the user asks", "no"), "expected the solution as a list of steps"),
        (("", ["no"]), "nothing stands before the steps"),
    ],
)
def test_solutions_without_steps_or_prompt_are_refused(tiny_model: Path, tmp_path: Path, solution: Any, why: str) -> None:
    judge = burnish.load_process_reward(saved(tiny_model, tmp_path / "model", "steps"), precision="float32")
    with pytest.raises(RowError, match=why):
        judge.score([solution])


def test_the_other_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    answers, steps = (saved(tiny_model, tmp_path / kind, kind) for kind in ("answers", "steps"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="expected a reward model that scores whole answers, with a score head of one output"):
        burnish.load_reward(steps)
    with pytest.raises(ModelError, match="expected a reward model that scores steps, with a score head of two outputs"):
        burnish.load_process_reward(answers)
    with pytest.raises(ModelError, match="expected a reward model"):
        burnish.load_reward(str(tiny_model))


def test_what_is_longer_than_the_model_knows_is_said(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = burnish.load_reward(saved(tiny_model, tmp_path / "model", "answers"), precision="float32")
    reward.policy.model.config.max_position_embeddings = 40
    assert len(reward.score([dialogue("no"), dialogue("the user asks " * 40)])) == 2
    said = capsys.readouterr().err
    assert "warning: number 2 has " in said and "tokens, and the model was made for 40: its score means little" in said
