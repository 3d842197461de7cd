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
class Layer:
    """A decoder layer h = h + attention(norm(h)), h = h + feed_forward(norm(h)).

    Attributes:
        norms: The norms before `self_attn` and before the feed-forward.
        feed_forward: The feed-forward's name.
        after: What each of the two branches goes through before it is added: a norm, a dropout.
        scale: The attribute that multiplies each branch before it is added.
    """

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    feed_forward: str = "mlp"
    after: tuple[str, str] | None = None
    scale: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """The slots of one family, and the names of the submodules of a layer that fill them; no layer where it begins without a norm."""

    norm: Norm = field(default=Norm())
    attention: Attention = field(default=Attention())
    mlp: Gated = field(default=Gated())
    layer: Layer | None = field(default=Layer())


_PHI = Family(
    attention=Attention(("qkv_proj",), window="config"),
    mlp=Gated(("gate_up_proj",), "activation_fn"),
    layer=Layer(after=("resid_attn_dropout", "resid_mlp_dropout")),
)
_SANDWICH = Layer(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
)

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
    "gemma2": Family(norm=Norm(1.0, late=True), attention=Attention(window="module", softcap=True), layer=_SANDWICH),
    "gemma3_text": Family(norm=Norm(1.0, late=True), attention=Attention(norms="head", window="module"), layer=_SANDWICH),
    "phi3": _PHI,
    "granite": Family(layer=Layer(scale="residual_multiplier")),
    "granitemoe": Family(layer=Layer(feed_forward="block_sparse_moe", scale="residual_multiplier")),
    "olmoe": Family(attention=Attention(norms="whole")),
    "olmo2": Family(norm=Norm(late=True), attention=Attention(norms="whole"), layer=None),
    "olmo3": Family(norm=Norm(late=True), attention=Attention(norms="whole", window="module"), layer=None),
}
"""Rows by `config.model_type`. SmolLM and Yi are Llama, Qwen 2.5 is Qwen 2, Phi-4 is Phi-3."""
