"""What is particular to each family of models, as one small table.

A row says how a family's modules differ from Llama's: how its norm rounds, what stands between a projection and the rotation, what its
attention is told. `models/patch.py` builds fast modules from it, and proves each of them against the module that it replaces. So a row
that is wrong, or that a new release of transformers has made wrong, costs speed and nothing else. A family without a row trains unpatched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm: `weight + offset` is the factor; `late` rounds once, after the product, and not before it."""

    offset: float = 0.0
    late: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention with rotary positions.

    Attributes:
        projections: The linear layers that make queries, keys and values: three, or one that makes all side by side.
        norms: Whether `q_norm` and `k_norm` stand before the rotation: over each `head`, or over the `whole` projection.
        window: Where the sliding window is: an attribute of the `module`, of its `config`, or nowhere.
        softcap: Whether the scores are capped by `attn_logit_softcapping`.
    """

    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    norms: Literal["none", "head", "whole"] = "none"
    window: Literal["none", "module", "config"] = "none"
    softcap: bool = False


@dataclass(frozen=True, slots=True)
class Gated:
    """A gated feed-forward: the linear layers that make gate and up (two, or one that makes both), and where the activation is."""

    projections: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"


@dataclass(frozen=True, slots=True)
class Family:
    """The slots of one family, and the names of the submodules of a layer that fill them."""

    norm: Norm = field(default=Norm())
    attention: Attention = field(default=Attention())
    mlp: Gated = field(default=Gated())


_PHI = Family(attention=Attention(("qkv_proj",), window="config"), mlp=Gated(("gate_up_proj",), "activation_fn"))

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(attention=Attention(window="config")),
    "ministral": Family(attention=Attention(window="module")),
    "mixtral": Family(attention=Attention(window="config")),
    "qwen2": Family(attention=Attention(window="module")),
    "qwen3": Family(attention=Attention(norms="head", window="module")),
    "qwen2_moe": Family(attention=Attention(window="module")),
    "qwen3_moe": Family(attention=Attention(norms="head", window="module")),
    "gemma": Family(norm=Norm(1.0, late=True)),
    "gemma2": Family(norm=Norm(1.0, late=True), attention=Attention(window="module", softcap=True)),
    "gemma3_text": Family(norm=Norm(1.0, late=True), attention=Attention(norms="head", window="module")),
    "phi3": _PHI,
    "granite": Family(),
    "granitemoe": Family(),
    "olmoe": Family(attention=Attention(norms="whole")),
    "olmo2": Family(norm=Norm(late=True), attention=Attention(norms="whole")),
    "olmo3": Family(norm=Norm(late=True), attention=Attention(norms="whole", window="module")),
}
"""Rows by `config.model_type`. SmolLM and Yi are Llama, Qwen 2.5 is Qwen 2, Phi-4 is Phi-3."""
