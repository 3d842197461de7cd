"""The root of the run file. What contradicts what in it stands in `config.checks`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, PrivateAttr, model_validator

from burnish.config.base import Location, LongForm, Strict
from burnish.config.objectives import BUILT_IN, SFT, AnyObjective
from burnish.config.sections import Adapter, Data, Evaluation, Model, Parallel, Recovery, Save, Train

Tracker = Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"]

EXCLUSIVE: dict[str, tuple[tuple[str, ...], ...]] = {"train": (("epochs", "steps", "tokens"), ("batch_size", "batch_tokens"))}
"""Section -> groups of keys of which at most one may be given."""


class RunConfig(Strict):
    """A run: one model, its data, one objective."""

    model: Annotated[Model, LongForm("path")]
    """The model to start from: a path or hub id, or a section."""
    adapter: Annotated[Adapter, LongForm("kind")] | None = None
    """A low-rank adapter, `lora` or a section. Left out or null: full fine-tuning."""
    data: Data
    """What is trained on."""
    objective: AnyObjective = SFT()
    """What is minimised: `sft` or a section."""
    train: Train = Train()
    """How long, in what steps, how fast."""
    evaluation: Evaluation = Evaluation()
    """When the held-out data is looked at, and what follows from it."""
    parallel: Annotated[Parallel, LongForm("strategy")] = Parallel()
    """Several devices: a strategy or a section."""
    save: Save = Save()
    """Checkpoints."""
    recovery: Recovery = Recovery()
    """What happens when something goes wrong."""
    track: list[Tracker] = Field(default=["csv"])
    """Where metrics go besides metrics.jsonl."""
    output: Annotated[str, Location("folder")] = Field(default="runs/default", min_length=1)
    """The run folder."""
    resume: Literal["auto", "force", "never"] = "auto"
    """`auto` goes on from the newest checkpoint in `output` where there is one, if it belongs to the same run; `force` also from one
    with other settings or data, and says what is different; `never` refuses to touch a folder that holds a run."""

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_objective(cls, values: Any) -> Any:
        """Fills in the learning rate that suits the objective, where the run gives none."""
        if not isinstance(values, dict):
            return values
        given = cast("dict[str, Any]", values)
        objective, train = given.get("objective"), given.get("train", {})
        kind: Any = cast("dict[str, Any]", objective).get("kind") if isinstance(objective, dict) else objective
        rate = BUILT_IN[kind].learning_rate if isinstance(kind, str) and kind in BUILT_IN else None
        if rate is None or not isinstance(train, dict) or "learning_rate" in train:
            return given
        return given | {"train": {**cast("dict[str, Any]", train), "learning_rate": rate}}

    _written: dict[str, tuple[str, str]] = PrivateAttr(default_factory=dict[str, tuple[str, str]])
    # Dotted key -> (text with `${NAME}` as written, value): so that no value of the environment reaches a saved file.

    @property
    def environment(self) -> dict[str, tuple[str, str]]:
        """What was filled in from the environment: dotted key -> (text with `${NAME}` as written, value). Never save the value."""
        return self._written
