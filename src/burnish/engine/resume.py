"""What a run must remember to go on exactly, taken and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from burnish.core.errors import CheckpointError
from burnish.core.log import warn
from burnish.data.types import Source
from burnish.engine import checkpoint, rng, shards
from burnish.engine.backend import Backend
from burnish.engine.checkpoint import Checkpoint, flatten, unflatten
from burnish.engine.events import State
from burnish.engine.identity import OPTIMIZER, difference, refuse_a_longer_run, versions
from burnish.engine.step import Stepper

__all__ = ["capture", "refuse_other_parameters", "restore", "restore_weights", "weights_of"]


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint holds, by name: what is trained, and a reference that is a copy of its own."""
    kept: Mapping[str, torch.Tensor] = getattr(policy, "kept_reference", {})
    return {**policy.trainable(), **{f"reference/{name}": value for name, value in kept.items()}}


def capture(
    *,
    state: State,
    stepper: Stepper,
    source: Source,
    named_parameters: Mapping[str, torch.Tensor],
    backend: Backend,
    identity: Mapping[str, Any],
    permanent: bool = False,
) -> Checkpoint:
    """Everything a run is at this moment. All ranks take part, for their random states. A permanent checkpoint is never pruned."""
    structure, tensors = flatten({f"rank{rank}": one for rank, one in enumerate(backend.gather(rng.capture()))})
    return Checkpoint(
        step=state.step,
        weights={name: parameter.detach() for name, parameter in named_parameters.items()},
        optimizer=stepper.optimizer.state_dict(),
        rng=tensors,
        trainer={
            "state": dataclasses.asdict(state),
            "stepper": stepper.state(),
            "source": source.state(),
            "rng": structure,
            "identity": dict(identity),
            "world_size": backend.world_size,
            "versions": versions(),
            "permanent": permanent,
        },
    )


def restore(
    folder: Path,
    *,
    state: State,
    stepper: Stepper,
    source: Source,
    named_parameters: Mapping[str, torch.Tensor],
    backend: Backend,
    identity: Mapping[str, Any],
    force: bool = False,
) -> None:
    """Puts a run back to where its checkpoint was taken.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to a longer run or one with other settings, other data or other parameters.
    """
    found = shards.load(folder, backend.layout)
    trainer = found.trainer
    if not force and (other := difference(trainer, identity)):  # or it has been said before anything was loaded
        raise CheckpointError(f"{folder} belongs to a run with other {other.what}: {other}")
    refuse_a_longer_run(folder, trainer["state"]["step"], state.total)
    restore_weights(found, named_parameters, folder)
    before, now = trainer["identity"].get(OPTIMIZER), identity.get(OPTIMIZER)
    if before and now and before != now:
        warn(f"the optimiser's state is of {before}, which {now} cannot use: {now} begins without any")
    else:
        _restore_optimizer(found, stepper.optimizer, folder)
    stepper.restore(trainer["stepper"])
    try:
        source.restore(trainer["source"])
    except CheckpointError as error:
        if not force:
            raise
        warn(f"{error}; it is read from its start")
    total = state.total
    for name, value in trainer["state"].items():
        setattr(state, name, value)
    if state.total != total:
        warn(f"the run's length changed from {state.total} to {total} steps, and the learning rate follows the new length")
    state.total, state.stop = total, None
    _restore_rng(found, backend)
    _tell_changed_versions(trainer["versions"])


def restore_weights(found: Checkpoint, named_parameters: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Copies a checkpoint's weights into the parameters.

    Raises:
        CheckpointError: other parameters are trained now.
    """
    _same_names(found.weights.keys(), named_parameters.keys(), folder)
    with torch.no_grad():
        for name, parameter in named_parameters.items():
            if parameter.shape != found.weights[name].shape:
                shapes = f"{tuple(found.weights[name].shape)}, expected {tuple(parameter.shape)}"
                raise CheckpointError(f"{folder}: {name} has shape {shapes}")
            parameter.copy_(found.weights[name])


def written_best(root: Path) -> int | None:
    """Step of the best checkpoint under `root` by what the newest one knows, or an older one where that best could not be written."""
    for folder in reversed(checkpoint.folders(root)):
        with suppress(CheckpointError, LookupError, TypeError, ValueError):  # damaged: it knows nothing
            best = checkpoint.trainer_of(folder)["state"]["best_saved"]
            if best is not None and checkpoint.folder_of(root, best).is_dir():
                return best
    return None


def refuse_other_parameters(root: Path, policy: Any) -> None:
    """Makes sure, before anything is written, that the newest checkpoint under `root` that can be read is of the weights that are trained.

    Raises:
        CheckpointError: it holds others, which no setting makes this run's.
    """
    for folder in reversed(checkpoint.folders(root)):
        with suppress(CheckpointError):  # damaged: for `restore` to judge
            found = shards.weight_names(folder)
            break
    else:
        return
    _same_names(found, weights_of(policy).keys(), folder)


def _same_names(stored: Set[str], trained: Set[str], folder: Path) -> None:
    if different := sorted(stored ^ trained):
        where = "in the checkpoint only" if different[0] in stored else "in this run only"
        raise CheckpointError(
            f"{folder} was made with other trained parameters: {different[0]} is {where}",
            hint="train the same ones, or choose another output folder",
        )


_SETTINGS = ("peak_lr", "weight_decay", "betas", "eps", "momentum")
"""What the run file says of a group of parameters. The rest, in what torch calls the same, is the state of an optimiser."""


def _restore_optimizer(found: Checkpoint, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Takes the optimiser's state back, with the settings of this run: a forced resume may have changed them."""
    now = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(found.optimizer)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds the state of another optimiser: {error}") from error
    for group, mine in zip(optimizer.param_groups, now, strict=True):
        if group["names"] != mine["names"]:
            raise CheckpointError(f"{folder} holds the state of another optimiser: its groups of parameters are other ones")
        group.update({key: value for key, value in mine.items() if key in _SETTINGS or key not in group})


def _restore_rng(found: Checkpoint, backend: Backend) -> None:
    if found.trainer["world_size"] != backend.world_size:
        warn(
            f"the checkpoint was made on {found.trainer['world_size']} processes and this run has {backend.world_size}: "
            "the data goes on exactly, dropout does not"
        )
        return
    rng.restore(unflatten(found.trainer["rng"], found.rng)[f"rank{backend.rank}"])


def _tell_changed_versions(then: Mapping[str, str]) -> None:
    changed = [f"{name} {then.get(name)} -> {version}" for name, version in versions().items() if then.get(name) != version]
    if changed:
        warn(f"software has changed since the checkpoint, so results may differ in the last digits: {', '.join(changed)}")
