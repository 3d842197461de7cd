"""Trackers: metrics on their way to TensorBoard, W&B, MLflow or Trackio, through accelerate."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from burnish.core.errors import DependencyError, Where
from burnish.core.log import warn

__all__ = ["PROJECT", "Trackers", "start_trackers"]


PROJECT = "burnish"
"""What trackers file runs under, where the environment names no project; a run goes by the name of its folder."""


def start_trackers(kinds: Sequence[str], *, name: str, folder: Path, config: Mapping[str, Any], active: bool) -> Trackers:
    """Starts those of `kinds` besides `csv`, which is always written.

    Args:
        kinds: What `track` says.
        name: What the run is called in them.
        folder: The run folder.
        config: The settings, for the record.
        active: False on ranks that track nothing.

    Raises:
        DependencyError: a tracker's package is not installed, or it refuses to start.
    """
    wanted = [kind for kind in kinds if kind != "csv"]
    for kind in wanted:
        if importlib.util.find_spec(kind) is None:
            raise DependencyError(
                f"the tracker '{kind}' needs the package {kind}, which is not installed",
                where=Where(field="track"),
                hint=f"pip install 'burnish[{kind}]'",
            )
    return Trackers({kind: _start(kind, name, folder, _flat(config)) for kind in wanted} if active else {})


class Trackers:
    """Those of one run. A tracker that fails while training is dropped with a warning."""

    def __init__(self, trackers: Mapping[str, GeneralTracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers; names keep their plain form."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # whatever a remote service raises must not end a run
                del self._trackers[name]
                warn(f"the tracker '{name}' failed and is switched off for the rest of the run: {error}")

    def close(self) -> None:
        """Flushes and ends them."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                warn(f"the tracker '{name}' could not be closed: {error}")
        self._trackers = {}


def _start(kind: str, name: str, folder: Path, config: dict[str, Any]) -> GeneralTracker:
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "tensorboard": ("tensorboard", {"logging_dir": folder}),  # the name of a folder in the run folder
        "wandb": (os.environ.get("WANDB_PROJECT", PROJECT), {"name": name}),
        "mlflow": (PROJECT, {"run_name": name}),  # accelerate looks at MLFLOW_EXPERIMENT_NAME
        "trackio": (os.environ.get("TRACKIO_PROJECT", PROJECT), {"name": name}),
    }
    project, more = options[kind]
    try:
        tracker = LOGGER_TYPE_TO_CLASS[kind](project, **more)
        tracker.start()
        tracker.store_init_configuration(config)
    except Exception as error:  # a missing key, no network: said before training starts, in one sentence
        raise DependencyError(f"the tracker '{kind}' could not start: {error}", where=Where(field="track")) from error
    return tracker


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values, the form every tracker stores."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
