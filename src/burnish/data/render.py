r"""From one item to token ids and training weights.

A conversation is rendered by one pass of the model's own chat template and tokenised once, so its ids are what
`tokenizer.apply_chat_template` gives. `turns.py` says which characters are trained, the tokenizer's offsets say which tokens those are.

Which tokens are trained, exactly:

- A token is trained when it holds at least one trained character. Only ordinary tokens can lie across a boundary, and only where a
  turn's text begins with what merges with the header: `assistant\n` + `\nHi` has the one token `\n\n`. It is trained, for otherwise
  a character that the model has to write would be taught nowhere.
- An added token (`<|assistant|>` in Phi-3) that swallows the white space after it belongs to where it begins.
- Weights stand beside ids from the start. No token is ever trained or masked because of its id, so a pad token that is also the end
  token does no harm.

Of a pair, each side is rendered by itself and then hung under the prompt that both begin with (see tree.py), so every path through the tree
has the ids of its own rendering.

A prompt and its completion are tokenised as at inference: the prompt alone, then what follows. Tokenised together they could share a
token that no prompt ends with, and the model would be taught from a place it never starts at. Where they share none, both ways agree.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from burnish.config.sections import Data
from burnish.core.errors import ModelError, RowError, TemplateError, Where
from burnish.data import templates
from burnish.data.chat_template import OUTSIDE, TOOLS, ChatTemplate
from burnish.data.traced import Traced, spans_of
from burnish.data.tree import chain, grow
from burnish.data.turns import OWN_FIELDS, TurnShape, lay_out
from burnish.data.types import Answer, Completion, Conversation, Example, Item, Judged, Message, Pair, Stepwise, Text, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 2
"""Part of the fingerprint: goes up when the same input is rendered differently."""

IGNORED_LABEL = -100
STEP_END = "\n"
"""What follows each step of a solution; its last token is where the step is judged."""

NOTES = {
    "reasoning_left_out": "messages whose reasoning the chat template leaves out",
    "messages_left_out": "messages that the chat template leaves out",
    "tools_left_out": "rows whose tools the chat template leaves out",
    "special_tokens_in_content": "rows whose text holds special tokens, which stand for themselves",
    "equal_answers": "pairs whose two answers are the same, from which a preference cannot be learned",
    "different_prompts": "pairs whose two answers belong to different prompts",
    "words_run_together": "rows whose prompt and answer are plain text with no space between them",
}
"""What `Renderer.render` counts into `notes`, in words."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: np.ndarray  # int32 [L]
    starts: np.ndarray  # int32 [L], characters
    ends: np.ndarray  # int32 [L]


class Renderer:
    """Turns items into examples. Picklable, so that worker processes can have it.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        chat_template: Jinja text, a built-in name or a `.jinja` file; None takes the tokenizer's own.
        train_on: `assistant`, `last` (its last turn), `all`, or a list of roles.
        train_on_prompt: Train on the prompt of prompt-completion items too.
        share_prompts: Compute a prompt once for all its answers.
        today: The day that templates with a date see (Llama 3.1). Default: the day the renderer is made, all through its life.

    Raises:
        ModelError: The tokenizer is not a fast one.
        TemplateError: The template is not found or has a syntax error.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat_template: str | None = None,
        train_on: str | Sequence[str] = "assistant",
        train_on_prompt: bool = False,
        share_prompts: bool = True,
        today: datetime.date | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"the tokenizer {type(tokenizer).__name__} is not a fast one, so its tokens cannot be traced to characters")
        self.tokenizer = tokenizer
        self.train_on = train_on if isinstance(train_on, str) else tuple(train_on)
        self.train_on_prompt = train_on_prompt
        self.share_prompts = share_prompts
        self.today = today or datetime.date.today()
        self._sources = _template_sources(tokenizer, chat_template)
        self._chats: dict[str, _Chat] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, data: Data) -> Renderer:
        """The renderer that the `data` section asks for, with the tokenizer's own template."""
        today = datetime.date.fromisoformat(data.date) if data.date else None
        shared = data.share_prompts == "auto"
        return cls(tokenizer, train_on=data.train_on, train_on_prompt=data.train_on_prompt, share_prompts=shared, today=today)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("tokenizer", "train_on", "train_on_prompt", "share_prompts", "today", "_sources")
        return {name: self.__dict__[name] for name in kept} | {"_chats": {}}  # compiled templates do not pickle

    # -- items ------------------------------------------------------------------------------------------------------------------

    def render(self, item: Item, *, where: Where | None = None, notes: Counter[str] | None = None) -> Example:
        """The ids and training weights of one item.

        Args:
            item: What a format made of a row.
            where: The row's place, for errors.
            notes: Counts what the template left out and the like; see `NOTES`.

        Raises:
            RowError: The row does not fit: the template refuses it, or would drop what is trained.
            TemplateError: There is no template, or it ends a turn with no token.
        """
        notes = Counter() if notes is None else notes
        try:
            match item:
                case Conversation() | Completion():
                    return self._answer(item, notes)
                case Pair():
                    return self._pair(item, notes)
                case Judged():
                    return self._judged(item, notes)
                case Stepwise():
                    return self._steps(item)
                case Text():
                    return self._text(item)
                case Tokens():
                    return self._tokens(item)
        except (RowError, TemplateError) as error:
            error.where = error.where or where
            raise

    def _answer(self, item: Answer, notes: Counter[str]) -> Example:
        return self._conversation(item, notes) if isinstance(item, Conversation) else self._completion(item, notes)

    def _pair(self, item: Pair, notes: Counter[str]) -> Example:
        of_side: list[Counter[str]] = [Counter(), Counter()]
        sides = [self._answer(side, own) for side, own in zip((item.chosen, item.rejected), of_side, strict=True)]
        notes.update(of_side[0] | of_side[1])  # what is about the prompt is said twice, and counted once
        if np.array_equal(sides[0].input_ids, sides[1].input_ids):
            notes["equal_answers"] += 1
        if _asked(item.chosen) != _asked(item.rejected):
            notes["different_prompts"] += 1
        return grow(sides, values=(item.margin,), weight=item.weight, share=self.share_prompts)

    def _judged(self, item: Judged, notes: Counter[str]) -> Example:
        made = grow([self._answer(item.answer, notes)], values=(float(item.label),), weight=item.weight)
        if len(made.ends) == 1:
            raise RowError("nothing stands before the answer, so there is no prompt under which it could be judged")
        return made

    def _steps(self, item: Stepwise) -> Example:
        prompt = self._encode(item.prompt).ids
        before, _ = self._frame(prompt)
        steps = [self._continue(step + STEP_END) for step in item.steps]
        trained = [False, *[True] * len(steps)]
        return chain([np.concatenate([before, prompt]), *steps], trained=trained, values=item.labels, weight=float(len(steps)))

    def _conversation(self, item: Conversation, notes: Counter[str]) -> Example:
        messages = item.messages
        if not messages:
            raise RowError("the conversation has no messages")
        chat = self._chat(item.tools)
        rendered = chat.template.render(messages, item.tools)
        encoded = self._encode(rendered)
        _check_nothing_lost(item, rendered, notes)
        special = encoded.starts[self._is_special[encoded.ids]]
        if _any_inside(special, [span for span in spans_of(rendered) if span.origin.field in OWN_FIELDS]):
            notes["special_tokens_in_content"] += 1

        weights = np.full(len(encoded.ids), 1.0 if self.train_on == "all" else 0.0, np.float32)
        wanted = self._wanted(messages)
        if wanted:
            layout = lay_out(rendered)
            for number, weight in wanted.items():
                regions = chat.shape.regions(layout, messages, number)
                for start, end in regions:
                    weights[self._tokens_in(encoded, start, end)] = weight
                if not regions and weight and messages[number].role == "assistant":
                    raise RowError(f"the chat template leaves out message {number + 1}, which is to be trained")
        return Example(encoded.ids, weights)

    def _wanted(self, messages: Sequence[Message]) -> dict[int, float]:
        """The weight of each message that is not simply as the rest: a message's own word goes before `train_on`."""
        if self.train_on == "all":
            chosen: set[int] = set()
        elif self.train_on == "last":
            chosen = set([number for number, message in enumerate(messages) if message.role == "assistant"][-1:])
        else:
            roles = ("assistant",) if self.train_on == "assistant" else self.train_on
            chosen = {number for number, message in enumerate(messages) if message.role in roles}
        wanted = dict.fromkeys(sorted(chosen), 1.0)
        wanted |= {number: float(message.train) for number, message in enumerate(messages) if message.train is not None}
        return wanted

    def _tokens_in(self, encoded: _Encoded, start: int, end: int) -> slice:
        """The tokens that hold one of the characters start..end."""
        first = int(np.searchsorted(encoded.ends, start, side="right"))
        stop = int(np.searchsorted(encoded.starts, end, side="left"))
        if first < stop and encoded.starts[first] < start and self._is_added[encoded.ids[first]]:
            first += 1  # a header token that swallowed the white space after it
        return slice(first, max(first, stop))

    def _completion(self, item: Completion, notes: Counter[str]) -> Example:
        if _run_together(item.prompt[-1:], item.completion[:1]):
            notes["words_run_together"] += 1
        whole = self._encode(item.prompt + item.completion)
        prompt = self._encode(item.prompt).ids
        cut = len(prompt)
        shares = not np.array_equal(whole.ids[:cut], prompt) or (cut < len(whole.ids) and whole.starts[cut] < len(item.prompt))
        following = self._continue(item.completion) if shares else whole.ids[cut:]
        before, after = self._frame(prompt)
        ids = np.concatenate([before, prompt, following, after])
        weights = np.ones(len(ids), np.float32)
        if not self.train_on_prompt:
            weights[: len(before) + cut] = 0.0
        return Example(ids, weights)

    def _text(self, item: Text) -> Example:
        ids = self._encode(item.text).ids
        before, after = self._frame(ids)
        ids = np.concatenate([before, ids, after])
        return Example(ids, np.ones(len(ids), np.float32))

    def _tokens(self, item: Tokens) -> Example:
        ids = np.array(item.input_ids, np.int64)
        size = len(self.tokenizer)
        outside = np.flatnonzero((ids < 0) | (ids >= size))
        if len(outside):
            at = int(outside[0])
            raise RowError(f"input_ids[{at}] is {ids[at]}, expected an id of the tokenizer: 0 to {size - 1}")
        weights = np.ones(len(ids), np.float32)
        if item.labels is not None:
            labels = np.array(item.labels, np.int64)
            if len(labels) != len(ids):
                raise RowError(f"labels has {len(labels)} entries where input_ids has {len(ids)}")
            wrong = np.flatnonzero((labels != IGNORED_LABEL) & (labels != ids))
            if len(wrong):
                at = int(wrong[0])
                raise RowError(f"labels[{at}] is {labels[at]} where input_ids[{at}] is {ids[at]}, expected the same id or {IGNORED_LABEL}")
            weights[labels == IGNORED_LABEL] = 0.0
        return Example(ids.astype(np.int32), weights)

    # -- chat -------------------------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids to generate an answer from: the conversation with the generation prompt after it."""
        rendered = self._chat(tools).template.render(messages, tools, add_generation_prompt=True)
        return self._encode(rendered).ids.tolist()

    @property
    def end_of_turn(self) -> list[int]:
        """Ids of the tokens that end an assistant's turn, the usual one first."""
        texts = self._chat(()).shape.ends
        return cast("list[int]", self.tokenizer.convert_tokens_to_ids(list(texts)))

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which generation stops: the ends of a turn, and the end of a text."""
        ends = self.end_of_turn if self._sources else []
        eos = cast("int | None", self.tokenizer.eos_token_id)
        return list(dict.fromkeys([*ends, *([eos] if eos is not None else [])]))

    def _chat(self, tools: Sequence[Any]) -> _Chat:
        if not self._sources:
            raise TemplateError(
                "the model's tokenizer has no chat template, which conversations need",
                hint=f"Set model.chat_template to a .jinja file or one of: {', '.join(templates.names())}.",
            )
        key = "tool_use" if tools and "tool_use" in self._sources else "default"
        if key not in self._chats:
            self._chats[key] = _Chat(self._sources[key], self.tokenizer, self.today)
        return self._chats[key]

    # -- tokens -----------------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> _Encoded:
        """Tokenises without special tokens of the tokenizer's own adding."""
        try:
            encoding = self._backend.encode(str.__str__(text) if isinstance(text, Traced) else text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise RowError("the text holds half of a surrogate pair, which is no character") from None
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return _Encoded(np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1])

    def _continue(self, text: str) -> np.ndarray:
        """Tokenises text that goes on after other text: without the space that SentencePiece puts before a beginning."""
        newline, behind = self._encode("\n").ids, self._encode("\n" + text).ids
        if np.array_equal(behind[: len(newline)], newline):
            return behind[len(newline) :]
        return self._encode(text).ids

    def _frame(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What goes before (bos, where the tokenizer adds one and the text has none) and after (eos) a text that is no conversation."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise TemplateError("the tokenizer has no eos token, so a model could not learn where a text ends")
        before = self._prefix if not np.array_equal(ids[: len(self._prefix)], self._prefix) else self._prefix[:0]
        return before, np.array([eos], np.int32)

    @cached_property
    def _prefix(self) -> np.ndarray:
        plain, full = self.tokenizer("a", add_special_tokens=False)["input_ids"], self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return np.array(full[:at], np.int32)

    @cached_property
    def _backend(self) -> Any:
        """A tokenizer of our own: whole offsets (byte-level ones leave white space out by default), no truncation, no padding."""
        from tokenizers.processors import ByteLevel

        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
        backend.post_processor = ByteLevel(trim_offsets=False)
        return backend

    @cached_property
    def _is_added(self) -> np.ndarray:
        return self._lookup(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _is_special(self) -> np.ndarray:
        return self._lookup([id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special])

    def _lookup(self, ids: Any) -> np.ndarray:
        table = np.zeros(max([len(self.tokenizer), *(id + 1 for id in ids)]), bool)
        table[list(ids)] = True
        return table

    def fingerprint(self) -> str:
        """A hash of all that decides about ids and weights."""
        parts = {
            "version": _VERSION,
            "tokenizer": hashlib.sha256(self._backend.to_str().encode()).hexdigest(),
            "special": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            "prefix": self._prefix.tolist(),
            "templates": self._sources,
            "train_on": self.train_on,
            "train_on_prompt": self.train_on_prompt,
            "share_prompts": self.share_prompts,
            "today": str(self.today) if any("strftime_now" in source for source in self._sources.values()) else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Chat:
    """One of a tokenizer's chat templates with what was learned about it."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerFast, today: datetime.date) -> None:
        self.template = ChatTemplate(source, tokenizer.special_tokens_map, today)
        self._tokens = tokenizer.added_tokens_decoder.values()

    @cached_property
    def shape(self) -> TurnShape:
        special = [token.content for token in self._tokens if token.special]
        return TurnShape(self.template, special, [token.content for token in self._tokens])


def _template_sources(tokenizer: PreTrainedTokenizerFast, chosen: str | None) -> dict[str, str]:
    """The Jinja texts: `default`, and `tool_use` where the tokenizer has one of its own for rows with tools."""
    own = cast("str | Mapping[str, str] | None", tokenizer.chat_template) if chosen is None else chosen  # pyright: ignore[reportUnknownMemberType]
    if not own:
        return {}
    if isinstance(own, Mapping):
        return {"default": next(iter(own.values())), **own}
    return {"default": own if "{{" in own or "{%" in own else templates.resolve(own)}


def _check_nothing_lost(item: Conversation, rendered: Traced, notes: Counter[str]) -> None:
    """Compares what went into the template with what came out.

    Raises:
        RowError: A tool call was left out, so that the assistant's turn would be taught as something else.
    """
    shown: Counter[tuple[int, str]] = Counter()
    for start, end, (message, name) in spans_of(rendered):
        shown[message, name] += end - start
    if item.tools and not shown[OUTSIDE, TOOLS]:
        notes["tools_left_out"] += 1
    for number, message in enumerate(item.messages):
        if message.tool_calls and not shown[number, "tool_calls"]:
            raise RowError(
                f"message {number + 1} calls a tool, and the chat template leaves tool calls out",
                hint="Choose a template that knows tools with model.chat_template.",
            )
        said = len(message.content.strip())
        if message.reasoning and message.reasoning.strip() and not shown[number, "reasoning_content"]:
            notes["reasoning_left_out"] += 1
        elif "</think>" in message.content and shown[number, "content"] < said:
            notes["reasoning_left_out"] += 1
        elif said and not shown[number, "content"] and message.content.strip() not in rendered:
            notes["messages_left_out"] += 1


def _asked(answer: Answer) -> str | None:
    """The first thing that a user says, or the prompt."""
    if isinstance(answer, Completion):
        return answer.prompt
    return next((message.content for message in answer.messages if message.role == "user"), None)


def _run_together(before: str, after: str) -> bool:
    """Whether a prompt's last and an answer's first character look like two words of a language that puts a space between them."""
    return (before + after).isascii() and after.isalnum() and (before.isalnum() or before in tuple(".,:;?!"))


def _any_inside(places: np.ndarray, spans: Sequence[tuple[int, int, Any]]) -> bool:
    if not len(places) or not spans:
        return False
    edges = np.array([edge for start, end, _ in spans for edge in (start, end)])
    return bool((np.searchsorted(places, edges[1::2]) > np.searchsorted(places, edges[::2])).any())
