"""The score head of reward models: one number (or a few) from the last hidden state of a token.

It is the module `score` of transformers' `...ForSequenceClassification` (one output, no bias: a reward) and `...ForTokenClassification`
(two outputs and a bias: a step is wrong, or right), and is saved as such: a whole model as a folder of that class, an adapter as PEFT of
that task. Until then the model stays the causal LM that it was, whose output head is not computed.
"""

# transformers and PEFT are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from burnish.core.errors import ModelError

Judges = Literal["answers", "steps"]

NAME = "score"
_OUTPUTS: dict[Judges, int] = {"answers": 1, "steps": 2}
_CLASSES: dict[Judges, Any] = {"answers": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "steps": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING}
TASKS: dict[Judges, str] = {"answers": "SEQ_CLS", "steps": "TOKEN_CLS"}
"""What PEFT calls it."""


def attach_score(model: nn.Module, judges: Judges) -> None:
    """Gives a causal LM a trained score head, in fp32, and freezes an output head that nothing uses any more.

    Weights are drawn as transformers draws them: normal, with the model's `initializer_range`. A head that the model has already (an
    adapter that goes on) is kept.

    Args:
        model: The model, with or without an adapter.
        judges: Whole answers, by one number, or steps, by two.

    Raises:
        ModelError: transformers has no class for such a model of this family, or the head that is there is for the other kind.
    """
    whole: Any = _whole(model)
    if type(whole.config) not in _CLASSES[judges]:
        kind = "sequence" if judges == "answers" else "token"
        raise ModelError(f"{type(whole).__name__} cannot become a reward model: transformers has no {kind} classification for this family")
    outputs = _OUTPUTS[judges]
    present = score_of(model)
    if present is not None and present.out_features != outputs:
        raise ModelError(f"the model has a score head with {present.out_features} outputs, but judging {judges} needs {outputs}")
    if present is None:
        text = whole.config.get_text_config(decoder=True)
        present = nn.Linear(text.hidden_size, outputs, bias=judges == "steps", device=whole.device, dtype=torch.float32)
        nn.init.normal_(present.weight, std=float(getattr(text, "initializer_range", 0.02)))
        if judges == "steps":
            nn.init.zeros_(present.bias)
        setattr(whole, NAME, present)
    present.float().requires_grad_(True)
    head = whole.get_output_embeddings()
    if head is not None and head.weight is not whole.get_input_embeddings().weight:
        head.requires_grad_(False)


def score_of(model: nn.Module) -> nn.Linear | None:
    """The score head of a model, or None."""
    found = getattr(_whole(model), NAME, None)
    return found if isinstance(found, nn.Linear) else None


def judged_by(model: nn.Module) -> Judges | None:
    """What a model with a score head judges; None where it has none."""
    head = score_of(model)
    return None if head is None else "answers" if head.out_features == 1 else "steps"


def as_classifier(model: PreTrainedModel, judges: Judges, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The same weights as transformers' classification model, without the output head. No weight is copied.

    Raises:
        ModelError: that class does not have exactly these weights.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = _OUTPUTS[judges]
    config.tie_word_embeddings = False
    config.pad_token_id = padding_of(tokenizer)
    if judges == "steps":
        config.id2label, config.label2id = {0: "wrong", 1: "right"}, {"wrong": 0, "right": 1}
        config.classifier_dropout = 0.0
    kind = _CLASSES[judges][type(config)]
    with torch.device("meta"):
        shell = kind(config)
    names = set(shell.state_dict())
    state = {name: value for name, value in model.state_dict().items() if name in names}
    if missing := sorted(names - set(state)):
        raise ModelError(f"{kind.__name__} has weights that this model has not: {', '.join(missing[:3])}")
    shell.load_state_dict(state, assign=True)
    return shell.eval()


def padding_of(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """A token that no text ends with: transformers looks for a row's last token by going over such ones. None where there is none.

    Many chat models pad with their end-of-turn token; a score of what comes before it would be another one.
    """
    eos = cast("int | None", tokenizer.eos_token_id)
    ends = {eos, *_ids_of(tokenizer, ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"))}
    special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special and number not in ends]
    return tokenizer.pad_token_id if tokenizer.pad_token_id in special else next(iter(special), None)


def _ids_of(tokenizer: PreTrainedTokenizerFast, names: tuple[str, ...]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in names if name in vocabulary]


def _whole(model: nn.Module) -> nn.Module:
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
