"""What is looked at and said before the first step, when model and data are there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from burnish.config.run import RunConfig
from burnish.core.errors import ConfigError, StorageError, Where
from burnish.core.log import counted, warn
from burnish.core.storage import free_bytes
from burnish.data.cache import Examples
from burnish.engine import checkpoint
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


_STATE = {"adamw": 8, "paged_adamw": 8, "adamw_schedule_free": 8, "lion": 4, "muon": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of state for each trained number, at least."""


def look_at_disk(folder: Path, policy: Policy, backend: Backend, config: RunConfig, steps: int) -> None:
    """Compares the room for the run folder with what will be written there: by a lower bound, on the rank that writes.

    Checkpoints that are there make room: an old one goes when a new one is written, and the model comes after that.

    Args:
        folder: The run folder.
        policy: What is trained.
        backend: Who writes.
        config: What is kept.
        steps: Of the whole run. Where the last one's checkpoint is there, only the model is still to be written.

    Raises:
        StorageError: there is no room for the model and, where any are written, one checkpoint. Nothing has been written by then.
    """
    free = free_bytes(folder) if backend.is_main else None
    if free is None:
        return
    trained = {name: (_size(name, p, backend), p.element_size()) for name, p in policy.trainable().items()}
    weights = sum(count * size for count, size in trained.values())
    copies = 2 if policy.kept_reference else 1
    one = copies * weights + sum(count for count, _ in trained.values()) * _STATE.get(config.train.optimizer.kind, 0)
    everything = policy.model.named_parameters()
    model = weights if config.adapter is not None else sum(_size(name, p, backend) * p.element_size() for name, p in everything)
    there = [checkpoint.step_of(path) for path in checkpoint.folders(folder / "checkpoints")]
    saves = (config.save.every is not None or (config.save.best and config.data.eval is not None)) and steps not in there
    stay = min(config.save.keep, len(there) + 1)
    least = max(one, model + one * (stay - len(there))) if saves else model
    if free < least:
        a_checkpoint = f"a checkpoint of {_megabytes(one)} and " if saves else ""
        raise StorageError(
            f"{a_checkpoint}a model of {_megabytes(model)} are to be written, and {_megabytes(free)} are free",
            where=Where(file=str(folder)),
            hint="make room, or choose another output folder",
        )
    kept = config.save.keep + (1 if config.save.best and config.data.eval is not None else 0)
    more = max(0, kept - len(there))
    most = max(one * (more + 1), model + one * more)
    if saves and free < most:
        warn(
            f"{counted(kept, 'checkpoint')} of {_megabytes(one)}, one more while it is written, and a model of {_megabytes(model)} will be "
            f"in {folder}, and {_megabytes(free)} are free: lower save.keep, or make room"
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def notes(policy: Policy, backend: Backend, config: RunConfig) -> list[str]:
    """What else is to be known, a line each."""
    lines = [policy.kernels.line()]
    if config.model.kernels != "off" and (slower := without_c(backend.device)):
        lines.append(slower)
    if (kind := config.train.optimizer.kind).endswith("schedule_free"):
        lines.append(f"{kind}: the rate stays constant after the warm-up, whatever train.schedule says; the weights are averaged instead")
    return lines


def announcement(policy: Policy, backend: Backend, steps: int) -> str:
    """What is about to happen, in one line."""
    sizes = [(_size(name, parameter, backend), parameter.requires_grad) for name, parameter in policy.model.named_parameters()]
    trained, everything = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
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
    said += f", every {backend.grid.context} share the tokens of a micro-batch" if backend.grid.context > 1 else ""
    return said + (f", every {backend.grid.tensor} share the weights of each layer" if backend.grid.tensor > 1 else "")


def without_c(device: torch.device) -> str:
    """One line where this run could have C kernels and has none; empty elsewhere."""
    reason = native.why_not() if device.type == "cpu" else None
    return f"C kernels: none, the fast modules compute in plain torch, exact but slower: {reason}" if reason else ""


def _size(name: str, parameter: nn.Parameter, backend: Backend) -> int:
    """Numbers in a weight, whatever part of it is here; of a quantised one, several are packed into each element."""
    quantised, part = getattr(parameter, "quant_state", None), backend.layout.get(name)
    if quantised is not None:
        return math.prod(quantised.shape)
    return parameter.numel() if part is None else math.prod(part.shape)
