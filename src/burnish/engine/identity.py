"""Whether a run folder holds this very run: what was asked for then and now, compared, and said in words.

    identity_of             the settings that decide the result
    marks_of                what frozen weights it begins with
    difference              what is different
    refuse_another_run      an error that lists it, before anything is loaded or written

Rows belong to it too, under the key `ROWS`, once they are prepared.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from burnish.config.dump import resolved
from burnish.config.objectives import Distill, Plugin
from burnish.config.run import RunConfig
from burnish.core.errors import CheckpointError
from burnish.core.log import warn
from burnish.engine import checkpoint
from burnish.models.locate import fingerprint

__all__ = [
    "OPTIMIZER",
    "ROWS",
    "Difference",
    "difference",
    "identity_of",
    "marks_of",
    "read_note",
    "refuse_a_longer_run",
    "refuse_another_run",
    "versions",
]

ROWS = "data.rows"
"""The key of what the training rows became: tokens, weights, order."""
OPTIMIZER = "train.optimizer.kind"

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
_HELD_OUT = "data.eval"
"""Held-out rows of their own may change; a share of the training rows may not."""
_WEIGHTS = {
    "model.weights": "the weights of the base model",
    "objective.teacher.weights": "the weights of the teacher",
    "reference.adapter": "the weights of the adapter that the reference is",
}
_PLACES = {"model.weights": ("model.path", "model.revision"), "objective.teacher.weights": ("objective.teacher",)}
"""Where weights lie does not matter while they are the same."""
_OBSOLETE = "data.fingerprint"  # of earlier versions: it changed with their code, too


def identity_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with its checkpoint, as dotted keys and plain values.

    What may change: how long it trains, where it writes, how it is watched, and how the work is cut up. All else would give another run.
    """
    held_out = "nothing of data.train" if config.data.eval is None or isinstance(config.data.eval, list) else config.data.eval
    return {key: value for key, value in _dotted(resolved(config)).items() if not _may_change(key)} | {_HELD_OUT: held_out}


def marks_of(config: RunConfig) -> dict[str, Any]:
    """Marks of the weights that decide the result and are not in a checkpoint, as more keys of the identity.

    They are those under an adapter, a teacher's, and those that a reference is computed from.

    Raises:
        ModelError: there is no model at one of the paths.
        DependencyError: `package:NAME` is not installed.
    """
    marks: dict[str, Any] = {}
    refers = _refers(config)
    if config.adapter is not None or refers:
        marks["model.weights"] = fingerprint(config.model.path, config.model.revision)
    if config.adapter is not None and config.adapter.path is not None and refers:
        marks["reference.adapter"] = fingerprint(config.adapter.path, None)
    if isinstance(config.objective, Distill):
        marks["objective.teacher.weights"] = fingerprint(config.objective.teacher, None)
    return marks


def _refers(config: RunConfig) -> bool:
    """Whether a reference is made again from the weights that the run starts from. A copy of them is in the checkpoint."""
    objective = config.objective
    if isinstance(objective, Plugin) or not hasattr(objective, "reference"):
        return False
    asked, moves = getattr(objective, "reference", "auto"), getattr(objective, "sync", None) is not None
    return asked == "precomputed" or (asked == "auto" and not (moves or config.data.streaming or objective.mismatched))


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {
        "burnish": metadata.version("burnish"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """What is different, a line each, and of what: the data alone, the base model's weights alone, or settings."""

    lines: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        """In a sentence, or in a list."""
        return self.lines[0] if len(self.lines) == 1 else "".join(f"\n  {line}" for line in self.lines)


def difference(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Difference | None:
    """Compares a run with what a checkpoint, or the note of a finished run, says of the one that it belongs to.

    Args:
        recorded: With `identity`, and the `versions` that wrote it.
        now: The identity of this run. Rows are compared where it has them.
    """
    then = recorded["identity"]
    # Another version of burnish may have settings that this one has not: then only those that both know are compared.
    strict = recorded.get("versions", {}).get("burnish") == versions()["burnish"]
    keys = then.keys() | now.keys() if strict else then.keys() & now.keys()
    # What earlier versions have not noted cannot be compared.
    keys -= {_OBSOLETE, *(key for key in (ROWS, _HELD_OUT, *_WEIGHTS) if key not in then)}
    keys -= {ROWS, *_WEIGHTS} - now.keys()
    for mark, places in _PLACES.items():
        if mark in keys and then[mark] == now[mark]:
            keys -= {*places}
    changed = [key for key in sorted(keys) if then.get(key) != now.get(key)]
    if not changed:
        return None
    marks = {key: f"{what} have changed, or its configuration ({key})" for key, what in _WEIGHTS.items()}
    shares = f"{_HELD_OUT} was {_written(then.get(_HELD_OUT))}, now {_written(now.get(_HELD_OUT))}"
    marks[_HELD_OUT] = f"{shares}: it decides how many rows are trained on, or which of them are held out ({ROWS})"
    marks[ROWS] = f"the rows have changed, or how they are turned into tokens, or which of them are held out ({ROWS})"
    lines = _listed([key for key in changed if key not in marks], then, now) + [marks[key] for key in changed if key in marks]
    of = {"data": {ROWS, _HELD_OUT}, "weights": {*_WEIGHTS}}
    return Difference(tuple(lines), next((what for what, keys in of.items() if keys.issuperset(changed)), "settings"))


def refuse_another_run(folder: Path, identity: Mapping[str, Any], total: int | None, *, force: bool = False) -> None:
    """Makes sure, before anything is loaded or written, that what a run folder holds is of this run; if it holds anything.

    Damaged checkpoints are for `resume.restore` to judge.

    Args:
        folder: The run folder.
        identity: Of this run.
        total: Its steps; None where that is not known yet.
        force: Say what is different, and let it be.

    Raises:
        CheckpointError: it belongs to a run with other settings or other data, to one that is longer already, or to a finished one whose
            checkpoints are gone.
    """
    for place in reversed(checkpoint.folders(folder / "checkpoints")):
        try:
            trainer = checkpoint.trainer_of(place)
        except CheckpointError:
            continue
        _refuse(place, difference(trainer, identity), force=force)
        if total is not None:
            refuse_a_longer_run(place, trainer["state"]["step"], total)
        return
    note = folder / "finished.json"
    if not (folder / "model").is_dir() or (finished := read_note(note)) is None:
        return
    said = ""
    if found := difference(finished, identity):
        said = f"{note} belongs to a run with other {found.what}: {found}"
    elif total is not None and finished["steps"] != total:
        steps = f"{finished['steps']:,} steps"
        said = f"{folder} holds a finished model of {steps}, and no checkpoint from which a run of {total:,} could go on"
    if said and not force:
        raise CheckpointError(said, hint="choose another output folder, or train from the start and overwrite the model with resume: force")
    if said:
        warn(f"{said}{_end(found)}there is no checkpoint: it is trained from the start and overwritten, as resume: force says")


def read_note(note: Path) -> dict[str, Any] | None:
    """What the note of a finished run says; None where there is none, or a torn one."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return {"steps": found["steps"], "identity": found["run"], "versions": found.get("versions", versions())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def refuse_a_longer_run(folder: Path, step: int, total: int) -> None:
    """Makes sure that a checkpoint does not lie beyond this run's end.

    Raises:
        CheckpointError: it does.
    """
    if step > total:
        raise CheckpointError(
            f"{folder} is at step {step:,}, and the run that is asked for ends at step {total:,}",
            hint="ask for more epochs or steps to go on, or choose another output folder for the shorter run",
        )


def _refuse(place: Path, found: Difference | None, *, force: bool) -> None:
    if found is None:
        return
    if force:
        warn(f"{place} belongs to a run with other {found.what}: {found}{_end(found)}it goes on nevertheless, as resume: force says")
        return
    raise CheckpointError(
        f"{place} belongs to a run with other {found.what}: {found}",
        hint=f"put the {found.what} back to go on, choose another output folder, or go on nevertheless with resume: force",
    )


def _end(found: Difference | None) -> str:
    """What stands between a difference and what becomes of it."""
    return "\n" if found is not None and len(found.lines) > 1 else "; "


def _listed(changed: list[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each setting that has changed; one for a whole section that is new or gone."""
    lines: dict[str, None] = {}
    for key in changed:
        place = next((above for above in _above(key) if bool(_section(before, above)) != bool(_section(after, above))), key)
        old, new = (_spread({place: _section(side, place) or side.get(place)}) for side in (before, after))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                lines[f"{name} was {_written(old.get(name))}, now {_written(new.get(name))}"] = None
    return list(lines)


def _written(value: Any) -> str:
    """A value as a run file has it, on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_written(one)}' for key, one in cast(dict[str, Any], value).items())}}}"
    return json.dumps(value, ensure_ascii=False, default=str)


def _section(side: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What stands below a key that is a section on this side."""
    return {name.removeprefix(f"{key}."): value for name, value in side.items() if name.startswith(f"{key}.") and value is not None}


def _above(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


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
