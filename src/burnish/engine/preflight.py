"""What is looked at and said before the first step, when model and data are there."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from burnish.core.errors import ConfigError, Where
from burnish.core.log import counted, warn
from burnish.data.cache import Examples
from burnish.engine.backend import Backend
from burnish.engine.progress import short
from burnish.kernels import native
from burnish.models.policy import Policy
from burnish.models.positions import reach


def look_at_lengths(model: object, sets: Iterable[Examples | None], max_length: int) -> None:
    """Looks at the longest example beside the positions that the model knows.

    Args:
        model: A transformers model.
        sets: The data, where it is there already; a stream may bring anything up to `max_length`.
        max_length: `data.max_length`.

    Raises:
        ConfigError: positions are rows of a table, and it has too few.
    """
    positions, table = reach(model)
    longest = max((int(examples.lengths.max()) for examples in sets if examples is not None), default=max_length if table else 0)
    if positions is None or longest <= positions:
        return
    if table:
        where = Where(field="data.max_length")
        raise ConfigError(f"examples have up to {longest:,} tokens, but the model has {positions:,} positions only", where=where)
    warn(f"examples have up to {longest:,} tokens, the model was made for {positions:,} (lower data.max_length if that is not meant)")


def refuse_cut_steps(tokens: float, micro_batch_tokens: int) -> None:
    """Says that steps of so many tokens on the average do not fit into the one micro-batch that updates within the backward pass need.

    Raises:
        ConfigError: they do not.
    """
    if tokens > micro_batch_tokens:
        raise ConfigError(
            f"a step of about {tokens:,.0f} tokens must be one micro-batch, but train.micro_batch_tokens is {micro_batch_tokens:,}",
            where=Where(field="train.optimizer.in_backward"),
            hint="Raise train.micro_batch_tokens, lower train.batch_size, or set train.optimizer.in_backward: false",
        )


def tell_lone_answer(examples: int, batch_size: int | None) -> None:
    """Says that the last step of an epoch is one answer, which has no other to be mismatched with (KTO's baseline is 0 there)."""
    if batch_size and examples > 1 and (batch_size == 1 or examples % batch_size == 1):
        last = "every step" if batch_size == 1 else "the last step of an epoch"
        warn(f"{last} holds one answer, and KTO's baseline is 0 there: it is estimated from the other answers of the step")


def announcement(policy: Policy, backend: Backend, steps: int) -> str:
    """What is about to happen, in one line."""
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    everything = sum(_size(p) for p in policy.model.parameters())
    devices = f"{backend.world_size} x " if backend.world_size > 1 else ""
    dtype = str(backend.compute_dtype).removeprefix("torch.")
    return (
        f"training {short(trained)} of {short(everything)} parameters ({trained / everything:.2%}) for {counted(steps, 'step')}"
        f" on {devices}{backend.device.type}, in {dtype}{_sharing(backend)}"
    )


def _sharing(backend: Backend) -> str:
    """How several devices share the work, and why."""
    if backend.world_size == 1:
        return ""
    sharding, said = backend.sharding, f", {backend.strategy}"
    if sharding is not None:
        said += f": weights in {sharding.shards} shards" + (f", {sharding.replicas} times" if sharding.replicas > 1 else "")
        said += f", {sharding.replicated / 2**20:,.0f} MiB of quantised weights whole on each" if sharding.replicated else ""
    said += f" ({backend.reason})" if backend.reason else ""
    return said + (f", every {backend.grid.context} share the tokens of a micro-batch" if backend.grid.context > 1 else "")


def without_c(device: torch.device) -> str:
    """One line where this run could have C kernels and has none; empty elsewhere."""
    reason = native.why_not() if device.type == "cpu" else None
    return f"C kernels: none, the fast modules compute in plain torch, exact but slower: {reason}" if reason else ""


def _size(parameter: nn.Parameter) -> int:
    """Numbers in a weight; of a quantised one, several are packed into each element."""
    quantised = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantised is None else math.prod(quantised.shape)
