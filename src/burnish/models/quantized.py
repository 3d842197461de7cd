"""Frozen linear layers whose weight is stored small, as kernels take them.

    NF4     bitsandbytes' Linear4bit (models/load.py makes it); recognised by what it carries, so that nothing is imported for it
    FP8     a linear layer of our own: e4m3 with one scale per output channel, a storage format without any package

Both are made dense in the compute type right before a product (kernels/nf4.py, kernels/fp8.py), forward and backward. Int8 stays with
bitsandbytes' own code.
"""

# torch and bitsandbytes are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from burnish.kernels.fp8 import FORMAT, FP8Weight, quantize_fp8
from burnish.kernels.matmul import Weight
from burnish.kernels.nf4 import NF4Weight, dense_absmax


class FP8Linear(nn.Linear):
    """A frozen linear layer that keeps its weight in FP8. It computes in the type of its input; see kernels/fp8.py for what storing costs.

    The bytes are kept as uint8, so that nobody takes them for numbers: an adapter on top is not cast to them, and merging is refused.
    """

    scale: torch.Tensor  # fp32 [out]

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        stored, scale = quantize_fp8(layer.weight)
        self.weight = nn.Parameter(stored.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name that nn.Linear has
        """[..., in] -> [..., out]; the weight has no gradient."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return F.linear(input.to(dtype), self.stored().dense(dtype), self.bias)

    def stored(self) -> FP8Weight:
        """The weight as kernels take it."""
        return FP8Weight(self.weight.view(FORMAT), self.scale, checked=True)


def store_fp8(model: Any) -> None:
    """Gives every linear layer of a transformers model but its head an FP8 weight, one layer at a time, in place."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                setattr(module, name, FP8Linear(layer))


def weight_of(layer: Any) -> Weight | None:
    """The frozen or trained weight of a plain, FP8 or NF4 linear layer; None for every other kind of layer."""
    if type(layer) is nn.Linear:
        return layer.weight
    if type(layer) is FP8Linear:
        return layer.stored()
    return _nf4(layer) if is_nf4(layer) else None


def is_nf4(layer: Any) -> bool:
    """Whether this is bitsandbytes' linear layer with an NF4 weight that has been quantised already."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return type(layer).__name__ == "Linear4bit" and getattr(state, "quant_type", None) == "nf4"


def _nf4(layer: Any) -> NF4Weight:
    """The layer's weight, with its magnitudes unpacked once: they are a 64th of it."""
    packed, state = layer.weight.data, layer.weight.quant_state
    known = vars(layer).get("_as_nf4")
    if known is None or known.packed.data_ptr() != packed.data_ptr():
        magnitudes = state.absmax
        if state.nested:
            inner = state.state2
            magnitudes = dense_absmax(state.absmax, inner.code, inner.absmax, state.offset, inner.blocksize)
        known = NF4Weight(packed, magnitudes, tuple(state.shape), code=state.code, blocksize=state.blocksize)
        vars(layer)["_as_nf4"] = known
    return known
