"""Tiny random models of many families, as transformers builds them."""

from __future__ import annotations

import copy
import os

import torch
import transformers

DEVICE = torch.device(os.environ.get("BURNISH_TESTS_ON", "cpu"))
"""Where whole models are tested; tests/gpu/run.sh says cuda."""
VOCABULARY = 97
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 4}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "phi3": ("Phi3", {}),
    "phi": ("Phi", {}),
    "granite": (
        "Granite",
        {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.1},
    ),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**MIXTURE, "head_dim": 8}),
    "gpt-oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4, "rope_scaling": None}),
    "gpt2": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt-neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
}
SEGMENT_BY_SEGMENT = {
    "falcon": ("Falcon", {"alibi": True, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "qwen2-moe-sliding": ("Qwen2Moe", {**MIXTURE, "shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": 4}),
}
"""Families that cannot compute several segments in one call, for different reasons: no replaceable attention, a convolution across
tokens, a window that the attention is not told of."""

EXPERTS = {"mixtral", "qwen3-moe", "gpt-oss", "qwen2-moe-sliding"}


def build(name: str, dtype: torch.dtype = torch.float64, **changes):
    """A model of the family with weights large enough that everything matters."""
    family, settings = {**FAMILIES, **SEGMENT_BY_SEGMENT}[name]
    config = getattr(transformers, f"{family}Config")(**{**BASE, **copy.deepcopy(settings), **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # some releases of transformers choose sdpa, which drops the cap
    if name in EXPERTS:
        model.set_experts_implementation("eager")  # the grouped product knows no fp64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.to(DEVICE, dtype).train()
