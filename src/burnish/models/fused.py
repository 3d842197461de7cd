"""The fast modules: what stands in for a model's own norm, linear layer, feed-forward and attention.

Each is a plain function `forward(module, ...)` that reads everything from the module that it stands in for, at every call. So an adapter
that is switched off, weights that are moved or replaced, and dropout that comes and goes with `train()` are seen as they are, and whatever
a fast module does not know (a cache while decoding, a stranger's adapter) goes to the module's own code.

    norm        kernels.rms_norm
    linear      kernels.lora: base weight and adapter as one node
    mlp         kernels.lora: gate, up, activation and down as one node that keeps no product
    experts     kernels.experts: the feed-forwards of a mixture, adapters as thin products instead of merged weights
    attention   kernels.lora for the projections of one input together, kernels.rope, then the attention that packing installed
"""

# transformers, PEFT and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from burnish.kernels.experts import expert_mlp
from burnish.kernels.glu import GluKind, glu
from burnish.kernels.lora import lora_stack
from burnish.kernels.lora_mlp import lora_mlp
from burnish.kernels.rms_norm import rms_norm
from burnish.kernels.rope import rope
from burnish.models.adapters import experts_of, is_lora_layer, projection
from burnish.models.families import Attention, Family, Gated, Norm

_ACTIVATIONS: dict[str, GluKind] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}


def replacement(module: nn.Module, family: Family) -> tuple[str, Callable[..., Any]] | None:
    """The slot that a module can fill in this family, and the fast forward for it; None where there is none."""
    if type(module).__name__.endswith("RMSNorm"):
        return "norm", partial(norm_forward, family.norm)
    if _has(module, *family.attention.projections, "o_proj", "head_dim", "scaling"):
        return "attention", partial(attention_forward, family.attention)
    if _has(module, *family.mlp.projections, "down_proj", family.mlp.activation) and _activation(module, family.mlp) is not None:
        return "mlp", partial(mlp_forward, family.mlp)
    if (experts := experts_of(module)) is not None and _kind_of(experts.activation) is not None:
        return "experts", experts_forward
    if is_lora_layer(module):
        return "linear", linear_forward
    return None


def norm_forward(norm: Norm, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A root-mean-square norm over the last dimension."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    made = rms_norm(hidden_states, module.weight, eps, offset=norm.offset, gemma=norm.late)
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
