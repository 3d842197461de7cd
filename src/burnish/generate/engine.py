"""The one generation engine: requests in, token streams out.

    stream = Generator(model, tokenizer, renderer).stream(messages, Options(temperature=0.7))
    for piece in stream:
        print(piece, end="")
    stream.finish                   # "stop", or "length" when the answer was cut off

It runs over any causal language model of transformers with the model's own key-value cache: the prompt is computed once, then one token at
a time. With greedy options the tokens are those of `model.generate(do_sample=False)`.

The model may be in the middle of training. Each step computes inside `generating(model)`, and between two steps the model stands as it was
found, so streams can be left, and several can be read in turn. Whoever makes many tokens while training wraps it all in
`generating(model)` once, which saves the switching.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from burnish.core.errors import ConfigError, ModelError
from burnish.data.types import Message
from burnish.generate.sampling import Options, choose

__all__ = ["Detokenizer", "Generator", "Options", "PromptRenderer", "Request", "Stream", "Token", "generating"]

Finish = Literal["stop", "length"]
REPLACEMENT = "\ufffd"  # what decoders make of bytes that are not (yet) a character


class PromptRenderer(Protocol):
    """The part of `data.render.Renderer` that generation needs."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """The tokens that end an answer."""
        ...

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Sequence[int]:
        """The conversation as tokens, up to where the assistant's next answer begins."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to go on from, how, and the tokens that end the answer."""

    prompt: tuple[int, ...]
    options: Options = field(default_factory=Options)
    stop: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `finish` is set on the last one: a stop token was reached, or the length limit."""

    id: int
    finish: Finish | None = None


class Detokenizer:
    """Turns tokens into text piece by piece. All pieces together are `tokenizer.decode` of all tokens.

    A token can end in the middle of a character, and decoders look at neighbours (leading spaces, byte fallback). So text is held back
    until it ends with a whole character, and each piece is what a window of tokens decodes to beyond what the window decoded to before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._given = 0  # the first tokens of the window whose text has been given out

    def push(self, token: int) -> str:
        """The text that this token completes, empty when it completes none."""
        self._window.append(token)
        text = self._decode(self._window)
        before = self._decode(self._window[: self._given])
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        self._window, self._given = self._window[self._given :], len(self._window) - self._given
        return text[len(before) :]

    def finish(self) -> str:
        """What is still held back: an unfinished character, as the decoder shows it."""
        text, before = self._decode(self._window), self._decode(self._window[: self._given])
        self._window, self._given = [], 0
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))


class Stream:
    """An answer in the making: iterate to get it piece by piece.

    Attributes:
        ids: The tokens made so far, a stop token included.
        text: The pieces given so far.
        finish: None while it runs; then `"stop"` (a stop token) or `"length"` (cut off by max_tokens or by the model's context).
    """

    def __init__(self, tokens: Iterator[Token], detokenizer: Detokenizer) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self._pieces = self._read(tokens, detokenizer)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def _read(self, tokens: Iterator[Token], detokenizer: Detokenizer) -> Iterator[str]:
        for token in tokens:
            self.ids.append(token.id)
            self.finish = token.finish
            piece = "" if token.finish == "stop" else detokenizer.push(token.id)
            if token.finish:
                piece += detokenizer.finish()
            if piece:
                yield piece


class Generator:
    """Answers with one model.

    Args:
        model: A causal language model of transformers, plain or with adapters.
        tokenizer: Decodes the answers.
        renderer: Makes a conversation into a prompt and knows the stop tokens.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, renderer: PromptRenderer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.renderer = renderer
        self._plain = _plain_model(model)
        takes = inspect.signature(self._plain.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def stream(self, messages: Sequence[Message], options: Options | None = None, *, tools: Sequence[Mapping[str, Any]] = ()) -> Stream:
        """The assistant's next turn in this conversation.

        Raises:
            ConfigError: when the conversation does not fit the model's context.
        """
        prompt = tuple(self.renderer.prompt_ids(messages, tools))
        return self.submit(Request(prompt, options or Options(), frozenset(self.renderer.stop_ids)))

    def answer(self, messages: Sequence[Message], options: Options | None = None, *, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The same, whole."""
        with generating(self.model):
            return "".join(self.stream(messages, options, tools=tools))

    def submit(self, request: Request) -> Stream:
        """Starts a request. Tokens are computed as the stream is read.

        Raises:
            ConfigError: when the prompt is empty or leaves no room in the model's context.
        """
        return Stream(self._decode(request, self._budget(request)), Detokenizer(self.tokenizer))

    def _budget(self, request: Request) -> int:
        """How many tokens may be made: max_tokens, or what the context leaves."""
        if not request.prompt:
            raise ConfigError("the prompt is empty, expected at least one token")
        context = self.context
        if context is None:
            return request.options.max_tokens
        if len(request.prompt) >= context:
            raise ConfigError(f"the conversation is {len(request.prompt)} tokens long, the model's context holds {context}")
        return min(request.options.max_tokens, context - len(request.prompt))

    @property
    def context(self) -> int | None:
        """The most tokens that the model can look at, prompt and answer together; None when it does not say."""
        return getattr(self._plain.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def _decode(self, request: Request, budget: int) -> Iterator[Token]:
        device = next(self._plain.get_input_embeddings().parameters()).device
        rng = torch.Generator(device).manual_seed(request.options.seed)
        seen, cache = list(request.prompt), None
        unread = seen
        for made in range(1, budget + 1):
            logits, cache = self._forward(torch.tensor([unread], device=device), cache)
            chosen = choose(logits, request.options, rng, seen)
            if chosen in request.stop:
                yield Token(chosen, "stop")
                return
            yield Token(chosen, "length" if made == budget else None)
            seen.append(chosen)
            unread = [chosen]

    @torch.no_grad()  # not inference_mode: a tensor that a module keeps from here must stay usable in a backward pass
    def _forward(self, ids: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
        """Reads ids [1, L] after what the cache holds; returns the logits [V] behind the last one, and the cache grown by L."""
        if cache is None:
            cache = DynamicCache(config=self._plain.config)
        with generating(self.model):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._last_only)
        logits = output.logits[0, -1].to(ids.device, torch.float32)
        if not torch.isfinite(logits.max()):  # NaN wins in max
            raise ModelError("the model's logits are not finite: its weights are broken, or its type has too small a range (try float32)")
        return logits, output.past_key_values


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Makes a model ready to generate, and leaves it as it was.

    Inside, dropout is off, and attention is causal attention over a cache instead of the flat forest attention of training. A model that
    is ready already is not touched, and costs nothing.
    """
    training = [module for module in model.modules() if module.training] if model.training else []
    configs = _special_attention(model)
    try:
        for module in training:
            module.training = False
        if configs:
            _use_causal_attention(model)
        yield
    finally:
        for module in training:
            module.training = True
        for config, implementation in configs:
            config._attn_implementation = implementation


def _special_attention(model: nn.Module) -> list[tuple[PreTrainedConfig, str | None]]:
    """Each configuration in the model with its attention, if any cannot generate; outer ones first, because they set inner ones."""
    plain = _plain_model(model)
    if plain.config._attn_implementation in ("sdpa", "eager"):
        return []
    configs = {id(module.config): module.config for module in plain.modules() if isinstance(module, PreTrainedModel)}
    return [(config, config._attn_implementation) for config in configs.values()]


def _use_causal_attention(model: nn.Module) -> None:
    plain = _plain_model(model)
    try:
        plain.set_attn_implementation("sdpa")
    except ValueError:  # a family without SDPA
        plain.set_attn_implementation("eager")


def _plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without the wrapper that an adapter puts around it."""
    plain = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if plain is None:
        raise ModelError(f"a {type(model).__name__} holds no model of transformers, expected a causal language model")
    return plain
