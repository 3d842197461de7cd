"""Builds a tokenizer from GGUF metadata, with the pre-tokenizer that `tokenizer.ggml.pre` names.

A byte-level BPE vocabulary alone does not say how text is cut into words before the merges apply: whether digits stand alone, in threes, or
in whole numbers. GGUF names that rule. An unknown name is an error here, because a guess would give ids the model was never trained on.

The patterns are those of the models' own `tokenizer.json` files.
"""

# transformers, PEFT and NumPy are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from burnish.core.errors import ModelError, Where, did_you_mean
from burnish.models.gguf import GGUFFile

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


@dataclass(frozen=True, slots=True)
class Pre:
    """How text is cut into words: each pattern in turn splits what the ones before left whole."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges say
    nfc: bool = False  # text is brought into Unicode normal form C first
    add_bos: bool = False  # what holds when the file does not say


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _words(numbers: str) -> str:
    """The pattern of the cl100k family; `numbers` is how many digits may stand together."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"


def _cased_words(numbers: str, contraction: str) -> str:
    """The pattern of the o200k family, which also splits where lower case turns into upper case."""
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{head}{_UPPER}*{_LOWER}+{contraction}|{head}{_UPPER}+{_LOWER}*{contraction}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


_DIGITS_ALONE = Pre((r"\p{N}", _GPT2))
_PLAIN = Pre((_GPT2,))
_LLAMA3 = Pre((_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_CL100K = Pre((_words(r"\p{N}{1,3}"),))
_QWEN2 = Pre((_words(r"\p{N}"),), nfc=True)
_O200K = Pre((_cased_words(r"\p{N}{1,3}", f"{_CONTRACTION}?"),))
_DEEPSEEK3 = Pre(
    (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}",
    )
)
_QWEN35 = Pre((rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}",), nfc=True)

PRE_TOKENIZERS: dict[str, Pre] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS_ALONE),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "exaone4", "trillion", "granite-docling"), _PLAIN),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _CL100K),
    **dict.fromkeys(("glm4", "glm5"), Pre(_CL100K.patterns, ignore_merges=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), Pre(_QWEN2.patterns)),
    "qwen35": _QWEN35,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _O200K),
    "tekken": Pre((_cased_words(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "seed-coder": Pre((rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",)),
}
"""Value of `tokenizer.ggml.pre` -> rule."""


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special ids, chat template and context length.

    Raises:
        ModelError: when the kind of tokenizer or its pre-tokenizer is not known.
    """
    return _Builder(file).build()


@dataclass
class _Builder:
    file: GGUFFile
    tokens: list[str] = field(init=False)
    types: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.file.require("tokenizer.ggml.tokens")
        self.types = self._get("token_type") or [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise self._error(f"{len(self.types)} token types for {len(self.tokens)} tokens")

    def build(self) -> PreTrainedTokenizerFast:
        kind = self.file.require("tokenizer.ggml.model")
        if kind == "gpt2":
            backend, add_bos = self._byte_level()
        elif kind == "llama":
            backend, add_bos = self._sentencepiece()
        else:
            raise self._error(f"the tokenizer is of kind '{kind}', expected 'gpt2' (byte-level BPE) or 'llama' (SentencePiece BPE)")
        self._add_special(backend)
        self._frame(backend, bool(self._get("add_bos_token", add_bos)), bool(self._get("add_eos_token", False)))
        return self._wrap(backend)

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        pre = self._pre()
        merges = [_pair(merge) for merge in self.file.require("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        if len(vocabulary) != len(self.tokens):
            raise self._error(f"{len(self.tokens) - len(vocabulary)} tokens stand in the vocabulary twice")
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
        if pre.nfc:
            backend.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        backend.decoder = decoders.ByteLevel()
        return backend, pre.add_bos

    def _pre(self) -> Pre:
        name = self._get("pre")
        if name is None:
            raise self._error("the file does not say how text is split before the merges (no tokenizer.ggml.pre)")
        if name not in PRE_TOKENIZERS:
            raise self._error(f"unknown pre-tokenizer '{name}' (tokenizer.ggml.pre), {did_you_mean(name, PRE_TOKENIZERS)}")
        return PRE_TOKENIZERS[name]

    def _sentencepiece(self) -> tuple[Tokenizer, bool]:
        """SentencePiece BPE: the pair with the best score merges first, and a character without a token falls back to its bytes."""
        scores: list[float] = self.file.require("tokenizer.ggml.scores")
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        unknown = self._special("unknown") or next((t for t, kind in zip(self.tokens, self.types, strict=True) if kind == _UNKNOWN), None)
        backend = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=_merges_by_score(vocabulary, scores),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=_BYTE in self.types,
            )
        )
        prefix = bool(self._get("add_space_prefix", True))
        spaces = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prefix else [])]
        )
        return backend, True

    def _add_special(self, backend: Tokenizer) -> None:
        """Control tokens are matched whole in text and hidden when decoding; user-defined ones are matched whole and shown."""
        for index, kind in enumerate(self.types):
            if kind in (_CONTROL, _UNKNOWN):
                backend.add_special_tokens([AddedToken(self.tokens[index], special=True, normalized=False)])
            elif kind == _USER_DEFINED:
                backend.add_tokens([AddedToken(self.tokens[index], special=False, normalized=False)])

    def _frame(self, backend: Tokenizer, add_bos: bool, add_eos: bool) -> None:
        """Puts the begin and end tokens around a text that is tokenised with special tokens."""
        bos, eos = self._special("bos") if add_bos else None, self._special("eos") if add_eos else None
        single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
        framing = [(token, self.tokens.index(token)) for token in dict.fromkeys([bos, eos]) if token]
        byte_level = [processors.ByteLevel(trim_offsets=False)] if isinstance(backend.decoder, decoders.ByteLevel) else []
        template = [processors.TemplateProcessing(single=single, pair=pair, special_tokens=framing)] if framing else []
        if byte_level or template:
            backend.post_processor = processors.Sequence([*byte_level, *template])

    def _wrap(self, backend: Tokenizer) -> PreTrainedTokenizerFast:
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        special = {key: token for key, name in names.items() if (token := self._special(name)) is not None}
        context = self.file.setting("context_length")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            **special,
            **({"model_max_length": int(context)} if context else {}),
        )
        tokenizer.chat_template = self.file.metadata.get("tokenizer.chat_template")
        return tokenizer

    def _special(self, name: str) -> str | None:
        index = self._get(f"{name}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise self._error(f"tokenizer.ggml.{name}_token_id is {index}, the vocabulary has {len(self.tokens)} tokens")
        return self.tokens[index]

    def _get(self, name: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{name}", default)

    def _error(self, message: str) -> ModelError:
        return ModelError(message, where=Where(file=str(self.file.path)))


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the token with the best score first."""
    found = [
        (-scores[index], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _pair(merge: str) -> tuple[str, str]:
    """`'Ġ t'` -> `('Ġ', 't')`. The first symbol is at least one character, so the search starts behind it."""
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]
