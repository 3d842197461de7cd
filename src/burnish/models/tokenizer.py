"""Loads a model's tokenizer without its weights."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from burnish.config.sections import Model
from burnish.core.errors import ModelError
from burnish.models.gguf import GGUFFile
from burnish.models.gguf_tokenizer import build_tokenizer
from burnish.models.locate import locate, reading, require_hub


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer of a hub id, folder, GGUF file or `package:NAME`, with `model.new_tokens` added.

    Raises:
        ModelError: when there is none, when it is not a fast one, or when it would have to run code that came with the model.
        DependencyError: when the package of `package:NAME` is not installed.
    """
    place = locate(model.path)
    if place.kind == "gguf":
        tokenizer = build_tokenizer(GGUFFile(place.path))
    else:
        if place.kind == "hub":
            require_hub(place.path, model.revision)
        with reading(model.path):
            tokenizer = AutoTokenizer.from_pretrained(place.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer of '{model.path}' is a {type(tokenizer).__name__}, expected a fast one (tokenizer.json)")
    add_tokens(tokenizer, model.new_tokens)
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerFast, new_tokens: list[str]) -> list[int]:
    """Adds what is not yet in the vocabulary; returns the ids of all of `new_tokens`.

    The tokens are matched whole and stay visible when text is decoded.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new_tokens if token not in known])
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in new_tokens]
