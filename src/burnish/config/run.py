"""The root of the run file, and the checks that look at several sections at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from burnish.config.base import Strict
from burnish.config.objectives import BUILT_IN, SFT, Plugin
from burnish.config.sections import Adapter, Data, Evaluation, Model, Parallel, Save, Train

Tracker = Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"]


def _by_key(key: str) -> BeforeValidator:
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _objective(value: Any) -> Any:
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, dict):
        kind = value.get("kind", "sft")
        return BUILT_IN.get(kind, Plugin).model_validate({"kind": kind, **value})
    return value


class RunConfig(Strict):
    """A run: one model, its data, one objective."""

    model: Annotated[Model, _by_key("path")]
    adapter: Annotated[Adapter, _by_key("kind")] | None = None
    data: Data
    objective: Annotated[SFT | Plugin, BeforeValidator(_objective)] = SFT()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    parallel: Parallel = Parallel()
    save: Save = Save()
    track: list[Tracker] = ["csv"]
    """Where metrics go besides metrics.jsonl."""
    output: str = Field("runs/default", min_length=1)
    """The run folder."""
    resume: Literal["auto", "never"] = "auto"
    """Go on from the newest checkpoint in `output` where there is one, or refuse to touch a folder that holds a run."""
