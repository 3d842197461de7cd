"""Judged answers: one answer and whether it is a good one, `{"prompt": ..., "completion": ..., "label": true}`.

Prompt and answer stand as in any format for fine-tuning on conversations: messages, ShareGPT, Alpaca, prompt and completion. Of a
conversation, what comes after the last user turn is judged. `label` (or `kto_tag`) is true or false, 1 or 0, or a word that says so.
`weight` says how much the answer counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from burnish.core.errors import RowError
from burnish.data.formats import alpaca, messages, prompt_completion, sharegpt
from burnish.data.formats.base import Fields, Shape, kind_of, listed, spelled
from burnish.data.formats.preference import number
from burnish.data.types import Completion, Conversation, Judged

_Way = tuple[Shape, Callable[[Fields], bool], Callable[[Fields], Completion | Conversation | None]]
_WAYS: tuple[_Way, ...] = (
    (messages.SHAPE, messages.looks_like, messages.convert),
    (sharegpt.SHAPE, sharegpt.looks_like, sharegpt.convert),
    (prompt_completion.SHAPE, prompt_completion.looks_like, prompt_completion.convert),
    (alpaca.SHAPE, alpaca.looks_like, alpaca.convert),
)
_FIELDS = dict.fromkeys(name for shape, _, _ in _WAYS for name in (*shape.required, *shape.optional))
SHAPE = Shape(
    required=("label",),
    optional=(*_FIELDS, "weight"),
    spellings=({}, {"label": "kto_tag"}),
    inner=("role", "content", "from", "value", "train"),
)
_WORDS = {
    **dict.fromkeys(("true", "yes", "good", "desirable", "chosen", "1", "+"), True),
    **dict.fromkeys(("false", "no", "bad", "undesirable", "rejected", "0", "-"), False),
}


def looks_like(fields: Fields) -> bool:
    """Whether there is a label and an answer."""
    return _label_of(fields.get("label")) is not None and any(_bound(fields, way) for way in _WAYS)


def convert(fields: Fields) -> Judged | None:
    """The judged answer of a row; None where it is blank.

    Raises:
        RowError: the label says neither, there is no answer, or it is malformed.
    """
    label = _label_of(fields.get("label"))
    if label is None:
        value = fields.row.fields.get(fields.column("label"))
        raise RowError(f"expected true or false, found {kind_of(value)}", where=fields.where("label"))
    for way in _WAYS:
        if bound := _bound(fields, way):
            answer = way[2](bound)
            weight = number(fields, "weight", 1.0, least=0.0)
            return None if answer is None else Judged(_last_turns(answer), label, weight)
    raise RowError(f"the row has no answer that could be judged, only {listed(fields.row.fields)}", where=fields.row.where())


def _bound(fields: Fields, way: _Way) -> Fields | None:
    """The row as this format reads it, or None where it is none of its rows."""
    shape, looks_like, _ = way
    mapping = {given: column for given, column in fields.binding.columns.items() if given in shape.names and given != column}
    for columns in spelled(shape, mapping, list(fields.row.fields)):
        bound = Fields(fields.row, replace(fields.binding, columns=columns))
        if looks_like(bound):
            return bound
    return None


def _last_turns(answer: Completion | Conversation) -> Completion | Conversation:
    """The answer with everything before it masked."""
    if isinstance(answer, Completion):
        return answer
    asked = max((turn for turn, message in enumerate(answer.messages) if message.role == "user"), default=-1)
    return replace(answer, messages=tuple(replace(m, train=False) if turn <= asked else m for turn, m in enumerate(answer.messages)))


def _label_of(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
