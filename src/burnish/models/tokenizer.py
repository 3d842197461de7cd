"""Loads a model's tokenizer without its weights."""

# transformers, PEFT and NumPy are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from burnish.config.sections import Model
from burnish.core.errors import ModelError
from burnish.data import templates
from burnish.models.locate import locate, reading, require_hub


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer of a hub id, folder, GGUF file or `package:NAME`, with `model.new_tokens` added and `model.chat_template` set.

    Raises:
        TemplateError: when `model.chat_template` is neither a built-in template nor a readable file.
        ModelError: when there is none, when it is not a fast one, or when it would have to run code that came with the model.
        DependencyError: when the package of `package:NAME` is not installed.
    """
    place = locate(model.path)
    if place.kind == "hub":
        require_hub(place.path, model.revision)
    if place.kind == "gguf":
        from burnish.models.gguf import GGUFFile  # here, as in load.py
        from burnish.models.gguf_tokenizer import build_tokenizer

        tokenizer = build_tokenizer(GGUFFile(place.path))
    else:
        tokenizer = read_tokenizer(place.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    add_tokens(tokenizer, model.new_tokens)
    if model.chat_template is not None:
        tokenizer.chat_template = templates.resolve(model.chat_template)
    return tokenizer


def read_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder (a model's or an adapter's) or a hub id.

    Raises:
        ModelError: when there is none, or when it is not a fast one.
    """
    with reading(path):
        tokenizer: object = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer of '{path}' is a {type(tokenizer).__name__}, expected a fast one (tokenizer.json)")
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerFast, new_tokens: list[str]) -> list[int]:
    """Adds what is not yet in the vocabulary; returns the ids of all of `new_tokens`.

    The tokens are matched whole and stay visible when text is decoded.
    """
    fresh = [token for token in dict.fromkeys(new_tokens) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in fresh])  # pyright: ignore[reportArgumentType]
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in new_tokens]
