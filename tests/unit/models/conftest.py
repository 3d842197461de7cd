"""Tiny random models of many families, and GGUF files made from them as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"head_dim": 16, **MIXTURE},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
}

MORE_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 16}),
    "ministral": ("MinistralForCausalLM", "MinistralConfig", {"head_dim": 16}),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", {}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**MIXTURE, "shared_expert_intermediate_size": 32}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"num_local_experts": 4, "residual_multiplier": 0.5}),
}
"""Those that differ from one above in what stands where in a layer, and in little else."""


def build(family: str, **changes: Any) -> Any:
    """A random model of the family, the same one at every call, whose weights are all visibly non-trivial."""
    model_class, config_class, extra = {**FAMILIES, **MORE_FAMILIES}[family]
    fields = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64} if family == "gpt2" else {**SMALL, **extra}
    config = getattr(transformers, config_class)(**{**fields, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
            if name.endswith("embed_tokens.weight"):
                parameter.mul_(4)
    return model


@pytest.fixture
def family_model() -> Callable[..., Any]:
    return build


BYTES = "".join(chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)))
"""The 256 characters of the byte-level alphabet, not in byte order."""


def byte_level_tokenizer(
    writer: gguf.GGUFWriter, *, pre: str | None = "gpt-2", merges: tuple[str, ...] = ("a b",), special: tuple[str, ...] = ()
) -> int:
    """Writes a byte-level vocabulary: special tokens, the alphabet, what the merges make. Returns its size."""
    tokens = [*special, *BYTES, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(list(merges))
    return len(tokens)


def write_model(path: Path, model: Any, architecture: str, **metadata: Any) -> Path:
    """Stores a model as llama.cpp's converter does: its names, norms plus one for Gemma, interleaved rotary rows for Llama."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    vocabulary = byte_level_tokenizer(writer, special=("<s>", "</s>"))
    assert vocabulary == config.vocab_size
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocabulary)
    for key, value in metadata.items():
        getattr(writer, key)(value)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, name
        writer.add_tensor(target, _as_llama_cpp(architecture, config, name, value.numpy()))
    if architecture == "llama" and config.rope_parameters["rope_type"] == "llama3":
        inverse = model.model.rotary_emb.inv_freq.numpy()
        plain = config.rope_parameters["rope_theta"] ** -(np.arange(len(inverse)) / len(inverse))
        writer.add_tensor("rope_freqs.weight", (plain / inverse).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp(architecture: str, config: Any, name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if architecture in ("llama", "granite") and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        value = value + np.float32(1)
    return value.astype(np.float32)
