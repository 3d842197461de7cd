"""Reward models: the head is trained and saved, and what is saved gives the same scores in plain transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
)

from burnish.build import build_policy
from burnish.config.objectives import ProcessReward, Reward
from burnish.config.sections import Adapter, Model
from burnish.core.errors import ModelError
from burnish.data.collate import collate
from burnish.data.tree import chain, grow
from burnish.data.types import Example
from burnish.engine.backend import Backend
from burnish.models.inference import load_for_inference
from burnish.models.save import save_model
from burnish.models.score import attach_score, judged_by, padding_of
from burnish.models.tokenizer import load_tokenizer
from burnish.objectives.process_reward import ProcessRewardObjective
from burnish.objectives.reward import RewardObjective
from burnish.reward import RewardModel, load_reward

LORA = Adapter(rank=4, alpha=8)


def policy_of(folder: Path, adapter: Adapter | None, judges: Any = "answers") -> Any:
    torch.manual_seed(0)
    settings = Model(path=str(folder))
    policy = build_policy(settings, adapter, Backend(precision="float32"), load_tokenizer(settings), judges=judges)
    with torch.no_grad():  # an adapter that starts at nothing would hide what saving loses
        for name, parameter in policy.trainable().items():
            if "lora_B" in name or "score" in name:
                parameter.normal_(std=0.2)
    return policy.eval()


def side(length: int, answer: int, seed: int) -> Example:
    random = np.random.default_rng(seed)
    prompt, rest = np.random.default_rng(99).integers(3, 300, length), random.integers(3, 300, answer)
    return Example(np.concatenate([prompt, rest]).astype(np.int32), np.array([0.0] * length + [1.0] * answer, np.float32))


def pairs(*, share: bool = True) -> Any:
    made = [grow([side(6, 3, 1), side(6, 5, 2)], values=(0.3,), weight=1.0, share=share)]
    made.append(grow([side(4, 2, 3), side(4, 1, 4)], values=(0.0,), weight=2.0, share=share))
    return collate(made, step_weight=3.0)


def solution() -> Example:
    parts = [np.array([5, 6, 7]), np.array([8, 9]), np.array([10, 11, 12])]
    return chain(parts, trained=[False, True, True], values=(1.0, 0.0), weight=2.0)


def ids_of(policy: Any) -> list[list[int]]:
    """Each answer with its prompt, in the order of the branches."""
    rows = pairs(share=False)
    starts = (0, *rows.doc_ends[:-1])
    return [rows.input_ids[start:end].tolist() for start, end in zip(starts, rows.doc_ends, strict=True)]


@pytest.mark.parametrize("adapter", [None, LORA])
def test_the_head_is_trained_and_the_unused_one_is_not(tiny_model: Path, adapter: Adapter | None) -> None:
    policy = policy_of(tiny_model, adapter)
    names = set(policy.trainable())
    assert any(name.endswith("score.weight") for name in names)
    assert not any("lm_head" in name for name in names)
    assert all("lora_" in name or "score" in name for name in names) is (adapter is not None)
    RewardObjective(Reward(centering=0.1))(policy.train(), pairs()).sum.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in policy.trainable().values())


def test_shared_and_separate_prompts_have_the_same_scores_and_gradients(tiny_model: Path) -> None:
    policy = policy_of(tiny_model, None)
    found = []
    for share in (True, False):
        policy.model.zero_grad()
        RewardObjective(Reward())(policy, pairs(share=share)).sum.backward()
        found.append((policy.scores(pairs(share=share)), {name: p.grad.clone() for name, p in policy.trainable().items()}))
    (scores, gradients), (apart, theirs) = found
    torch.testing.assert_close(scores, apart, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_a_whole_model_becomes_a_sequence_classifier(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_model, None)
    ours = policy.scores(pairs()).detach().squeeze(-1)
    save_model(policy.model, policy.tokenizer, tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.num_labels == 1
    with torch.no_grad():
        alone = [theirs(input_ids=torch.tensor([ids])).logits.item() for ids in ids_of(policy)]
    assert ours.tolist() == pytest.approx(alone, rel=1e-5)
    assert "lm_head" not in str([path.read_bytes()[:4000] for path in (tmp_path / "reward").glob("*.safetensors")])
    again = load_for_inference(str(tmp_path / "reward"), scorer=True)
    assert judged_by(again.model) == "answers"
    with pytest.raises(ModelError, match="is a LlamaForSequenceClassification, expected a language model"):
        load_for_inference(str(tmp_path / "reward"))


def test_padding_does_not_hide_the_last_token(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_model, None)
    end = policy.tokenizer.eos_token_id  # which this model pads with, too
    assert padding_of(policy.tokenizer) not in (None, end)
    save_model(policy.model, policy.tokenizer, tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    ids = [9, 10, 11, end]
    batch = collate([Example(np.array(ids, np.int32), np.ones(4, np.float32))], step_weight=1.0)
    batch.extras["ends"] = torch.tensor([3])
    with torch.no_grad():
        assert policy.scores(batch).item() == pytest.approx(theirs(input_ids=torch.tensor([ids])).logits.item(), rel=1e-5)


def test_an_adapter_becomes_one_of_a_sequence_classifier(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_model, LORA)
    ours = policy.scores(pairs()).detach().squeeze(-1)
    save_model(policy.model, policy.tokenizer, tmp_path / "reward")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    loaded = [
        PeftModel.from_pretrained(base, tmp_path / "reward").eval(),
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval(),
    ]
    for theirs in loaded:
        with torch.no_grad():
            alone = [theirs(input_ids=torch.tensor([ids])).logits.item() for ids in ids_of(policy)]
        assert ours.tolist() == pytest.approx(alone, rel=1e-5)
    with pytest.raises(ModelError, match="is a reward model, which scores answers and writes none"):
        load_for_inference(str(tmp_path / "reward"))


def test_training_goes_on_from_a_saved_adapter(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_model, LORA)
    ours = policy.scores(pairs()).detach()
    save_model(policy.model, policy.tokenizer, tmp_path / "reward")
    settings = Model(path=str(tiny_model))
    again = build_policy(
        settings, Adapter(path=str(tmp_path / "reward")), Backend(precision="float32"), load_tokenizer(settings), judges="answers"
    ).eval()
    torch.testing.assert_close(again.scores(pairs()).detach(), ours)
    assert {name for name in again.trainable() if "score" in name} == {"base_model.model.score.weight"}


@pytest.mark.parametrize("adapter", [None, LORA])
def test_steps_become_a_token_classifier(tiny_model: Path, tmp_path: Path, adapter: Adapter | None) -> None:
    policy = policy_of(tiny_model, adapter, "steps")
    batch = collate([solution()], step_weight=2.0)
    ours = policy.scores(batch).detach()
    loss = ProcessRewardObjective(ProcessReward())(policy, batch)
    truth = torch.nn.functional.cross_entropy(ours, torch.tensor([1, 0]), reduction="sum")
    assert loss.sum.item() == pytest.approx(truth.item(), rel=1e-6)
    save_model(policy.model, policy.tokenizer, tmp_path / "steps")
    if adapter is None:
        theirs: Any = AutoModelForTokenClassification.from_pretrained(tmp_path / "steps").eval()
        assert theirs.config.id2label == {0: "wrong", 1: "right"}
    else:
        theirs = PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(tiny_model), tmp_path / "steps").eval()
    with torch.no_grad():
        logits = theirs(input_ids=batch.input_ids[None]).logits[0, batch.extras["ends"]]
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)


def test_a_reward_model_in_use(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_model, LORA)
    save_model(policy.model, policy.tokenizer, tmp_path / "reward")
    reward = load_reward(str(tmp_path / "reward"), precision="float32")
    dialogues = [
        [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": answer}] for answer in ("Yes.", "No, never.", "Maybe")
    ]
    scores = reward.score(dialogues)
    assert [reward.score([one])[0] for one in dialogues] == pytest.approx(scores, rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    theirs = PeftModel.from_pretrained(base, tmp_path / "reward").eval()
    ids = tokenizer.apply_chat_template(dialogues[1], return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        assert scores[1] == pytest.approx(theirs(input_ids=ids).logits.item(), rel=1e-4)
    assert reward.score([]) == []


def test_what_is_no_reward_model_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="expected a reward model that scores whole answers"):
        load_reward(str(tiny_model))
    policy = policy_of(tiny_model, None, None)
    with pytest.raises(ModelError, match="the model has no score head"):
        policy.scores(pairs())
    steps = policy_of(tiny_model, None, "steps")
    with pytest.raises(ModelError, match="a score head with 2 outputs, but judging answers needs 1"):
        attach_score(steps.model, "answers")
    with pytest.raises(ModelError, match="expected a reward model"):
        RewardModel(steps, None, None)  # type: ignore[arg-type]


def test_a_family_without_a_classifier_is_refused_before_training() -> None:
    model = AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_hidden_size=16)
    )
    assert isinstance(model, FalconForCausalLM)
    model.config.__class__ = type("UnheardOfConfig", (type(model.config),), {})
    with pytest.raises(ModelError, match="cannot become a reward model: transformers has no sequence classification"):
        attach_score(model, "answers")
