"""Where the reference model's log-probabilities come from.

    adapter_off    the policy without its adapter, in the same batch: no memory, one forward pass for each look at an example
    precomputed    each example looked at once before the first step, by the weights that the run starts from, and kept on disk: no
                   second model, one forward pass for each example however often it is trained on
    copy           the values that the trained weights started from, put in their place for the reference's pass: for streams and for
                   references that follow the policy

All three give the same numbers. `choose` takes the one that costs least.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import torch

from burnish.config.objectives import Objective, ReferenceKind, Sync
from burnish.config.run import RunConfig
from burnish.core.errors import DataError
from burnish.core.log import console, info, warn
from burnish.data.cache import Examples
from burnish.data.collate import collate
from burnish.data.loader import ExampleSet, Loader
from burnish.data.packing import plan_micro_batches
from burnish.data.prepare import cache_folder
from burnish.data.progress import bar
from burnish.data.stream import StreamLoader
from burnish.data.types import Example
from burnish.engine.backend import Backend
from burnish.engine.events import Callback, State
from burnish.engine.step import StepResult
from burnish.models.locate import fingerprint
from burnish.models.policy import Policy

__all__ = ["Moves", "Referenced", "choose", "moves", "precompute", "prepare"]

Floats = npt.NDArray[np.float32]
_WORDS: dict[str, str] = {
    "adapter_off": "the model without its adapter, in the same batches",
    "precomputed": "log-probabilities computed once and kept on disk",
    "copy": "a copy of the trained weights as they are at the start",
}
_SAVED_EVERY = 200  # micro-batches: what a crash can cost


def choose(asked: ReferenceKind, *, adapter_off: bool, moves: bool, mismatched: bool, looks: float | None) -> tuple[ReferenceKind, str]:
    """The kind of reference that costs least among those that are exact, and why.

    Args:
        asked: What the run file says.
        adapter_off: Whether the policy without its adapter is the model that the run starts from.
        moves: The reference follows the policy.
        mismatched: It is asked about answers to other prompts as well, which meet anew in every step.
        looks: How often each example is looked at in the run, training and evaluation together, on the average; None where the rows are
            streamed, and so not known before the run.
    """
    if asked != "auto":
        return asked, "as the run file says"
    if moves:
        return "copy", "it follows the policy"
    if looks is None or mismatched:
        why = "the rows are streamed" if looks is None else "answers meet other prompts in every step"
        return ("adapter_off", why) if adapter_off else ("copy", why)
    if not adapter_off:
        return "precomputed", "no second model in memory"
    if looks > 1.05:
        return "precomputed", f"each example is looked at {looks:.3g} times"
    return "adapter_off", "each example is looked at once"


def prepare(
    policy: Policy,
    config: RunConfig,
    loader: Loader | StreamLoader,
    train: Examples | None,
    held_out: Examples | None,
    steps: int,
    backend: Backend,
    micro_batch_tokens: int,
) -> ExampleSet | None:
    """Chooses where the reference comes from, says so, and gets it ready. The policy has the weights that the run starts from.

    Args:
        policy: The model to train.
        config: The run.
        loader: Of the training examples; where log-probabilities are computed before the run, it gets them.
        train: The training examples; None where they are streamed.
        held_out: The held-out examples.
        steps: Of the whole run.
        backend: Devices and precision.
        micro_batch_tokens: Most tokens computed at once.

    Returns:
        The held-out examples, with the reference's log-probabilities where these are computed already.
    """
    looks = _looks(config, loader, len(train), len(held_out or ()), steps) if isinstance(loader, Loader) and train is not None else None
    kind, why = choose(
        getattr(config.objective, "reference", "auto"),
        adapter_off=config.adapter is not None and config.adapter.path is None,  # a saved one is where the run starts from
        moves=getattr(config.objective, "sync", None) is not None,
        mismatched=config.objective.mismatched if isinstance(config.objective, Objective) else False,
        looks=looks,
    )
    info(f"reference: {_WORDS.get(kind, kind)} ({why})")
    if kind == "copy":
        policy.keep_reference()
    if kind != "precomputed" or train is None or not isinstance(loader, Loader):
        return held_out
    options: dict[str, Any] = {
        "identity": _identity(config, backend),
        "folder": cache_folder(config.data),
        "backend": backend,
        "micro_batch_tokens": micro_batch_tokens,
        "packing": config.data.packing == "auto",
    }
    loader.refer(precompute(policy, train, loader.looked_at(steps), what="data.train", **options))
    if held_out is None or not (config.evaluation.every or config.evaluation.at_start):
        return held_out
    return precompute(policy, held_out, np.arange(len(held_out)), what="data.eval", **options)


def moves(policy: Policy, config: RunConfig, source: Loader | StreamLoader) -> list[Callback]:
    """What moves the reference in a run where it follows the policy."""
    sync: Sync | None = getattr(config.objective, "sync", None)
    if sync is None:
        return []
    size = {"steps_per_epoch": source.steps_per_epoch, "tokens_per_step": source.tokens_per_step}
    return [Moves(policy, sync.mix, max(1, sync.every.steps(**size)))]


class Referenced:
    """Examples with the reference's log-probabilities beside their tokens (an ExampleSet, see `data.loader`).

    Args:
        examples: The examples.
        logprobs: float32 [K] of all trained predictions, in the order of the examples.
    """

    def __init__(self, examples: Examples, logprobs: Floats) -> None:
        self._examples = examples
        self._logprobs = logprobs
        self._ends = np.cumsum(examples.trained, dtype=np.int64)
        self.lengths, self.trained, self.weights, self.leading = examples.lengths, examples.trained, examples.weights, examples.leading

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Example:
        """One example."""
        end = int(self._ends[index])
        return replace(self._examples[index], reference=self._logprobs[end - int(self.trained[index]) : end])


def precompute(
    policy: Policy,
    examples: Examples,
    needed: npt.NDArray[np.int64],
    *,
    identity: Any,
    folder: Path,
    backend: Backend,
    micro_batch_tokens: int,
    packing: bool = True,
    what: str = "data.train",
) -> Referenced:
    """Computes the reference's log-probabilities of some examples, or takes them from the disk.

    What has been computed is kept from time to time and at the end, so an interrupted run goes on where it stopped, and a longer one
    computes only what is new.

    Args:
        policy: With the weights that the run starts from.
        examples: The whole set.
        needed: Places of the examples that the run will look at.
        identity: All that decides the numbers besides the examples: model, adapter, precision (JSON-able).
        folder: Of the cache.
        backend: Devices and precision.
        micro_batch_tokens: Most tokens computed at once.
        packing: False computes examples one by one.
        what: For the bar.

    Raises:
        DataError: the folder cannot be written.
    """
    content = {"identity": identity, "examples": examples.fingerprint, "selection": examples.selection()}
    key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
    store = _Store(folder / f"{key}.reference.npy", int(examples.trained.sum(dtype=np.int64)), writes=backend.is_main)
    # What is missing decides how the work is shared out, so all ranks go by what the first one has: their disks may differ.
    store.values = backend.gather(store.values if backend.is_main else None)[0]
    ends = np.cumsum(examples.trained, dtype=np.int64)
    first = np.maximum(ends - examples.trained, 0)
    missing = needed[np.isnan(store.values[np.minimum(first[needed], max(len(store.values) - 1, 0))])] if len(store.values) else needed[:0]
    if not len(missing):
        info(f"reference: the log-probabilities of {what} are reused from {store.path}")
        return Referenced(examples, store.values)
    plan = plan_micro_batches(examples.lengths[missing], micro_batch_tokens, world_size=backend.data_world_size, packing=packing)
    with bar(console, shown=backend.is_main, unit="examples") as display:
        task = display.add_task(f"reference log-probabilities of {what}", total=len(missing))
        for rounds, micro_batches in enumerate(zip(*plan, strict=True), start=1):
            places = missing[micro_batches[backend.data_rank]]
            found = _logprobs(policy, [examples[int(place)] for place in places], backend)
            for share in backend.gather((places, found)):
                _enter(store.values, first, ends, *share)
            display.update(task, advance=sum(map(len, micro_batches)))
            if rounds % _SAVED_EVERY == 0:
                store.save()
    store.save()
    backend.barrier()
    return Referenced(examples, store.values)


def _logprobs(policy: Policy, examples: Sequence[Example], backend: Backend) -> Floats:
    """Log-probabilities [K] of the targets, by the policy as it is, without dropout."""
    if not examples and not backend.sharded:  # ranks that gather weights together all compute, be it a placeholder
        return np.zeros(0, np.float32)
    batch = collate(examples, step_weight=1.0).to(backend.device)
    training = policy.model.training
    policy.eval()
    try:
        with torch.no_grad(), backend.autocast():
            return backend.compute(lambda: policy.token_stats(batch).logprobs).float().cpu().numpy()
    finally:
        policy.train(training)


def _enter(values: Floats, first: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], places: npt.NDArray[np.int64], found: Floats) -> None:
    done = 0
    for place in places.tolist():
        start, end = int(first[place]), int(ends[place])
        values[start:end] = found[done : done + end - start]
        done += end - start


class _Store:
    """A file of log-probabilities; NaN where there is none yet."""

    def __init__(self, path: Path, size: int, *, writes: bool) -> None:
        self.path = path
        self._writes = writes
        self.values = np.full(size, np.nan, np.float32)
        try:
            kept = np.load(path, allow_pickle=False) if path.is_file() else None
        except (OSError, ValueError, EOFError) as error:
            kept = None
            warn(f"the reference's log-probabilities in {path} are damaged ({error}) and are computed again")
        if kept is not None and kept.shape == self.values.shape and kept.dtype == np.float32:
            self.values = kept

    def save(self) -> None:
        """Writes the file whole; what another run has added meanwhile is kept."""
        if not self._writes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{self.path}.lock"):
                temporary = self.path.with_suffix(f".tmp-{os.getpid()}")
                with temporary.open("wb") as file:
                    np.save(file, self.values, allow_pickle=False)
                temporary.replace(self.path)
        except OSError as error:
            raise DataError(
                f"the reference's log-probabilities cannot be written to {self.path}: {error.strerror or error}",
                hint="Set data.cache to another folder, or objective.reference: adapter_off.",
            ) from error


class Moves(Callback):
    """Moves the reference towards the policy every so many steps (TR-DPO)."""

    def __init__(self, policy: Policy, mix: float, every: int) -> None:
        self._policy = policy
        self._mix = mix
        self._every = every

    def on_step_end(self, state: State, result: StepResult) -> None:
        """Called after each update, before a checkpoint of it is saved."""
        if state.step % self._every == 0:
            self._policy.move_reference(self._mix)


def _looks(config: RunConfig, loader: Loader, trained: int, held_out: int, steps: int) -> float:
    """How often each example that the run uses is looked at, on the average."""
    every = config.evaluation.every
    size = {"steps_per_epoch": loader.steps_per_epoch, "tokens_per_step": loader.tokens_per_step}
    evaluated = held_out if every is not None else 0
    times = max(1, steps // every.steps(**size)) if every is not None else 0
    return (steps / loader.steps_per_epoch * trained + times * evaluated) / (len(loader.looked_at(steps)) + evaluated)


def _identity(config: RunConfig, backend: Backend) -> dict[str, Any]:
    """What decides the reference's log-probabilities besides the examples."""
    model, adapter = config.model, config.adapter
    return {
        "model": [fingerprint(model.path, model.revision), model.model_dump(include={"dtype", "quantize", "new_tokens"})],
        "adapter": fingerprint(adapter.path, None) if adapter is not None and adapter.path is not None else None,
        "precision": str(backend.compute_dtype),
    }
