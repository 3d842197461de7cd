"""How a transformers model is made to compute a flat forest of segments instead of a padded batch.

transformers lets a model's attention be replaced by name, and hands every keyword argument of `model(...)` down to it. So the structure
of the batch travels as an argument, `forest=Packed(...)`, through the model's own code, and `attend` finds it there. No state is kept
beside the call, so recomputed layers (activation checkpointing) see the same structure as the first time.

The mask argument is answered with a placeholder: a mask that is four-dimensional already is passed on as it is, so no [T, T] mask is
ever built. Calls without `forest` (generation with a cache) get transformers' own mask and attention.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # pyright: ignore[reportUnknownVariableType]
from transformers.masking_utils import sdpa_mask  # pyright: ignore[reportUnknownVariableType]

from burnish.kernels.attention import Forest, eager_attention, forest_attention
from burnish.kernels.dispatch import AttentionKind
from burnish.models.context import Context

NAME = "burnish"
"""What our attention is called in `config._attn_implementation` (which is never saved)."""


@dataclass(frozen=True)
class Packed:
    """The structure that travels with a batch. `windows`, where it is a list, collects what each attention layer asked for.

    `context`, where other ranks compute the rest of the batch's tokens, brings them together for attention.
    """

    forest: Forest
    kind: AttentionKind = "auto"
    windows: list[int | None] | None = None
    context: Context | None = None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    forest: Packed | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: q [B, Hq, T, D], k and v [B, Hkv, T, D] -> ([B, T, Hq, D'], no weights).

    Raises:
        NotImplementedError: The model wants something that segments do not have (a position bias).
    """
    if forest is not None:
        if others.get("position_bias") is not None:
            raise NotImplementedError("attention with a position bias cannot be packed")
        if forest.windows is not None:
            forest.windows.append(sliding_window)
        if forest.context is not None:
            query, key, value, s_aux = forest.context.heads(query, key, value, s_aux)
        output = forest_attention(
            query,
            key,
            value,
            forest.forest,
            scaling=scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
            kind=forest.kind,
        )
        return output.transpose(1, 2).contiguous() if forest.context is None else forest.context.tokens(output), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    output = eager_attention(query, key, value, attention_mask, scaling=scaling, softcap=softcap, sinks=s_aux, dropout=dropout)
    return output.transpose(1, 2).contiguous(), None


def install(model: Any) -> None:
    """Makes `attend` the attention of this model instance.

    Raises:
        NotImplementedError: The model's code does not let its attention be replaced.
    """
    if not model._can_set_attn_implementation():
        raise NotImplementedError("its attention cannot be replaced")
    AttentionInterface.register(NAME, attend)  # pyright: ignore[reportUnknownMemberType]
    AttentionMaskInterface.register(NAME, sdpa_mask)  # pyright: ignore[reportUnknownMemberType]
    model.set_attn_implementation(NAME)


def run(module: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor, packed: Packed | None = None, **options: Any) -> Any:
    """Calls a model or its backbone on flat tokens [T]: packed where a structure is given, as one ordinary sequence where not."""
    arguments: dict[str, Any] = {"input_ids": input_ids[None], "use_cache": False, **options}
    if "position_ids" in _parameters(module):
        arguments["position_ids"] = positions[None]
    if packed is not None:
        arguments["forest"] = packed
        arguments["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return module(**arguments)


def last_hidden(output: Any) -> torch.Tensor:
    """[T, H] of a backbone's output for one flat batch."""
    hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return hidden[0]


def windows_as_configured(config: Any, windows: list[int | None]) -> bool:
    """Whether the attention layers asked for the masks that the config announces.

    Some models put a window into the mask only and do not tell the attention of it, and some have masks that segments do not know
    (chunks). Short probes would not show either, so the config is compared with what the layers said.
    """
    if len(windows) != config.num_hidden_layers:
        return False  # some layers mix tokens in another way, or attend twice
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        sliding = [kind == "sliding_attention" for kind in kinds]
        return set(kinds) <= {"full_attention", "sliding_attention"} and sum(sliding) == sum(w is not None for w in windows)
    window = getattr(config, "sliding_window", None) or None
    return all(seen == window for seen in windows)


def _parameters(module: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(module.forward).parameters)
