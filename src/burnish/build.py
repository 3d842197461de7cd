"""The parts of a run that are made from settings alone: how devices share the work, the policy, the teacher, the objective."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from burnish.config.checks_parallel import unshardable
from burnish.config.objectives import Distill, Plugin
from burnish.config.run import RunConfig
from burnish.config.sections import Adapter, Model, Train
from burnish.core import plugins
from burnish.core.errors import ConfigError, ModelError, Where
from burnish.data.types import Batch
from burnish.engine.backend import Backend
from burnish.models.activations import free_memory
from burnish.models.adapters import attach
from burnish.models.anatomy import dissect
from burnish.models.context import refuse_heads
from burnish.models.load import describe, load_model, stored_bytes
from burnish.models.patch import KernelReport
from burnish.models.policy import Policy
from burnish.models.score import Judges, attach_score
from burnish.models.tensor import refuse_layers
from burnish.models.tokenizer import add_tokens, load_tokenizer
from burnish.objectives.base import Loss, Objective
from burnish.objectives.distill import DistillObjective

_ROOM = 0.85
"""Share of the free memory that activations may fill: the rest is for what comes and goes within a layer, and for fragmentation."""
_BYTES_PER_TRAINED = 12
"""Gradient and two moments in float32."""


def build_policy(
    model: Model, adapter: Adapter | None, backend: Backend, tokenizer: PreTrainedTokenizerFast, *, judges: Judges | None = None
) -> Policy:
    """Loads a model, puts the adapter on it, and a score head where it `judges`, and wraps all as a policy."""
    reads = backend.reads_weights
    whole = load_model(
        model,
        compute_dtype=backend.storage_dtype,
        device=backend.load_device,
        trainable=adapter is None,
        tokenizer=tokenizer,
        scorer=judges is not None,
        weights=reads,
    )
    trained: nn.Module = whole
    with nullcontext() if reads else torch.device("meta"):
        if adapter is not None:
            trained = attach(whole, adapter, new_token_ids=add_tokens(tokenizer, model.new_tokens), revision=model.revision)
        if judges is not None:
            attach_score(trained, judges)
    # What runs on a GPU is proven on that GPU: weights that one rank has, on the host, have nothing to prove it with on all of them.
    unproven, fast = backend.spreads, model.kernels == "auto"
    now = fast and not unproven and backend.grid.tensor == 1  # layers that are cut are proven when they are
    policy = Policy(trained, tokenizer, attention=model.attention, kernels=now, verify=reads)
    if unproven and fast:
        policy.kernels = KernelReport(reason="one process loads the weights, where fast modules cannot be proven for all")
    backend.share_context(policy, verify=not unproven)
    backend.share_layers(policy, kernels=fast)
    return policy


def settle_strategy(config: RunConfig, backend: Backend) -> None:
    """Chooses how several devices share the work, before rows are read and weights are loaded to where that wants them.

    Raises:
        ConfigError: the model fits on no device, and the run is one that shards do not allow, or its attention heads cannot be shared.
    """
    if backend.world_size == 1:
        return
    described = describe(config.model)
    if backend.grid.context > 1:
        refuse_heads(described.config.get_text_config(decoder=True).num_attention_heads, backend.grid.context, backend.world_size)
    if backend.grid.tensor > 1:
        refuse_layers(dissect(described), backend.grid.tensor, backend.world_size)
    elements, model, whole = sum(p.numel() for p in described.parameters()), config.model, config.adapter is None
    size = 4 if whole else stored_bytes(model, backend.storage_dtype)
    rest = elements * _BYTES_PER_TRAINED if whole else 0  # an adapter's are next to nothing
    backend.settle(elements * size, rest, _free(backend), cuttable=model.quantize == "none")
    if backend.sharded and (why := unshardable(config)):
        reason = f"a device does not hold the run ({backend.reason}), and {why}"
        raise ConfigError(reason, where=Where(field="parallel.strategy"))


def fit_activations(train: Train, policy: Policy, backend: Backend, micro_batch_tokens: int) -> str:
    """Chooses what is kept for the backward pass and what is computed again; says so, where it was left to choose."""
    if train.checkpoint_activations != "auto" or train.offload_activations:
        on = train.checkpoint_activations != "off"
        policy.checkpoint_activations(on, tile=train.mlp_tile, offloaded=train.offload_activations)
        return ""
    trained = sum(p.nbytes for p in policy.trainable().values()) * _BYTES_PER_TRAINED / 4
    if backend.sharded:
        trained = trained / backend.shards - backend.freed_by_shards(policy.model)
    budget = _ROOM * _free(backend) - trained - policy.head_bytes()
    if backend.grid.model_ranks > 1:  # a layer that is computed again is so on all ranks, which exchange its tokens again
        budget = min(backend.gather(budget))
    if not backend.reads_weights:
        line, ways = backend.from_main(("", policy.recomputed))
        policy.recompute(ways, tile=train.mlp_tile)
        return line
    with backend.autocast():
        line = policy.fit_activations(-(-micro_batch_tokens // backend.grid.context), budget, tile=train.mlp_tile)
    return backend.from_main((line, policy.recomputed))[0] if backend.spreads else line


def _free(backend: Backend) -> float:
    """Free bytes of this process's device."""
    return free_memory(backend.device) / (backend.local_processes if backend.device.type == "cpu" else 1)


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
    alone = backend.grid.tensor == 1
    policy = Policy(whole.requires_grad_(False), tokenizer, kernels=alone).eval()
    backend.share_context(policy)
    backend.share_layers(policy, trains=False, kernels=True)
    return policy


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
