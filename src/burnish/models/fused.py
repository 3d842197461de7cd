"""The fast modules: what stands in for a model's own norm, linear layer, feed-forward, attention and layer.

Each is a plain function `forward(module, ...)` that reads everything from the module that it stands in for, at every call. So an adapter
that is switched off, weights that are moved or replaced, and dropout that comes and goes with `train()` are seen as they are, and whatever
a fast module does not know (a cache while decoding, a stranger's adapter) goes to the module's own code.

    norm        kernels.rms_norm
    linear      kernels.lora: base weight and adapter as one node
    mlp         kernels.lora: gate, up, activation and down as one node that keeps no product
    experts     kernels.experts: the feed-forwards of a mixture, adapters as thin products instead of merged weights
    attention   kernels.lora for the projections of one input together, kernels.rope, then the attention that packing installed
    layer       kernels.rms_norm with the residual stream: of a layer's four additions, forward and backward, one stays by itself
"""

# transformers, PEFT and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from burnish.kernels.experts import expert_mlp
from burnish.kernels.glu import GluKind, glu
from burnish.kernels.lora import lora_stack
from burnish.kernels.lora_mlp import lora_mlp
from burnish.kernels.rms_norm import rms_norm
from burnish.kernels.rope import rope
from burnish.models.adapters import experts_of, is_hooked, is_lora_layer, projection
from burnish.models.families import Attention, Family, Gated, Layer, Norm

_ACTIVATIONS: dict[str, GluKind] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}

_LAYERS_CHECKPOINT_IN_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
"""Releases of transformers differ in what recomputes a layer: its class's `forward`, which a replacement stands in for, or `__call__`."""


def replacement(module: nn.Module, family: Family) -> tuple[str, Callable[..., Any]] | None:
    """The slot that a module can fill in this family, and the fast forward for it; None where there is none."""
    if _is_norm(module):
        return "norm", partial(norm_forward, family.norm)
    if _has(module, *family.attention.projections, "o_proj", "head_dim", "scaling"):
        return "attention", partial(attention_forward, family.attention)
    if _has(module, *family.mlp.projections, "down_proj", family.mlp.activation) and _activation(module, family.mlp) is not None:
        return "mlp", partial(mlp_forward, family.mlp)
    if (experts := experts_of(module)) is not None and _kind_of(experts.activation) is not None:
        return "experts", experts_forward
    if is_lora_layer(module):
        return "linear", linear_forward
    if family.layer is not None and _has(module, "self_attn") and _fits(family.layer, module):
        return "layer", partial(layer_forward, family.layer, family.norm)
    return None


def norm_forward(norm: Norm, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A root-mean-square norm over the last dimension."""
    made = rms_norm(hidden_states, module.weight, _eps(module), offset=norm.offset, gemma=norm.late)
    assert isinstance(made, torch.Tensor)  # a pair only where a residual is given
    return made


def linear_forward(module: Any, x: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
    """A linear layer with its adapter."""
    part = projection(module)
    if part is None or inputs or options:
        return type(module).forward(module, x, *inputs, **options)
    return lora_stack(_flat(x), [part])[0].view(*x.shape[:-1], -1)


def mlp_forward(gated: Gated, module: Any, x: torch.Tensor) -> torch.Tensor:
    """activation(gate) * up, and down."""
    parts = [projection(getattr(module, name)) for name in (*gated.projections, "down_proj")]
    kind = _activation(module, gated)
    if kind is None or any(part is None for part in parts):
        return type(module).forward(module, x)
    *first, down = [part for part in parts if part is not None]
    if len(first) == 2:
        return lora_mlp(_flat(x), first[0], first[1], down, kind).view(*x.shape[:-1], -1)
    (both,) = lora_stack(_flat(x), first)
    gate, up = both.chunk(2, dim=-1)
    return lora_stack(glu(gate, up, kind), [down])[0].view(*x.shape[:-1], -1)


def experts_forward(module: Any, hidden_states: torch.Tensor, *routing: torch.Tensor, **options: Any) -> torch.Tensor:
    """Each token [T, H] through the experts that the router chose for it: `routing` is (index [T, k], weights [T, k])."""
    experts = experts_of(module)
    kind = _kind_of(experts.activation) if experts is not None else None
    if experts is None or kind is None or len(routing) != 2 or options:
        return type(module).forward(module, hidden_states, *routing, **options)
    return expert_mlp(hidden_states, *routing, experts.gate_up, experts.down, kind, experts.lora_gate_up, experts.lora_down)


def attention_forward(
    attention: Attention,
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Projections, rotation, attention and output projection of [B, T, H]; with a cache the model's own code runs."""
    attend: Any = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation)
    if past_key_values is not None or position_embeddings is None or attend is None:
        known = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, "past_key_values": past_key_values}
        return type(module).forward(module, hidden_states, **known, **options)
    shape = hidden_states.shape[:-1]
    q, k, v = _queries_keys_values(attention, module, hidden_states)
    if attention.norms == "whole":
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (made.view(*shape, -1, module.head_dim) for made in (q, k, v))
    if attention.norms == "head":
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
    output, weights = attend(
        module,
        q,
        k,
        v.transpose(1, 2),
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **_asked(attention, module),
        **options,
    )
    return _project(output.reshape(*shape, -1), [module.o_proj])[0], weights


def layer_forward(layer: Layer, norm: Norm, module: Any, hidden_states: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
    """A whole layer of [B, T, H]; recomputed as the model's own is where that is switched on."""
    again = _LAYERS_CHECKPOINT_IN_FORWARD and module.training and getattr(module, "gradient_checkpointing", False)
    cached = options.get("past_key_values") is not None or options.get("use_cache")  # which the model's own takes away to recompute
    asked = options.get("output_attentions") or options.get("output_router_logits")
    if inputs or asked or (again and cached) or not _fits(layer, module):
        return type(module).forward(module, hidden_states, *inputs, **options)
    run = partial(_layer, layer, norm, module, options)
    return module._gradient_checkpointing_func(run, hidden_states) if again else run(hidden_states)


def _layer(layer: Layer, norm: Norm, module: Any, options: dict[str, Any], hidden_states: torch.Tensor) -> torch.Tensor:
    """Both branches; the residual stream goes through the norms, so that no addition but the last stands by itself."""
    first, second = (getattr(module, name) for name in layer.norms)
    rounding: dict[str, Any] = {"offset": norm.offset, "gemma": norm.late}
    x, residual = rms_norm(hidden_states, first.weight, _eps(first), through=True, **rounding)
    known = {"position_embeddings": None, "attention_mask": None, "past_key_values": None}
    branch, _ = module.self_attn(hidden_states=x, **{**known, **options})
    x, residual = rms_norm(_added(layer, 0, module, branch), second.weight, _eps(second), residual=residual, **rounding)
    return residual + _added(layer, 1, module, getattr(module, layer.feed_forward)(x))


def _added(layer: Layer, which: int, module: Any, branch: torch.Tensor) -> torch.Tensor:
    """What is added to the residual stream of a branch's output."""
    if layer.after is not None:
        branch = getattr(module, layer.after[which])(branch)
    return branch if layer.scale is None else branch * getattr(module, layer.scale)


def _fits(layer: Layer, module: nn.Module) -> bool:
    """Whether a module is built like this, and its norms run no code but the family's, which is all that a fast layer runs."""
    scale = (layer.scale,) if layer.scale is not None else ()
    if not _has(module, layer.feed_forward, *layer.norms, *(layer.after or ()), *scale):
        return False
    norms: list[nn.Module] = [getattr(module, name) for name in layer.norms]
    return all(_is_norm(norm) and not is_hooked(norm) and _is_ours(vars(norm).get("forward")) for norm in norms)


def _is_ours(forward: Any) -> bool:
    """Whether an instance's forward is the fast norm's, or none."""
    return forward is None or getattr(getattr(forward, "__func__", None), "func", None) is norm_forward


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _queries_keys_values(attention: Attention, module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Three [..., width], from one product or several."""
    made = _project(x, [getattr(module, name) for name in attention.projections])
    if len(made) == 3:
        return made
    queries = module.config.num_attention_heads * module.head_dim
    keys = (made[0].shape[-1] - queries) // 2
    return list(made[0].split([queries, keys, keys], dim=-1))


def _project(x: torch.Tensor, layers: list[Any]) -> list[torch.Tensor]:
    """The outputs of several linear layers for one input [..., in]."""
    parts = [projection(layer) for layer in layers]
    known = [part for part in parts if part is not None]
    if len(known) < len(layers):
        return [layer(x) for layer in layers]
    return [made.view(*x.shape[:-1], -1) for made in lora_stack(_flat(x), known)]


def _asked(attention: Attention, module: Any) -> dict[str, Any]:
    """What this family tells its attention besides scaling and dropout."""
    asked: dict[str, Any] = {}
    if attention.window != "none":
        owner = module if attention.window == "module" else module.config
        asked["sliding_window"] = getattr(owner, "sliding_window", None)
    if attention.softcap:
        asked["softcap"] = module.attn_logit_softcapping
    return asked


def _activation(module: Any, gated: Gated) -> GluKind | None:
    return _kind_of(getattr(module, gated.activation))


def _kind_of(activation: Any) -> GluKind | None:
    return _ACTIVATIONS.get(type(activation).__name__)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)
