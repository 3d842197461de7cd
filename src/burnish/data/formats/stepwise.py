"""Solutions in steps, each right or wrong: `{"prompt": "...", "completions": ["...", ...], "labels": [true, ...]}`.

The steps may also be called `steps`; the prompt question, problem or instruction. A label is true or false, 1 or 0. Both lists may be JSON
text, as in CSV cells.
"""

from __future__ import annotations

from burnish.core.errors import RowError
from burnish.data.formats.base import Fields, Shape, as_list, as_text, is_list, kind_of
from burnish.data.types import Stepwise

_PROMPTS = ("prompt", "question", "problem", "instruction")
SHAPE = Shape(
    required=("prompt", "steps", "labels"),
    spellings=tuple({"prompt": prompt, "steps": steps} for prompt in _PROMPTS for steps in ("completions", "steps")),
)


def looks_like(fields: Fields) -> bool:
    """Whether there is a prompt with two lists, of steps and of labels (or missing values)."""
    prompt, steps, labels = (fields.get(name) for name in SHAPE.required)
    return (prompt is None or isinstance(prompt, str)) and all(
        value is None or is_list(value) or (isinstance(value, str) and value.lstrip().startswith("[")) for value in (steps, labels)
    )


def convert(fields: Fields) -> Stepwise | None:
    """The solution of a row; None where it has no steps, or all of them are blank.

    Raises:
        RowError: a field is missing, a step no text, a label neither right nor wrong, or there is not one label for each step.
    """
    prompt = fields.text("prompt")
    steps, labels = (
        as_list(fields.json(name), fields.where(name), what) for name, what in (("steps", "texts"), ("labels", "true or false"))
    )
    if len(labels) != len(steps):
        raise RowError(f"expected one label for each of {len(steps)} steps, found {len(labels)}", where=fields.where("labels"))
    texts = tuple(as_text(step, fields.row.where(f"{fields.column('steps')}[{i}]")) for i, step in enumerate(steps))
    marks = tuple(_mark(fields, label, i) for i, label in enumerate(labels))
    return Stepwise(prompt, texts, marks) if any(text.strip() for text in texts) else None


def _mark(fields: Fields, label: object, step: int) -> float:
    if isinstance(label, bool | int | float) and label in (0, 1):
        return float(label)
    raise RowError(f"expected true or false, found {kind_of(label)}", where=fields.row.where(f"{fields.column('labels')}[{step}]"))
