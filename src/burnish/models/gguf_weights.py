"""Turns a GGUF file into a transformers configuration and state dict, for the architectures in `ARCHITECTURES`.

llama.cpp stores what transformers stores under other names, with a few changes that are undone here:

- blocks of quantised values, dequantised to float32 (a Q4 file holds less than the original model; what it holds is taken exactly);
- `llama` and `granite` files hold the rows of the query and key projections in interleaved order (pairs of rotary components side by
  side), transformers wants halves;
- Gemma's norm weights are stored plus one;
- the stretched rotary frequencies of Llama 3 come as a tensor of factors, transformers wants the rule that gives them.

Every tensor of the file must find its place, and every place its tensor (`load.py` checks the second half).
"""

# transformers, PEFT and NumPy are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from burnish.core.errors import ModelError, Where, did_you_mean
from burnish.models.gguf import GGUFFile

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)\.(weight|bias)$")
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTPUT_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_DENSE = {**_ATTENTION, **_MLP, **_PRE_NORMS}
_GEMMA = {**_ATTENTION, **_MLP, **_OUTPUT_NORMS, "attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one `general.architecture` maps to transformers.

    `names` maps the middle of `blk.N.MIDDLE.weight` to the module inside a layer; `extra` gives the configuration fields that other
    architectures do not have.
    """

    config: type[PreTrainedConfig]
    names: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0
    extra: Callable[[GGUFFile], dict[str, Any]] = field(default=lambda file: {})


def _biased(file: GGUFFile) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _granite(file: GGUFFile) -> dict[str, Any]:
    scales = {
        "embedding_multiplier": file.setting("embedding_scale", 1.0),
        "residual_multiplier": file.setting("residual_scale", 1.0),
        "attention_multiplier": file.setting("attention.scale", 1.0),
        "logits_scaling": file.setting("logit_scale", 1.0),
    }
    return {**_biased(file), **scales}


def _gemma2(file: GGUFFile) -> dict[str, Any]:
    heads, width = int(_need(file, "attention.head_count")), int(_need(file, "embedding_length"))
    head_dim = int(_need(file, "attention.key_length"))
    largest = int(_need(file, "block_count")) == 46  # the 27B model alone scales queries by width per head, as llama.cpp has it too
    return {
        "query_pre_attn_scalar": width // heads if largest else head_dim,
        "sliding_window": file.setting("attention.sliding_window", 4096),
        "attn_logit_softcapping": file.setting("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.setting("final_logit_softcapping", 30.0),
    }


def _gemma3(file: GGUFFile) -> dict[str, Any]:
    heads, width = int(_need(file, "attention.head_count")), int(_need(file, "embedding_length"))
    head_dim, layers = int(_need(file, "attention.key_length")), int(_need(file, "block_count"))
    largest = layers == 62
    theta, factor = float(file.setting("rope.freq_base", 1e6)), float(file.setting("rope.scaling.factor", 1.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if factor != 1.0:
        rope = {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    local = {"rope_type": "default", "rope_theta": float(file.setting("rope.freq_base_swa", 10_000.0))}
    return {
        "query_pre_attn_scalar": width // heads if largest else head_dim,
        "sliding_window": int(_need(file, "attention.sliding_window")),
        "layer_types": ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)],
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "final_logit_softcapping": file.setting("final_logit_softcapping"),
    }


def _phi3(file: GGUFFile) -> dict[str, Any]:
    if any(name.startswith("rope_factors_") for name in file.tensors):
        raise ModelError("Phi-3 files with long-context rotary factors (LongRoPE) are not read yet", where=Where(file=str(file.path)))
    head_dim = int(_need(file, "embedding_length")) // int(_need(file, "attention.head_count"))
    rotary = int(file.setting("rope.dimension_count", head_dim))
    theta = float(file.setting("rope.freq_base", 10_000.0))
    return {
        "sliding_window": file.setting("attention.sliding_window") or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotary / head_dim},
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(LlamaConfig, _DENSE, interleaved=True, extra=_biased),
    "granite": Architecture(GraniteConfig, _DENSE, interleaved=True, extra=_granite),
    "qwen2": Architecture(Qwen2Config, _DENSE),
    "qwen3": Architecture(Qwen3Config, {**_DENSE, **_QK_NORMS}, extra=_biased),
    "olmo2": Architecture(Olmo2Config, {**_ATTENTION, **_MLP, **_OUTPUT_NORMS, **_QK_NORMS}),
    "phi3": Architecture(
        Phi3Config,
        {
            **_PRE_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        extra=_phi3,
    ),
    "gemma2": Architecture(Gemma2Config, _GEMMA, norm_offset=1.0, extra=_gemma2),
    "gemma3": Architecture(Gemma3TextConfig, {**_GEMMA, **_QK_NORMS}, norm_offset=1.0, extra=_gemma3),
}
"""Value of `general.architecture` -> how to read it."""


def architecture_of(file: GGUFFile) -> Architecture:
    """The entry for the file's architecture.

    Raises:
        ModelError: when it is not supported, or when the file is a mixture of experts.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise _error(file, f"GGUF architecture '{name}' is not supported, {did_you_mean(name, ARCHITECTURES)}")
    if file.setting("expert_count", 0):
        raise _error(file, f"GGUF files of '{name}' with experts (mixture of experts) are not supported")
    return ARCHITECTURES[name]


def read_config(file: GGUFFile) -> PreTrainedConfig:
    """The transformers configuration that the metadata describes, with ids of the special tokens.

    Raises:
        ModelError: when the architecture is unknown or a needed value is absent.
    """
    architecture = architecture_of(file)
    width, heads = int(_need(file, "embedding_length")), int(_need(file, "attention.head_count"))
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    fields: dict[str, Any] = {
        "architectures": [_causal_lm(architecture.config)],
        "hidden_size": width,
        "intermediate_size": int(_need(file, "feed_forward_length")),
        "num_hidden_layers": int(_need(file, "block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.setting("attention.head_count_kv", heads)),
        "head_dim": int(file.setting("attention.key_length", width // heads)),
        "rms_norm_eps": _float(float(_need(file, "attention.layer_norm_rms_epsilon"))),
        "max_position_embeddings": int(_need(file, "context_length")),
        "vocab_size": _shape(file, "token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file),
        **{key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in ids.items()},
        **architecture.extra(file),
    }
    return architecture.config(**fields)


def read_weights(file: GGUFFile, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the file under its transformers name, in `dtype`.

    Raises:
        ModelError: when a tensor of the file has no place in the model.
    """
    architecture = architecture_of(file)
    return {name: torch.from_numpy(values).to(dtype) for name, values in _tensors(file, architecture, config)}


def _tensors(file: GGUFFile, architecture: Architecture, config: PreTrainedConfig) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for source in file.tensors:
        if source == _ROPE_FACTORS:  # read by _rope
            continue
        middle, target = _target(file, architecture, source)
        values = file.tensor(source)
        if architecture.interleaved and middle in heads:
            values = _halves(values, heads[middle])
        if architecture.norm_offset and middle.endswith("norm"):
            values = values - np.float32(architecture.norm_offset)
        yield target, values


def _target(file: GGUFFile, architecture: Architecture, source: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`attn_q`, `model.layers.3.self_attn.q_proj.weight`)."""
    block = _BLOCK.match(source)
    if block and block[2] in architecture.names:
        return block[2], f"model.layers.{block[1]}.{architecture.names[block[2]]}.{block[3]}"
    stem, _, leaf = source.rpartition(".")
    if stem in _TOP and leaf in ("weight", "bias"):
        return stem, f"{_TOP[stem]}.{leaf}"
    raise _error(file, f"tensor '{source}' has no place in a {file.architecture} model")


def _halves(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from interleaved order (0, h, 1, h+1, ...) back to two halves (0, 1, ..., h, h+1, ...)."""
    shape = values.shape
    pairs = values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape)


def _rope(file: GGUFFile) -> dict[str, Any]:
    theta = float(file.setting("rope.freq_base", 10_000.0))
    if _ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, theta)
    kind = file.setting("rope.scaling.type", "none")
    if kind in ("none", ""):
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise _error(file, f"rotary scaling '{kind}' is not supported, expected 'none', 'linear' or 'yarn'")
    rope = {"rope_type": kind, "rope_theta": theta, "factor": float(_need(file, "rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(_need(file, "rope.scaling.original_context_length"))
    return rope


def _llama3_rope(file: GGUFFile, theta: float) -> dict[str, Any]:
    """Finds the Llama 3 rule (its published constants) whose factors are those in the file."""
    factors = file.tensor(_ROPE_FACTORS)
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(factors, _llama3_factors(rope, len(factors)), rtol=1e-4):
        raise _error(file, "the rotary factors (rope_freqs.weight) do not follow the Llama 3 rule")
    return rope


def _llama3_factors(rope: Mapping[str, Any], count: int) -> np.ndarray[Any, Any]:
    """How much each rotary frequency is slowed: not at all below the high cut, by `factor` above the low cut, smoothly between."""
    frequencies = rope["rope_theta"] ** -(np.arange(count) / count)
    wavelengths = 2 * math.pi / frequencies
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((length / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _causal_lm(config: type[PreTrainedConfig]) -> str:
    return config.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"


def _shape(file: GGUFFile, tensor: str) -> tuple[int, ...]:
    if tensor not in file.tensors:
        raise _error(file, f"the file has no tensor '{tensor}'")
    return file.tensors[tensor].shape


def _float(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _need(file: GGUFFile, name: str) -> Any:
    return file.require(f"{file.architecture}.{name}")


def _error(file: GGUFFile, message: str) -> ModelError:
    return ModelError(message, where=Where(file=str(file.path)))
