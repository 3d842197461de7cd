"""Solutions in steps, each of them right or wrong: `{"prompt": ..., "completions": ["step", ...], "labels": [true, ...]}`."""

from __future__ import annotations

from burnish.core.errors import RowError
from burnish.data.formats.base import Fields, Shape, as_list, as_text, is_list, kind_of
from burnish.data.types import Stepwise

SHAPE = Shape(
    required=("prompt", "completions", "labels"),
    spellings=(
        {},
        {"completions": "steps"},
        {"prompt": "question"},
        {"prompt": "question", "completions": "steps"},
        {"prompt": "problem", "completions": "steps"},
    ),
)


def looks_like(fields: Fields) -> bool:
    """Whether steps and labels are lists."""
    return is_list(fields.get("completions")) and is_list(fields.get("labels"))


def convert(fields: Fields) -> Stepwise | None:
    """The solution of a row; None where it has no step.

    Raises:
        RowError: a field is malformed, a step blank, or there is not one label for each step.
    """
    prompt, at_steps, at_labels = fields.text("prompt"), fields.where("completions"), fields.where("labels")
    steps = tuple(as_text(step, at_steps) for step in as_list(fields.json("completions"), at_steps, "steps"))
    labels = as_list(fields.json("labels"), at_labels, "labels")
    if not steps:
        return None
    if len(labels) != len(steps):
        raise RowError(f"expected a label for each of {len(steps)} steps, found {len(labels)}", where=at_labels)
    if blank := [number for number, step in enumerate(steps, start=1) if not step.strip()]:
        raise RowError(f"step {blank[0]} is blank", where=at_steps)
    for label in labels:
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise RowError(f"expected true, false or a number from 0 to 1, found {kind_of(label)}", where=at_labels)
    return Stepwise(prompt, steps, tuple(float(label) for label in labels))  # type: ignore[arg-type]
