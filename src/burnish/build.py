"""The parts of a run that are made from settings alone: the policy, the teacher, the objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from burnish.config.objectives import Distill, Plugin
from burnish.config.run import RunConfig
from burnish.config.sections import Adapter, Model
from burnish.core import plugins
from burnish.core.errors import ConfigError, ModelError, Where
from burnish.data.types import Batch
from burnish.engine.backend import Backend
from burnish.models.adapters import attach
from burnish.models.load import load_model
from burnish.models.patch import KernelReport
from burnish.models.policy import Policy
from burnish.models.score import Judges, attach_score
from burnish.models.tokenizer import add_tokens, load_tokenizer
from burnish.objectives.base import Loss, Objective
from burnish.objectives.distill import DistillObjective


def build_policy(
    model: Model, adapter: Adapter | None, backend: Backend, tokenizer: PreTrainedTokenizerFast, *, judges: Judges | None = None
) -> Policy:
    """Loads a model, puts the adapter on it, and a score head where it `judges`, and wraps all as a policy."""
    whole = load_model(
        model,
        compute_dtype=backend.storage_dtype,
        device=backend.load_device,
        trainable=adapter is None,
        tokenizer=tokenizer,
        scorer=judges is not None,
    )
    trained: nn.Module = whole
    if adapter is not None:
        trained = attach(whole, adapter, new_token_ids=add_tokens(tokenizer, model.new_tokens), revision=model.revision)
    if judges is not None:
        attach_score(trained, judges)
    # What runs on a GPU is proven on that GPU: weights that are on the host until they are cut into shards have nothing to prove it with.
    unproven = backend.load_device != backend.device
    policy = Policy(trained, tokenizer, attention=model.attention, kernels=model.kernels == "auto" and not unproven)
    if unproven and model.kernels == "auto":
        policy.kernels = KernelReport(reason="the weights are loaded on the host, where fast modules for this device cannot be proven")
    return policy


def build_teacher(path: str, backend: Backend, tokenizer: PreTrainedTokenizerFast) -> Policy:
    """Loads the model that a distilled one learns from, frozen.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer is another one.
    """
    settings = Model(path=path)
    theirs, ours = load_tokenizer(settings).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        differs = sorted(token for token, _ in ours.items() ^ theirs.items())[0]
        raise ModelError(
            f"the teacher '{path}' has another tokenizer: the token {differs!r} is not the same in both",
            hint="Choose a teacher of the student's family: distillation compares the models token by token.",
        )
    whole = load_model(settings, compute_dtype=backend.storage_dtype, device=backend.device)
    return Policy(whole.requires_grad_(False), tokenizer).eval()


def build_objective(config: RunConfig, base: Path, *, teacher: Policy | None = None) -> Objective:
    """The objective of a run: a built-in kind, or one of the user's own.

    Args:
        config: The run.
        base: Folder that relative paths of plug-ins belong to.
        teacher: Whom a distilled model learns from.

    Raises:
        ConfigError: there is none of that name, or it does not take the given options.
    """
    settings = config.objective
    if isinstance(settings, Distill) and teacher is not None:
        return DistillObjective(settings, teacher=teacher, tokens=len(teacher.tokenizer))
    if not isinstance(settings, Plugin):
        return plugins.built_in("objectives", settings.kind).build(settings)
    made = plugins.load("objectives", settings.kind, base)
    if not isinstance(made, type):
        if settings.options:
            raise ConfigError(
                f"a function takes no options, found {', '.join(settings.options)}", where=Where(field=f"objective {settings.kind}")
            )
        return _Function(made)
    try:
        options = made.Config(**settings.options) if hasattr(made, "Config") else settings.options
        return made(options) if hasattr(made, "Config") else made(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"does not take these options: {error}", where=Where(field=f"objective {settings.kind}")) from error


class _Function:
    """A plain function `(policy, batch) -> Loss or scalar sum` as an objective."""

    needs_reference = False

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, policy: Any, batch: Batch) -> Loss:
        made = self._function(policy, batch)
        return made if isinstance(made, Loss) else Loss(made)
