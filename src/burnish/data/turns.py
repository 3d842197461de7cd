r"""Which characters of a rendered conversation are a message's own, and so may be trained.

What the model has to write in a conversation is everything between the generation prompt and the end of its turn: its reasoning, its
words, its tool calls with all that the template puts around them, and the token that ends the turn. The generation prompt itself
(`<|im_start|>assistant\n`) is written by whoever asks, and the newline after the end token by nobody.

    <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n
    └───────── segment of message 0 ──┘└──── segment of message 1 ──────────┘
                                       └──── header ──────────┘└─ trained ─┘

`chat_template.py` gives the segments and the places of each message's own text (anchors). The header and the end token are learned from
the template itself, once, by rendering a probe conversation with and without a generation prompt. Header and end token are then looked
for only in the text that the template wrote, never in what a user wrote: content that looks like the template's own text cannot move a
boundary. All of it is linear in the conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from burnish.core.errors import RowError, TemplateError
from burnish.data.chat_template import OUTSIDE, TURN, ChatTemplate
from burnish.data.traced import Traced, spans_of
from burnish.data.types import Message, ToolCall

OWN_FIELDS = frozenset({"content", "reasoning_content", "tool_calls"})
"""What a message says, as against `role`, `name` and `tool_call_id`, which only label it."""

Tools = Sequence[Mapping[str, Any]]

_TALK = (Message("user", "Hello."), Message("assistant", "Good day."), Message("user", "Thanks."), Message("assistant", "Goodbye."))
_CALL = ToolCall("look_up", {"word": "day"}, id="call00001")
_TOOL_TALK = (
    Message("user", "Hello."),
    Message("assistant", "", tool_calls=(_CALL,)),
    Message("tool", "a word", tool_call_id=_CALL.id, name=_CALL.name),
    Message("assistant", "Goodbye."),
)
_TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up a word.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}, "required": ["word"]},
        },
    },
)


@dataclass(slots=True)
class Turn:
    """A message's place in the rendered text, in characters.

    `start..end` is its segment; `first..last` spans its own text inside (None where it has none); `reach` is how far an end token may be
    looked for: to the next message.
    """

    start: int
    end: int
    reach: int
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation and the turns in it, by message number. A message that left no trace is not there.

    A message has one turn, or several where the template puts others in between (Gemma 4 writes a tool's answer into the calling turn).
    """

    text: str
    turns: dict[int, list[Turn]]


def lay_out(rendered: Traced) -> Layout:
    """Finds the turns of every message: the segments that hold its own text, else the last one that was opened for it."""
    segments = _segments(rendered)
    opened: dict[int, list[Turn]] = {}
    for message, turn in segments:
        if message != OUTSIDE:
            opened.setdefault(message, []).append(turn)
    turns: dict[int, list[Turn]] = {}
    for message, found in opened.items():
        speaking = [turn for turn in found if turn.first is not None]
        loud = [turn for turn in speaking if turn.start < turn.end]
        turns[message] = loud or speaking or found[-1:]
    for message, stray in _strays(rendered, segments).items():
        if message not in turns or turns[message][0].first is None:
            turns[message] = [stray]
    return Layout(str.__str__(rendered), turns)


def _segments(rendered: Traced) -> list[tuple[int, Turn]]:
    """The output cut at its marks, empty pieces left out, with each piece's own anchors."""
    segments: list[tuple[int, Turn]] = []
    current, turn = OUTSIDE, Turn(0, 0, 0)

    def close(at: int) -> None:
        turn.end = turn.reach = at
        if turn.start == turn.end and turn.first is None:
            return
        if segments and segments[-1][0] == current:  # nothing came between: the same segment goes on
            before = segments[-1][1]
            before.end = before.reach = at
            before.first = turn.first if before.first is None else before.first
            before.last = turn.last if turn.last is not None else before.last
        else:
            segments.append((current, turn))

    for start, end, origin in spans_of(rendered):
        if origin.field == TURN:
            close(start)
            current, turn = origin.message, Turn(start, start, start)
        elif origin.field in OWN_FIELDS and origin.message == current:
            turn.first = start if turn.first is None else turn.first
            turn.last = end
    close(len(rendered))
    for (message, segment), (following, after) in zip(segments, [*segments[1:], (OUTSIDE, None)], strict=False):
        if message != OUTSIDE and following == OUTSIDE and after is not None:
            segment.reach = after.end  # text after the loop, where some templates put the last end token
    return segments


def _strays(rendered: Traced, segments: list[tuple[int, Turn]]) -> dict[int, Turn]:
    """Turns of messages whose text comes out where no mark announced it: from the text before to the text after."""
    own = [span for span in spans_of(rendered) if span.origin.field in OWN_FIELDS]
    announced = {message for message, turn in segments if turn.first is not None}
    strays: dict[int, Turn] = {}
    previous_end, previous = 0, OUTSIDE
    for start, end, origin in own:
        if previous in strays and previous != origin.message:
            strays[previous].reach = start
        if origin.message not in announced and origin.message != OUTSIDE:
            known = strays.get(origin.message, Turn(previous_end, end, end, start))
            strays[origin.message] = Turn(known.start, end, len(rendered), known.first, end)
        previous_end, previous = end, origin.message
    return strays


@dataclass
class TurnShape:
    """What a template writes around an assistant's turn, learned from the template.

    Args:
        template: The chat template.
        special: Texts of the tokenizer's special tokens; an end token is one of them.
        added: Texts of all its added tokens, for tokenizers that do not call their end token special.

    Raises:
        TemplateError: The template ends the assistant's turn with no token, or refuses a plain conversation.
    """

    template: ChatTemplate
    special: Sequence[str]
    added: Sequence[str]
    ends: tuple[str, ...] = ()
    _headers: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def __post_init__(self) -> None:
        self._special_token = _any_of(self.special)
        talk, tools = self._probe()
        answers = range(1, max(talk.turns, default=0) + 1, 2)
        self.ends = self._learn_ends(talk, answers)
        self._headers["user"] = self._learn_headers(talk, _TALK, answers, 1, tools)

    def _probe(self) -> tuple[Layout, Tools]:
        """A plain conversation, rendered: two questions if the template takes them, with tools if it must have some."""
        attempts: list[tuple[Sequence[Message], Tools]] = [(_TALK, ()), (_TALK[:2], ()), (_TALK, _TOOLS)]
        for talk, tools in attempts:
            try:
                return lay_out(self.template.render(talk, tools)), tools
            except RowError:
                continue
        return lay_out(self.template.render(_TALK[:2])), ()

    def regions(self, layout: Layout, messages: Sequence[Message], number: int) -> list[tuple[int, int]]:
        """The characters of message `number` that are trained if it is; none where the template left the message out.

        For the assistant: all it has to write, end token included. For others: what they say, and the end token if they have the same one.

        Raises:
            TemplateError: No end token follows an assistant's message.
        """
        turns = [turn for turn in layout.turns.get(number, ()) if turn.first is not None or turn.start < turn.end]
        if messages[number].role != "assistant":
            return [self._other_region(layout.text, turn) for turn in turns if turn.first is not None]
        found: list[tuple[int, int]] = []
        for turn in turns:
            start = turn.start if found else self._skip_header(layout.text, turn, messages[number - 1].role if number else "user")
            end = self._find_end(layout.text, turn)
            if end is None:
                if turn is turns[-1]:
                    _check_goes_on(messages, number)
                end = turn.end if turn.last is None else turn.last
            found.append((start, end))
        return found

    def _other_region(self, text: str, turn: Turn) -> tuple[int, int]:
        first, last = turn.first or 0, turn.last or 0
        ends = [at + len(end) for end in self.ends if (at := text.find(end, last, turn.reach)) >= 0]
        return first, min(ends, default=last)

    def _skip_header(self, text: str, turn: Turn, before: str) -> int:
        limit = turn.end if turn.first is None else turn.first
        for header in self._headers_after(before):
            at = text.find(header, turn.start, limit)
            if at >= 0:
                return at + len(header)
        return turn.start

    def _find_end(self, text: str, turn: Turn) -> int | None:
        """The end of the end token after a turn's own text. Without own text the last one in the segment is it."""
        if turn.last is None:
            found = [at + len(end) for end in self.ends if (at := text.rfind(end, turn.start, turn.reach)) >= 0]
            return max(found, default=None)
        for end in self.ends:
            at = text.find(end, turn.last, turn.reach)
            if at >= 0:
                return at + len(end)
        return _last_match(self._special_token, text, turn.last, turn.end)

    def _headers_after(self, role: str) -> tuple[str, ...]:
        """The texts that may open the assistant's turn after a message of this role, longest first."""
        if role != "tool":
            return self._headers["user"]
        if role not in self._headers:
            self._headers[role] = self._headers["user"]
            try:
                talk = lay_out(self.template.render(_TOOL_TALK, _TOOLS))
                self._headers[role] += self._learn_headers(talk, _TOOL_TALK, (3,), 3, _TOOLS)
            except (RowError, TemplateError):
                pass  # no tools in this template: a row that has some will say so
        return self._headers[role]

    def _learn_headers(
        self, talk: Layout, probe: Sequence[Message], answers: Sequence[int], first_answer: int, tools: Tools
    ) -> tuple[str, ...]:
        """Compares what leads up to an answer with what the template writes to ask for the first one."""
        question = probe[:first_answer]
        asked = lay_out(self.template.render(question, tools, add_generation_prompt=True))
        asker = _spoken(asked, question, len(question) - 1)
        prompt = asked.text[asker.last :] if asker else ""
        headers: set[str] = set()
        for answer in answers:
            before, turn = _spoken(talk, probe, answer - 1), _spoken(talk, probe, answer)
            if turn is None or turn.first is None:
                continue
            closing = talk.text[before.last : turn.start] if before else ""
            headers |= _headers_in(talk.text[turn.start : turn.first], prompt, closing)
        return tuple(sorted(headers, key=len, reverse=True))

    def _learn_ends(self, talk: Layout, answers: Sequence[int]) -> tuple[str, ...]:
        turns = [turn for answer in answers if (turn := _spoken(talk, _TALK, answer))]
        if not turns:
            raise TemplateError(
                "the chat template leaves out what the assistant says in a plain conversation, or changes it beyond recognition",
                hint="A template for images may want its content in parts; choose another with model.chat_template.",
            )
        for tokens in (self.special, self.added):
            pattern = _any_of(tokens)
            ends: list[str] = []
            for turn in turns:
                tail = talk.text[turn.last : turn.reach]
                if any(end in tail for end in ends):
                    continue
                inside = pattern.findall(talk.text, turn.last or 0, turn.end)
                ends += inside[-1:] or pattern.findall(talk.text, turn.end, turn.reach)[:1]
            if ends:
                return tuple(ends)
        tail = talk.text[turns[0].last : turns[0].reach]
        raise TemplateError(
            f"the chat template ends the assistant's turn with {tail!r}, which holds no token of this tokenizer, so a model could not "
            "learn to stop",
            hint="Add the template's tokens with model.new_tokens, or choose a template that ends turns with the eos token.",
        )


def _spoken(layout: Layout, talk: Sequence[Message], message: int) -> Turn | None:
    """The turn in which a message of a probe says what it says.

    A template may change its text in a way that loses the trace (`| safe`). A probe's words can then be found by looking for them; what
    is learned so serves for rows too, where the whole segment is searched for header and end token.
    """
    turns = layout.turns.get(message)
    if not turns or turns[-1].first is not None:
        return turns[-1] if turns else None
    turn, said = turns[-1], talk[message].content
    first = layout.text.find(said, turn.start, turn.end) if said else -1
    return replace(turn, first=first, last=first + len(said)) if first >= 0 else None


def _check_goes_on(messages: Sequence[Message], number: int) -> None:
    """An assistant's turn may go without an end token only where the assistant speaks on and the template joins the two."""
    following = (message.role for message in messages[number + 1 :])
    if next((role for role in following if role != "tool"), None) != "assistant":
        raise TemplateError(
            f"the chat template puts no end-of-turn token after message {number + 1}, so a model could not learn to stop there",
            hint="Choose another template with model.chat_template.",
        )


def _headers_in(lead: str, prompt: str, closing: str) -> set[str]:
    r"""The headers that the assistant's turn may begin with.

    Args:
        lead: What the assistant's segment holds before its own text: `<|im_start|>assistant\n<think>\n\n</think>\n\n`.
        prompt: What stands after the last message where an answer is asked for: `<|im_end|>\n<|im_start|>assistant\n`.
        closing: What the message before has after its own text: `<|im_end|>\n`.
    """
    if not prompt.startswith(closing):  # the message before ends differently where it is the last one
        overlaps = (lead[:length] for length in range(min(len(prompt), len(lead)), 0, -1) if prompt.endswith(lead[:length]))
        return {next(overlaps, lead)}
    generation = prompt.removeprefix(closing)
    if generation and generation in lead:
        return {generation}
    common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(lead, generation, strict=False)))
    if common:  # R1 asks with `<｜Assistant｜><think>\n` and keeps past turns as `<｜Assistant｜>`
        return {common, generation}
    # No generation prompt. White space is then the model's to write (`[/INST] answer`); anything else opens the turn.
    return {lead} if lead.strip() else set()


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _last_match(pattern: re.Pattern[str], text: str, start: int, end: int) -> int | None:
    last = None
    for match in pattern.finditer(text, start, end):
        last = match.end()
    return last
