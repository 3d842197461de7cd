"""The score head of reward models: one number (or a few) from the last hidden state of a token.

It is the module `score` of transformers' `...ForSequenceClassification` (one output, no bias: a reward) and `...ForTokenClassification`
(two outputs and a bias: a step is wrong, or right), and is saved as such: a whole model as a folder of that class, an adapter as PEFT of
that task. Until then the model stays the causal LM that it was, without its output head.
"""

# transformers and PEFT are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from burnish.core.errors import AdapterError, ModelError, TemplateError
from burnish.data.render import Renderer

Judges = Literal["answers", "steps"]

NAME = "score"
_OUTPUTS: dict[Judges, int] = {"answers": 1, "steps": 2}
_CLASSES: dict[Judges, Any] = {"answers": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "steps": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING}
TASKS: dict[Judges, str] = {"answers": "SEQ_CLS", "steps": "TOKEN_CLS"}
"""What PEFT calls it."""
_LABELS: dict[Judges, list[str]] = {"answers": ["reward"], "steps": ["wrong", "right"]}


def attach_score(model: nn.Module, judges: Judges) -> None:
    """Gives a causal LM a trained score head, in fp32, and takes off its output head, which nothing uses any more.

    Weights are drawn as transformers draws them: normal, with the model's `initializer_range`. A head that the model has already (an
    adapter that goes on) is kept.

    Args:
        model: The model, with or without an adapter.
        judges: Whole answers, by one number, or steps, by two.

    Raises:
        ModelError: transformers has no class that such a model of this family could be saved as, or the head that is there is for the
            other kind.
        AdapterError: the adapter trains the output head.
    """
    whole: Any = _whole(model)
    shell = _shell(whole, judges)
    outputs = _OUTPUTS[judges]
    present = score_of(model)
    if present is not None and present.out_features != outputs:
        raise ModelError(f"the model has a score head with {present.out_features} outputs, but judging {judges} needs {outputs}")
    like: Any = getattr(shell, NAME)
    if present is not None and (getattr(present, "bias", None) is None) is not (like.bias is None):
        have, needs = ("no bias", "one") if present.bias is None else ("a bias", "none")  # pyright: ignore[reportUnnecessaryComparison]
        raise ModelError(f"the model has a score head with {have}, but {type(shell).__name__} needs {needs}")
    if present is None:
        text = whole.config.get_text_config(decoder=True)
        present = nn.Linear(like.in_features, outputs, bias=like.bias is not None, device=whole.device, dtype=torch.float32)
        nn.init.normal_(present.weight, std=float(getattr(text, "initializer_range", 0.02)))
        if like.bias is not None:
            nn.init.zeros_(present.bias)
        setattr(whole, NAME, present)
    present.float().requires_grad_(True)
    _refuse_trained_head(model, whole)
    drop_output_head(whole)


def put_score(whole: Any, state: Mapping[str, torch.Tensor], *, trainable: bool) -> None:
    """Gives a model the score head of a saved adapter.

    Raises:
        KeyError: the head has no weight.
    """
    weight = state["weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state, device=whole.device, dtype=torch.float32)
    head.load_state_dict({name: value.float() for name, value in state.items()})
    setattr(whole, NAME, head.requires_grad_(trainable))


def drop_output_head(whole: Any) -> None:
    """Takes the output head off a causal LM. Its embeddings are tied to nothing then, which PEFT must know."""
    if whole.get_output_embeddings() is not None:
        whole.set_output_embeddings(None)
        whole.config.tie_word_embeddings = whole.config.get_text_config(decoder=True).tie_word_embeddings = False


def _refuse_trained_head(model: Any, whole: Any) -> None:
    found = whole.get_output_embeddings()
    head = next((name for name, module in whole.named_modules() if module is found), None) if found is not None else None
    for config in getattr(model, "peft_config", {}).values():
        for key, names in (("save_modules", config.modules_to_save), ("targets", config.target_modules)):
            if head is not None and any(name.rpartition(".")[2] == head for name in names or ()):
                raise AdapterError(f"adapter.{key}: '{head}' cannot be trained, for a reward model has no output head")


def score_of(model: nn.Module) -> nn.Linear | None:
    """The score head of a model, or None."""
    found = getattr(_whole(model), NAME, None)
    return found if isinstance(found, nn.Linear) else None


def judged_by(model: nn.Module) -> Judges | None:
    """What a model with a score head judges; None where it has none, or one with another number of outputs."""
    head = score_of(model)
    return None if head is None else next((judges for judges, outputs in _OUTPUTS.items() if head.out_features == outputs), None)


def as_classifier(model: PreTrainedModel, judges: Judges, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The same weights as transformers' classification model, without the output head. No weight is copied.

    Raises:
        ModelError: that class does not have exactly these weights.
    """
    shell = _shell(model, judges, padding=padding_of(tokenizer))
    names = set(shell.state_dict())
    state = {name: value for name, value in model.state_dict().items() if name in names}
    if missing := sorted(names - set(state)):
        raise ModelError(f"{type(shell).__name__} has weights that this model has not: {', '.join(missing[:3])}")
    shell.load_state_dict(state, assign=True)
    return shell.eval()


def _shell(whole: Any, judges: Judges, padding: int | None = None) -> Any:
    """The class that transformers has for such a model of this family, without weights.

    Raises:
        ModelError: there is none, or it is built in another way.
    """
    kind = "sequence" if judges == "answers" else "token"
    refusal = f"{type(whole).__name__} cannot become a reward model: transformers has no {kind} classification for this family"
    if type(whole.config) not in _CLASSES[judges]:
        raise ModelError(refusal)
    config = copy.deepcopy(whole.config)
    labels = _LABELS[judges]
    config.id2label, config.label2id = dict(enumerate(labels)), {label: number for number, label in enumerate(labels)}
    config.tie_word_embeddings = False
    config.pad_token_id = config.get_text_config(decoder=True).pad_token_id = padding
    if judges == "answers":
        config.problem_type = "regression"  # so that a pipeline gives the score as it is
    else:
        config.classifier_dropout = 0.0
    with torch.device("meta"):
        shell = _CLASSES[judges][type(config)](config)
    head = getattr(shell, NAME, None)
    if not isinstance(head, nn.Linear) or head.out_features != len(labels) or type(shell.base_model) is not type(whole.base_model):
        raise ModelError(f"{refusal} with a linear head '{NAME}' ({type(shell).__name__} is built in another way)")
    return shell


def padding_of(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """A token that no text ends with: transformers looks for a row's last token by going over such ones. None where there is none.

    Many chat models pad with their end-of-turn token; a score of what comes before it would be another one.
    """
    try:
        ends = set(Renderer(tokenizer).stop_ids)
    except TemplateError:  # a template that ends turns with no token
        ends = {cast("int | None", tokenizer.eos_token_id)}
    known = cast("int | None", tokenizer.pad_token_id)
    if known is not None and known not in ends:
        return known
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special and number not in ends}
    meant = [number for number, content in special.items() if "pad" in content.lower()]
    return next(iter([*meant, *special]), None)


def _whole(model: nn.Module) -> nn.Module:
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
