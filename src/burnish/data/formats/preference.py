r"""Preference pairs: two answers to one prompt, `{"prompt": ..., "chosen": ..., "rejected": ...}`.

The answers are texts, messages (one or a list; `role`/`content` or `from`/`value`) or whole conversations, in the columns `chosen` and
`rejected`, `chosen_response` and `rejected_response` and the like, or in one: `output: [chosen, rejected]`. The prompt is

    prompt, question, input              a text or messages; text beside texts is trained as it stands, without a chat template
    conversations, messages              messages
    input: {messages, tools}             the same, as OpenAI has them beside `preferred_output` and `non_preferred_output`
    instruction, input, history          a user turn, as in alpaca
    none, conversations                  the turns that the answers share; the rest is compared
    none, transcripts                    the same, with turns at "\n\nHuman:" and "\n\nAssistant:" (HH)
    none, other texts                    the beginning that they share, up to a whole word

An answer that repeats the prompt counts as a whole conversation. With a `system` column, text is a conversation too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from burnish.core.errors import RowError
from burnish.data.formats._answers import (
    INNER,
    Side,
    answered,
    is_transcript,
    joined,
    may_be_side,
    read_prompt,
    read_side,
    read_transcript,
    refuse_system,
    says_nothing,
)
from burnish.data.formats.base import Fields, Shape, is_list, is_object, kind_of
from burnish.data.types import Answer, Completion, Message, Pair

_NAMES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"),
    ("answer_chosen", "answer_rejected"),
    ("preferred_output", "non_preferred_output"),
    ("output", "output"),
)
SHAPE = Shape(
    required=("chosen", "rejected"),
    optional=(
        *("prompt", "instruction", "input", "history", "system", "tools"),
        *("score_chosen", "score_rejected", "margin", "weight"),
    ),
    spellings=tuple({"chosen": chosen, "rejected": rejected} for chosen, rejected in _NAMES),
    inner=INNER,
    aliases={"prompt": ("question", "conversations", "conversation", "messages", "input")},
    rivals=("prompt", "instruction"),
    needs={"input": "instruction", "history": "instruction"},
    explicit=("score_chosen", "score_rejected"),
)


def looks_like(fields: Fields) -> bool:
    """Whether there are two answers that are texts or messages (or missing values, but not both)."""
    if fields.column("chosen") == fields.column("rejected"):
        both = fields.get("chosen")
        return is_list(both) and len(both) == 2 and all(isinstance(answer, str) for answer in both)
    answers = [fields.get(name) for name in SHAPE.required]
    return any(answer is not None for answer in answers) and all(map(may_be_side, [*answers, fields.get("prompt")]))


def convert(fields: Fields) -> Pair | None:
    """The pair of a row; None where both answers are blank.

    Raises:
        RowError: a field is missing, a message malformed, or an answer does not end with an assistant turn.
        FormatError: there is a system prompt for plain texts.
    """
    fields = _unwrapped(fields)
    chosen, rejected = (read_side(fields, name, value) for name, value in zip(SHAPE.required, _values(fields), strict=True))
    prompt = read_prompt(fields)
    if isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected, prompt = _divided(fields, prompt, chosen, rejected)
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return _conversations(fields, prompt, chosen, rejected)
    if not (chosen.strip() or rejected.strip()):
        return None
    refuse_system(fields)
    return _pair(fields, Completion(prompt, chosen), Completion(prompt, rejected))


def _conversations(fields: Fields, prompt: Side | None, chosen: Side, rejected: Side) -> Pair | None:
    better, length = joined(fields, "chosen", prompt, chosen)
    worse, other = joined(fields, "rejected", prompt, rejected)
    if length is None or other is None:
        length = _shared(better, worse)
    if says_nothing(better[length:]) and says_nothing(worse[length:]):
        return None
    return _pair(fields, answered(fields, better, length), answered(fields, worse, length))


def _pair(fields: Fields, chosen: Answer, rejected: Answer) -> Pair:
    scores = [name for name in ("score_chosen", "score_rejected") if name in fields.binding.columns]
    if len(scores) == 1:
        raise RowError("a margin needs both scores, but only one is mapped", where=fields.where(scores[0]))
    better, worse = (fields.number(name, math.nan) for name in ("score_chosen", "score_rejected"))
    margin = better - worse if scores else fields.number("margin", 0.0)
    if math.isnan(margin):
        missing = scores[0] if math.isnan(better) else scores[1]
        raise RowError("the score is missing, which the margin needs", where=fields.where(missing))
    return Pair(chosen, rejected, margin, fields.number("weight", 1.0, least=0.0))


def _unwrapped(fields: Fields) -> Fields:
    """OpenAI's rows have messages and tools inside `input`; they become columns."""
    prompt = fields.get("prompt")
    if not is_object(prompt) or "messages" not in prompt:
        return fields
    inside = {f"{fields.column('prompt')}.{name}": prompt[name] for name in ("messages", "tools") if name in prompt}
    columns = {name: f"{fields.column('prompt')}.{key}" for name, key in (("prompt", "messages"), ("tools", "tools")) if key in prompt}
    row = replace(fields.row, fields={**fields.row.fields, **inside})
    return Fields(row, replace(fields.binding, columns={**fields.binding.columns, **columns}))


def _values(fields: Fields) -> Sequence[object]:
    """The two answers, which may stand in one column."""
    if fields.column("chosen") != fields.column("rejected"):
        for name in SHAPE.required:
            if fields.column(name) not in fields.row.fields:
                fields.text(name)  # says which fields there are
        return [fields.row.fields[fields.column(name)] for name in SHAPE.required]
    both = fields.json("chosen")
    if not is_list(both) or len(both) != 2:
        found = f"a list of {len(both)}" if is_list(both) else kind_of(both)
        raise RowError(f"expected [chosen, rejected], found {found}", where=fields.where("chosen"))
    return both


def _divided(fields: Fields, prompt: Side | None, chosen: str, rejected: str) -> tuple[Side, Side, Side | None]:
    """(chosen, rejected, prompt) of texts, which may have the prompt in them."""
    if prompt is None and "prompt" in fields.binding.columns:
        fields.text("prompt")  # a prompt that is missing in this row alone is not guessed
    dialogues = is_transcript(chosen), is_transcript(rejected)
    if prompt is not None:
        front = prompt.strip() if isinstance(prompt, str) else ""
        repeated = all(dialogues) and front and all(answer.lstrip().startswith(front) for answer in (chosen, rejected))
        return (read_transcript(chosen), read_transcript(rejected), None) if repeated else (chosen, rejected, prompt)
    if all(dialogues):
        return read_transcript(chosen), read_transcript(rejected), None
    if any(dialogues):
        lacking = SHAPE.required[dialogues.index(False)]
        raise RowError("expected a dialogue with 'Human:' and 'Assistant:', like the other answer", where=fields.where(lacking))
    end = _common_words(chosen, rejected)
    return chosen[end:], rejected[end:], chosen[:end]


def _common_words(one: str, other: str) -> int:
    """Length of the beginning that two texts share, up to a whole word; the space before the next word belongs to that word."""
    end = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    while end and not one[end - 1].isspace():
        end -= 1
    return end - 1 if end and one[end - 1] == " " else end


def _shared(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages in front are the same; the last turn of either is never among them."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)
