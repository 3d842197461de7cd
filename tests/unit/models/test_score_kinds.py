"""Score heads on every family, beside every kind of adapter, and on what is a reward model already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from burnish.config.sections import Adapter, Model
from burnish.core.errors import AdapterError, ModelError
from burnish.data.types import Batch
from burnish.models import adapters
from burnish.models.inference import load_for_inference
from burnish.models.load import load_model
from burnish.models.policy import Policy
from burnish.models.save import save_model
from burnish.models.score import Judges, attach_score, judged_by, padding_of, score_of
from burnish.models.tokenizer import add_tokens, load_tokenizer

IDS = torch.arange(1, 11)
PLAIN = {"answers": AutoModelForSequenceClassification, "steps": AutoModelForTokenClassification}
ADAPTED = {"answers": AutoPeftModelForSequenceClassification, "steps": AutoPeftModelForTokenClassification}


def batch() -> Batch:
    """Two documents, each scored at its last token; the second is the first one without its first three tokens."""
    none = IDS[:0]
    return Batch(
        input_ids=torch.cat([IDS, IDS[3:]]),
        positions=torch.cat([torch.arange(10), torch.arange(7)]),
        doc_ends=(10, 17),
        parents=(-1, -1),
        rows=none,
        targets=none,
        token_weights=torch.zeros(0),
        weight=2.0,
        step_weight=2.0,
        examples=2,
        branches=(9, 6),
        extras={"ends": torch.tensor([9, 16])},
    )


def ours(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return Policy(model).eval().scores(batch())


def theirs(model: Any) -> torch.Tensor:
    """The same from transformers' model, document by document."""
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids[None]).logits for ids in (IDS, IDS[3:])]
    return torch.cat([one if one.dim() == 2 else one[:, -1] for one in logits])


def words() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture
def untied(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with an output head of its own."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "untied"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return folder


def policy_of(folder: Path, adapter: Adapter | None, judges: Judges, *, new_tokens: tuple[str, ...] = ()) -> Policy:
    """A reward model as a run builds it, away from where it began."""
    settings = Model(path=str(folder), new_tokens=list(new_tokens))
    tokenizer = load_tokenizer(settings)
    torch.manual_seed(0)
    model: Any = load_model(settings, compute_dtype=torch.float32, tokenizer=tokenizer, trainable=adapter is None, scorer=True)
    if adapter is not None:
        model = adapters.attach(model, adapter, new_token_ids=add_tokens(tokenizer, list(new_tokens)))
    attach_score(model, judges)
    policy = Policy(model, tokenizer).train()
    policy.scores(batch()).square().sum().backward()
    assert [name for name, parameter in policy.trainable().items() if parameter.grad is None] == []
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy.eval()


def assert_saved(policy: Policy, judges: Judges, folder: Path, *, adapted: bool) -> None:
    """What is saved scores the same in plain transformers (and PEFT), and here."""
    expected = ours(policy.model)
    save_model(policy.model, policy.tokenizer, folder)
    plain = (
        ADAPTED[judges].from_pretrained(folder, num_labels=expected.shape[1], pad_token_id=0)
        if adapted
        else PLAIN[judges].from_pretrained(folder)
    )
    torch.testing.assert_close(theirs(plain), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(load_for_inference(str(folder), scorer=True).model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("judges", ["answers", "steps"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "mixtral", "qwen3-moe", "qwen2-moe"])
def test_families(family_model: Callable[..., Any], family: str, judges: Judges, tmp_path: Path) -> None:
    model = family_model(family)
    attach_score(model, judges)
    expected = ours(model)
    save_model(model, words(), tmp_path / "model")
    plain, report = PLAIN[judges].from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(theirs(plain), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "olmo2", "olmo3", "ministral"])
def test_families_with_a_reward_head_only(family_model: Callable[..., Any], family: str, tmp_path: Path) -> None:
    model = family_model(family)
    attach_score(model, "answers")
    expected = ours(model)
    save_model(model, words(), tmp_path / "model")
    torch.testing.assert_close(theirs(PLAIN["answers"].from_pretrained(tmp_path / "model")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "judges", "why"),
    [
        (
            "granite",
            "answers",
            "GraniteForCausalLM cannot become a reward model: transformers has no sequence classification for this family$",
        ),
        ("olmo2", "steps", "transformers has no token classification for this family$"),
        ("gpt2", "steps", r"no token classification for this family with a linear head 'score' \(GPT2ForTokenClassification"),
    ],
)
def test_what_could_not_be_saved_is_refused_at_once(family_model: Callable[..., Any], family: str, judges: Judges, why: str) -> None:
    model = family_model(family)
    with pytest.raises(ModelError, match=why):
        attach_score(model, judges)
    assert score_of(model) is None
    assert model.get_output_embeddings() is not None


@pytest.mark.parametrize("judges", ["answers", "steps"])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_models(tiny_model: Path, untied: Path, tmp_path: Path, judges: Judges, tied: bool) -> None:
    assert_saved(policy_of(tiny_model if tied else untied, None, judges), judges, tmp_path / "model", adapted=False)


@pytest.mark.parametrize("judges", ["answers", "steps"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("settings", "new_tokens"),
    [
        ({}, ()),
        ({"init": "pissa"}, ()),
        ({"dora": True}, ()),
        ({}, ("<new>",)),
        ({"save_modules": ["embed_tokens"]}, ()),
    ],
    ids=["lora", "pissa", "dora", "new-tokens", "embeddings"],
)
def test_adapters(
    tiny_model: Path, untied: Path, tmp_path: Path, judges: Judges, tied: bool, settings: dict[str, Any], new_tokens: tuple[str, ...]
) -> None:
    policy = policy_of(tiny_model if tied else untied, Adapter(rank=4, **settings), judges, new_tokens=new_tokens)
    assert_saved(policy, judges, tmp_path / "model", adapted=True)
    written = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert written["task_type"] == {"answers": "SEQ_CLS", "steps": "TOKEN_CLS"}[judges]
    assert "score" in written["modules_to_save"]


@pytest.mark.parametrize("judges", ["answers", "steps"])
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)])
def test_training_goes_on_from_a_reward_model(tiny_model: Path, tmp_path: Path, judges: Judges, adapter: Adapter | None) -> None:
    first = policy_of(tiny_model, None, judges)
    save_model(first.model, first.tokenizer, tmp_path / "first")
    second = policy_of(tmp_path / "first", adapter, judges)
    head = next(name for name in second.trainable() if "score" in name)
    assert "lora" not in head
    began, now = score_of(first.model), second.trainable()[head]
    assert began is not None
    assert 0 < (now - began.weight).abs().max() < 0.5  # the head goes on, it is not drawn anew
    assert_saved(second, judges, tmp_path / "second", adapted=adapter is not None)


def test_merged_adapter_is_a_whole_reward_model(untied: Path, tmp_path: Path) -> None:
    policy = policy_of(untied, Adapter(rank=4), "answers")
    expected = ours(policy.model)
    save_model(adapters.merge(policy.model), policy.tokenizer, tmp_path / "model")
    torch.testing.assert_close(theirs(PLAIN["answers"].from_pretrained(tmp_path / "model")), expected, rtol=1e-5, atol=1e-5)


def test_adapter_made_by_peft_alone(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT lists `classifier` and `score` as saved modules whether they are there or not."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    base.config.pad_token_id = 0
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 if parameter.requires_grad else 0)
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(ours(load_for_inference(str(tmp_path), scorer=True).model), theirs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "where"), [({"save_modules": ["lm_head"]}, "save_modules"), ({"targets": ["q_proj", "lm_head"]}, "targets")]
)
def test_an_adapter_on_the_output_head_is_refused(untied: Path, settings: dict[str, Any], where: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter.{where}: 'lm_head' cannot be trained, for a reward model has no output head"):
        policy_of(untied, Adapter(rank=4, **settings), "answers")


def test_a_classifier_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Two outputs for a whole text, as for a mood: without the bias that steps have. And five, which judge nothing known here."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for outputs, why in ((2, "a score head with no bias, but LlamaForTokenClassification needs one"), (5, "a score head with 5 outputs")):
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=outputs).save_pretrained(tmp_path / str(outputs))
        tokenizer.save_pretrained(tmp_path / str(outputs))
        model = load_model(Model(path=str(tmp_path / str(outputs))), compute_dtype=torch.float32, scorer=True)
        with pytest.raises(ModelError, match=why):
            attach_score(model, "steps")
    assert judged_by(model) is None


def test_the_output_head_is_gone(untied: Path) -> None:
    policy = policy_of(untied, None, "answers")
    assert policy.anatomy.whole.lm_head is None
    assert policy.head_bytes() == 0
    with pytest.raises(ModelError, match="a reward model has no log-probabilities"):
        policy.token_stats(batch())


def test_the_head_begins_as_transformers_draws_it(family_model: Callable[..., Any]) -> None:
    """Normal with `initializer_range`, no bias for a reward, a bias of zero for steps; the seed decides."""
    heads = []
    for judges in ("answers", "answers", "steps"):
        model = family_model("llama", hidden_size=1024, initializer_range=0.03, num_hidden_layers=1)
        torch.manual_seed(7)
        attach_score(model, judges)  # pyright: ignore[reportArgumentType]
        heads.append(score_of(model))
    reward, again, steps = heads
    assert torch.equal(reward.weight, again.weight)
    assert reward.weight.dtype is torch.float32
    assert (reward.bias, steps.bias.tolist()) == (None, [0.0, 0.0])
    assert reward.weight.std().item() == pytest.approx(0.03, rel=0.1)
    assert (reward.out_features, steps.out_features) == (1, 2)


def test_scores_are_float32_under_autocast(family_model: Callable[..., Any]) -> None:
    model = family_model("llama")
    attach_score(model, "answers")
    policy = Policy(model).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores, hidden = policy.scores(batch()), policy.hidden(batch())
    assert scores.dtype is torch.float32
    head = score_of(model)
    assert head is not None
    torch.testing.assert_close(scores, hidden[[9, 16]].float() @ head.weight.T)


def test_rows_of_a_batch_are_scored_at_their_last_token_whatever_the_padding(tiny_model: Path, tmp_path: Path) -> None:
    """The tiny model pads with the token that ends a turn: tokenizer and config are given another one, both the same."""
    policy = policy_of(tiny_model, None, "answers")
    save_model(policy.model, policy.tokenizer, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert tokenizer.pad_token_id == plain.config.pad_token_id == padding_of(policy.tokenizer) != tokenizer.eos_token_id
    texts = ["the user asks<|im_end|>", "the assistant answers in full sentences<|im_end|>"]
    alone = [plain(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    for side in ("left", "right"):
        rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
        assert plain(**rows).logits.flatten().tolist() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(
    ("special", "pad", "expected"),
    [
        (["<pad>"], "<pad>", "<pad>"),  # one of its own
        (["<|reserved|>", "<|right_pad|>"], "</s>", "<|right_pad|>"),  # one that is there for it
        (["<|reserved|>"], "</s>", "<|reserved|>"),
        ([], None, "<s>"),
    ],
)
def test_which_token_pads(special: list[str], pad: str | None, expected: str) -> None:
    raw = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, "<s>"]})
    if pad is not None:
        tokenizer.pad_token = pad
    assert padding_of(tokenizer) == tokenizer.convert_tokens_to_ids(expected)


def test_no_token_pads_where_there_is_only_the_end() -> None:
    raw = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    assert padding_of(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")) is None


def test_config_says_what_the_outputs_are(tiny_model: Path, tmp_path: Path) -> None:
    for judges, labels in (("answers", {"0": "reward"}), ("steps", {"0": "wrong", "1": "right"})):
        policy = policy_of(tiny_model, None, judges)  # pyright: ignore[reportArgumentType]
        save_model(policy.model, policy.tokenizer, tmp_path / judges)
        config = json.loads((tmp_path / judges / "config.json").read_text())
        assert config["id2label"] == labels
        assert config.get("problem_type") == ("regression" if judges == "answers" else None)
        assert "generation_config.json" not in {file.name for file in (tmp_path / judges).iterdir()}
