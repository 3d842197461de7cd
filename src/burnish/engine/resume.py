"""What a run must remember to go on exactly, and whether a checkpoint belongs to it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from burnish.config.dump import resolved
from burnish.config.run import RunConfig
from burnish.core.errors import CheckpointError
from burnish.core.log import warn
from burnish.data.types import Source
from burnish.engine import checkpoint, rng, shards
from burnish.engine.backend import Backend
from burnish.engine.checkpoint import Checkpoint, flatten, unflatten
from burnish.engine.events import State
from burnish.engine.step import Stepper

__all__ = ["capture", "identity_of", "refuse_another_run", "restore", "restore_weights", "versions", "weights_of"]

_MAY_CHANGE = (
    "output",
    "resume",
    "track",
    "save",
    "recovery",
    "evaluation",
    "parallel",
    "data.workers",
    "data.cache",
    "data.eval",
    "train.epochs",
    "train.steps",
    "train.tokens",
    "train.micro_batch_tokens",
    "train.checkpoint_activations",
    "train.deterministic",
)


def identity_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with its checkpoint, as dotted keys and plain values.

    What may change: how long it trains, where it writes, how it is watched, and how the work is cut up. All else would give another run.
    """
    return {key: value for key, value in _dotted(resolved(config)).items() if not _may_change(key)}


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {
        "burnish": metadata.version("burnish"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


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


def refuse_another_run(root: Path, identity: Mapping[str, Any], total: int, *, force: bool = False) -> None:
    """Makes sure, before anything is loaded or written, that the newest checkpoint under `root` is one of this run; if there is any.

    Damaged ones are for `restore` to judge.

    Args:
        root: The folder of the checkpoints.
        identity: Of this run.
        total: Its steps.
        force: Say what is different, and let it be.

    Raises:
        CheckpointError: it belongs to a run with other settings or other data, or to one that is longer already.
    """
    for folder in reversed(checkpoint.folders(root)):
        try:
            trainer = checkpoint.trainer_of(folder)
        except CheckpointError:
            continue
        _refuse_another_run(folder, trainer, identity, force=force)
        _refuse_a_longer_run(folder, trainer["state"]["step"], total)
        return


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
    if not force:  # or it has been said before anything was loaded
        _refuse_another_run(folder, trainer, identity)
    _refuse_a_longer_run(folder, trainer["state"]["step"], state.total)
    restore_weights(found, named_parameters, folder)
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
    different = sorted(found.weights.keys() ^ named_parameters.keys())
    if different:
        where = "in the checkpoint only" if different[0] in found.weights else "in this run only"
        raise CheckpointError(f"{folder} was made with other trained parameters: {different[0]} is {where}")
    with torch.no_grad():
        for name, parameter in named_parameters.items():
            if parameter.shape != found.weights[name].shape:
                shapes = f"{tuple(found.weights[name].shape)}, expected {tuple(parameter.shape)}"
                raise CheckpointError(f"{folder}: {name} has shape {shapes}")
            parameter.copy_(found.weights[name])


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


_FINGERPRINT = "data.fingerprint"
_LISTED = 3  # this many settings stand in a message


def _refuse_a_longer_run(folder: Path, step: int, total: int) -> None:
    if step > total:
        raise CheckpointError(
            f"{folder} is at step {step:,}, and the run that is asked for ends at step {total:,}",
            hint="ask for more epochs or steps to go on, or choose another output folder for the shorter run",
        )


def _refuse_another_run(folder: Path, trainer: Mapping[str, Any], now: Mapping[str, Any], *, force: bool = False) -> None:
    difference, what = _difference(trainer, now)
    if not difference:
        return
    if force:
        warn(f"{folder} belongs to a run with other {what}: {difference}; it goes on nevertheless, as resume: force says")
        return
    raise CheckpointError(
        f"{folder} belongs to a run with other {what}: {difference}",
        hint=f"put the {what} back to go on, choose another output folder, or go on nevertheless with resume: force",
    )


def _difference(trainer: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    """(what is different, in words; "settings" or "data"); empty where nothing is."""
    then = trainer["identity"]
    # Another version of burnish may have settings that this one has not: then only those that both know are compared.
    strict = trainer["versions"].get("burnish") == versions()["burnish"]
    keys = then.keys() | now.keys() if strict else then.keys() & now.keys()
    changed = [key for key in sorted(keys) if then.get(key) != now.get(key)]
    if changed == [_FINGERPRINT]:
        return f"the rows have changed, or how they are turned into tokens ({_FINGERPRINT})", "data"
    before, after = ({key: identity.get(key) for key in changed if key != _FINGERPRINT} for identity in (then, now))
    before, after = _spread(before), _spread(after)
    places = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    shown = "; ".join(f"{key} was {before.get(key)!r}, now {after.get(key)!r}" for key in places[:_LISTED])
    return shown + (f" and {len(places) - _LISTED} more" if len(places) > _LISTED else ""), "settings"


def _tell_changed_versions(then: Mapping[str, str]) -> None:
    changed = [f"{name} {then.get(name)} -> {version}" for name, version in versions().items() if then.get(name) != version]
    if changed:
        warn(f"software has changed since the checkpoint, so results may differ in the last digits: {', '.join(changed)}")


def _spread(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the entries of lists of sections one by one, as `data.train.0.path`: so that a message names what has changed."""
    spread: dict[str, Any] = {}
    for key, value in identity.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                spread |= _dotted(item, f"{key}.{number}.")
        else:
            spread[key] = value
    return spread


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    return {key: item for name, part in value.items() for key, item in _dotted(part, f"{prefix}{name}.").items()}


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)
