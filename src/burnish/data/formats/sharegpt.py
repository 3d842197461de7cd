"""ShareGPT: `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "...", "tools": "..."}`.

The roles go by many names (human, user, gpt, assistant, chatgpt, bing, model ...). A `function_call` turn is an assistant turn whose value
is the call as JSON, `{"name": ..., "arguments": {...}}`, or a list of calls; an `observation` (or `function_response`, `tool`) is its
result. `tools` is a list of JSON schemas, or the same as JSON text.
"""

from __future__ import annotations

from burnish.data.formats.base import Fields, Shape
from burnish.data.formats.messages import conversation, is_list_of, read_messages
from burnish.data.types import Conversation

SHAPE = Shape(
    required=("conversations",),
    optional=("system", "tools"),
    spellings=({}, {"conversations": "conversation"}, {"conversations": "messages"}),
    inner=("from", "value", "train"),
)


def looks_like(fields: Fields) -> bool:
    """Whether the row is a list of turns that say whom they are from."""
    return is_list_of(fields, "conversations", fields.column("from"))


def convert(fields: Fields) -> Conversation | None:
    """The conversation of a row; None where all of it, or every assistant turn, is blank.

    Raises:
        RowError: the conversation is malformed.
    """
    turns = read_messages(fields, "conversations", fields.json("conversations"), role_key="from", content_key="value")
    return conversation(fields, turns)
