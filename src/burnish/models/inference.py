"""Loads what chat and evaluation ask for by one name: a run folder, an adapter, or a model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from burnish.config.sections import Model
from burnish.core.errors import ModelError
from burnish.models import adapters, score
from burnish.models.load import load_model
from burnish.models.locate import locate
from burnish.models.tokenizer import load_tokenizer, read_tokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to answer. `tuned` says whether an adapter is on it, so that `as_base` can switch it off."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    base: str
    tuned: bool

    @contextmanager
    def as_base(self) -> Generator[None]:
        """Inside, the model answers as its base.

        Raises:
            ModelError: when it carries no adapter, so that there is no base to compare with.
        """
        if not self.tuned:
            raise ModelError(f"'{self.base}' is a whole model without an adapter: there is no base model to compare it with")
        with adapters.disabled(self.model):
            yield


def load_for_inference(
    target: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    scorer: bool = False,
) -> Loaded:
    """Loads a run folder (its `model/`), an adapter folder, or a model (hub id, folder, GGUF file, `package:NAME`).

    Args:
        target: What to load.
        dtype: Storage and compute type.
        device: Where the weights go.
        attention: Name in transformers' AttentionInterface; None chooses.
        base: The base model of an adapter, where it is no longer where the adapter says.
        trust_remote_code: Run Python code that came with the (base) model.
        scorer: A reward model is wanted, not one that writes.

    Raises:
        ModelError: when there is no such thing, or the run has not saved a model yet.
        DependencyError: when a needed package is not installed.
    """
    path = _trained(Path(target).expanduser()) or target
    folder = Path(path)
    config = adapters.read_config(adapters.find_adapter(path)) if (folder / adapters.CONFIG_FILE).is_file() else None
    if config is not None and config.task_type in score.TASKS.values() and not scorer:
        raise ModelError(f"'{target}' is a reward model, which scores answers and writes none", hint="In Python: burnish.load_reward.")
    source = path if config is None else _base_of(path, base or config.base_model_name_or_path)
    revision = config.revision if config is not None and base is None else None
    model = Model(path=source, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = _tokenizer(model, folder)
    plain = load_model(model, compute_dtype=dtype, device=device, attention=attention, scorer=scorer)
    if config is None:
        return Loaded(plain.eval(), tokenizer, source, tuned=False)
    _grow(plain, tokenizer)
    return Loaded(adapters.load(plain, path).eval(), tokenizer, source, tuned=True)


def _trained(folder: Path) -> str | None:
    """The trained model of a run folder, or None where `folder` is no run."""
    if not (folder / "run.yaml").is_file():
        return None
    if not (folder / "model").is_dir():
        raise ModelError(
            f"the run '{folder}' has no trained model yet (no folder '{folder / 'model'}')", hint="Let the training finish first."
        )
    return str(folder / "model")


def _base_of(adapter: str, base: str | None) -> str:
    if not base:
        raise ModelError(f"the adapter '{adapter}' does not say which base model it belongs to")
    try:
        locate(base)
    except ModelError as error:
        raise ModelError(f"the base model of the adapter '{adapter}' is gone: {error.message}", hint=error.hint) from error
    return base


def _tokenizer(model: Model, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that was saved with an adapter knows its new tokens and chat template; the base's does not."""
    saved = (folder / "tokenizer.json").is_file()
    return read_tokenizer(str(folder), trust_remote_code=model.trust_remote_code) if saved else load_tokenizer(model)


def _grow(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes room for tokens that the adapter brings; their rows come with it."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)
