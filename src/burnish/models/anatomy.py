"""Where the parts of a causal language model are, and a proof that they were read right.

Training needs a model in two pieces: the backbone, which turns tokens into last hidden states, and the head, which turns those into
logits, with whatever the family does to them afterwards (soft cap, scale). The pieces are found by transformers' own names, and then
`probe` runs the model on a dozen tokens to see that

    head(backbone(tokens))      equals      the model's own logits
    backbone(packed segments)   equals      backbone(each segment)
    one segment's tokens        leave       the other segments' hidden states as they were

What does not hold is not used: such a model is computed one segment at a time, or through its own logits. Slower, and still exact.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.core.errors import ModelError
from burnish.kernels.attention import Forest
from burnish.kernels.dispatch import AttentionKind
from burnish.models.context import Context
from burnish.models.forest import Packed, install, last_hidden, run, windows_as_configured

_LENGTHS = (7, 5)  # the probe's two segments
_Segment = tuple[torch.Tensor, torch.Tensor]  # ids, positions
_SEEDS = (0, 1, 2)  # a router near a tie may choose differently by rounding: one agreement of three is proof, for a leak is always there


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a model, and how they may be used.

    `whole` is the model without adapter wrappers. `head` is None where the logits cannot be had from the hidden states; `scale` and
    `softcap` are applied to what it returns, in this order. `packed` says whether several segments can be computed in one call, and
    `doubts` why something cannot be used.
    """

    whole: Any  # a PreTrainedModel; its methods are only half typed
    backbone: nn.Module
    head: nn.Module | None
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None
    packed: bool = False
    doubts: tuple[str, ...] = ()

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """What the family does to the head's output, in fp32."""
        logits = logits.float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def dissect(model: nn.Module) -> Anatomy:
    """Finds the parts by name, without running anything.

    Raises:
        ModelError: This is not a transformers model.
    """
    whole: Any = model
    if hasattr(whole, "get_base_model"):  # PEFT
        whole = whole.get_base_model()
    if not isinstance(whole, PreTrainedModel):
        raise ModelError(f"expected a transformers causal language model, found {type(whole).__name__}")
    known: Any = whole
    config = known.config.get_text_config(decoder=True)
    backbone: nn.Module = known.base_model
    if backbone is known:  # some families name their prefix after the multimodal model they are part of
        backbone = getattr(known, "model", known)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    factor = getattr(config, "logit_scale", None)  # Cohere
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)  # Gemma, RecurrentGemma
    return Anatomy(
        whole=known,
        backbone=backbone,
        head=known.get_output_embeddings() if backbone is not known else None,
        vocabulary=int(config.vocab_size),
        scale=(1.0 / divisor if divisor else 1.0) * (factor or 1.0),
        softcap=softcap,
    )


def probe(anatomy: Anatomy, kind: AttentionKind = "auto") -> Anatomy:
    """Runs the model on a few tokens and returns what may be used; leaves our attention in place where packing holds.

    Raises:
        ModelError: `kind` names an attention that this model cannot be computed with.
    """
    with _calm(anatomy.whole):
        own = _own_attention(anatomy.whole)
        if (anatomy.whole.config._attn_implementation or own) != own:
            anatomy.whole.set_attn_implementation(own)
        head_doubt = _doubt_head(anatomy)
        packing_doubt = _doubt_packing(anatomy, kind, own)
        if packing_doubt and anatomy.whole.config._attn_implementation != own:
            anatomy.whole.set_attn_implementation(own)
    return replace(
        anatomy,
        head=None if head_doubt else anatomy.head,
        packed=not packing_doubt,
        doubts=tuple(doubt for doubt in (head_doubt, packing_doubt) if doubt),
    )


def rehearse(anatomy: Anatomy, kind: AttentionKind = "auto") -> torch.Tensor:
    """Hidden states [T, H] of a dozen tokens in two segments, without gradients and in evaluation mode: what patching compares."""
    with _calm(anatomy.whole):
        ids, positions = _side_by_side(*_segments(anatomy, seed=0))
        packed = Packed(Forest((_LENGTHS[0], sum(_LENGTHS)), (-1, -1)), kind) if anatomy.packed else None
        return last_hidden(run(anatomy.backbone, ids, positions, packed))


def doubt_shared(anatomy: Anatomy, context: Context, kind: AttentionKind = "auto") -> str:
    """Why ranks cannot share a batch's tokens, or nothing. All ranks of a group take part, with the same weights."""
    with _calm(anatomy.whole):
        ids, positions = _side_by_side(*_segments(anatomy, seed=0))
        forest = Forest((_LENGTHS[0], sum(_LENGTHS)), (-1, -1))
        alone = _hidden(anatomy, ids, positions, Packed(forest, kind))
        share = context.share(forest)
        part = _hidden(anatomy, share.of(ids), share.of(positions), Packed(share.forest, kind, context=context))
        together = context.gather(part, len(ids))
    return "its tokens shared by several devices differ from those on one" if _off(anatomy, together, alone, 1e-3, 0.25) else ""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a model gives for a dozen tokens: hidden states [T, H], and the gradients [T, H] of its embeddings for one fixed direction."""

    hidden: torch.Tensor
    gradient: torch.Tensor


def trace(anatomy: Anatomy, kind: AttentionKind = "auto") -> Trace:
    """Runs the model on a dozen tokens, forward and backward, in evaluation mode."""
    leaves: list[torch.Tensor] = []

    def begin(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    handle = anatomy.whole.get_input_embeddings().register_forward_hook(begin)
    try:
        with _calm(anatomy.whole), torch.enable_grad():
            segments = _segments(anatomy, seed=0)
            ids, positions = _side_by_side(*segments) if anatomy.packed else segments[0]
            packed = Packed(Forest((_LENGTHS[0], sum(_LENGTHS)), (-1, -1)), kind) if anatomy.packed else None
            hidden = last_hidden(run(anatomy.backbone, ids, positions, packed))
            direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
            (gradient,) = torch.autograd.grad(hidden, leaves, direction)
    finally:
        handle.remove()
    return Trace(hidden.detach().float(), gradient.float())


def doubt_cut(anatomy: Anatomy, whole: Trace, kind: AttentionKind = "auto") -> str:
    """Why ranks cannot share the layers, which have been cut, or nothing. All ranks of a group take part.

    Args:
        anatomy: The parts of the model.
        whole: What it gave before.
        kind: How attention is computed.
    """
    try:
        found = trace(anatomy, kind)
    except Exception as error:  # whatever a model's own code raises when it is given a part of its heads
        return f"its code does not compute a part of its heads ({type(error).__name__}: {error})"
    pairs = (found.hidden, whole.hidden), (found.gradient, whole.gradient)
    if any(_off(anatomy, mine, theirs.to(mine), 1e-3, 0.25) for mine, theirs in pairs):
        return "its layers shared by several devices differ from those on one"
    return ""


def _off(anatomy: Anatomy, found: torch.Tensor, expected: torch.Tensor, full: float, half: float) -> bool:
    return not _distance(found, expected) <= _tolerance(anatomy, full, half)


def _doubt_head(anatomy: Anatomy) -> str:
    """Why the logits cannot be computed from the hidden states, or nothing."""
    if anatomy.head is None:
        return "its output head was not found"
    ids, positions = _segments(anatomy, seed=0)[0]
    truth = run(anatomy.whole, ids, positions).logits[0].float()
    ours = anatomy.finish(anatomy.head(last_hidden(run(anatomy.backbone, ids, positions))))
    # A constant added to all logits changes no probability.
    ours, truth = (x - x.mean(dim=-1, keepdim=True) for x in (ours, truth))
    return "" if _distance(ours, truth) < _tolerance(anatomy, 1e-3, 0.1) else "its logits are not its output head's"


def _own_attention(whole: Any) -> str:
    """The attention that transformers computes this model with. Its `sdpa` drops soft caps, and some releases choose it all the same."""
    own: str = whole.config._attn_implementation or "eager"
    capped = getattr(whole.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    return "eager" if own == "sdpa" and capped else own


def _doubt_packing(anatomy: Anatomy, kind: AttentionKind, own: str) -> str:
    """Why segments cannot share a call, or nothing. Installs our attention on the way."""
    if anatomy.backbone is anatomy.whole:
        return "its backbone was not found"
    doubt = ""
    try:
        for seed in _SEEDS:
            anatomy.whole.set_attn_implementation(own)
            alone = torch.cat([_hidden(anatomy, *segment) for segment in _segments(anatomy, seed)])
            install(anatomy.whole)
            doubt = _doubt_packed_run(anatomy, kind, seed, alone)
            if doubt != _DIFFERENT:
                return doubt
        return doubt
    except ModelError:  # the attention that was asked for by name cannot do this model
        raise
    except NotImplementedError as error:
        return str(error)
    except Exception as error:  # whatever a model's own code raises when it is given what it does not know
        return f"it cannot take several segments in one call ({type(error).__name__}: {error})"


_DIFFERENT = "its segments computed together differ from each one alone"


def _doubt_packed_run(anatomy: Anatomy, kind: AttentionKind, seed: int, alone: torch.Tensor) -> str:
    windows: list[int | None] = []
    ends = (_LENGTHS[0], sum(_LENGTHS))
    packed = Packed(Forest(ends, (-1, -1)), kind, windows)
    first, second = _segments(anatomy, seed)
    together = _hidden(anatomy, *_side_by_side(first, second), packed)
    if not windows:
        return "its attention layers are not told about the segments"
    if not windows_as_configured(anatomy.whole.config.get_text_config(decoder=True), windows):
        return "its layers do not all attend as its config says"
    if _distance(together, alone) > _tolerance(anatomy, 1e-3, 0.25):
        return _DIFFERENT
    other, _ = _segments(anatomy, seed + 1)  # the second segment beside another first one
    beside = _hidden(anatomy, *_side_by_side(other, second), packed)[ends[0] :]
    if _distance(beside, together[ends[0] :]) > _tolerance(anatomy, 1e-4, 0.03):
        return "its layers carry information from one segment into the next"
    return ""


def _hidden(anatomy: Anatomy, ids: torch.Tensor, positions: torch.Tensor, packed: Packed | None = None) -> torch.Tensor:
    return last_hidden(run(anatomy.backbone, ids, positions, packed)).float()


def _side_by_side(first: _Segment, second: _Segment) -> _Segment:
    return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]))


def _segments(anatomy: Anatomy, seed: int) -> list[_Segment]:
    """Two short segments of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    device = next(anatomy.whole.parameters()).device
    return [(torch.randint(anatomy.vocabulary, (n,), generator=generator).to(device), torch.arange(n, device=device)) for n in _LENGTHS]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the expected values' root mean square."""
    return float((found - expected).abs().max() / expected.square().mean().sqrt().clamp_min(1e-30))


def _tolerance(anatomy: Anatomy, full: float, half: float) -> float:
    return half if half_type(anatomy.whole) else full


def half_type(model: nn.Module) -> torch.dtype | None:
    """The half precision type among the weights; quantised weights (integers) compute in one, too."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    if torch.float16 in kinds:
        return torch.float16
    return torch.bfloat16 if any(kind.itemsize < 4 for kind in kinds) else None


@contextmanager
def alone(model: nn.Module) -> Generator[None]:
    """One CPU thread for a dozen tokens of a small model: that takes less time than threads take to meet, above all on a busy machine."""
    threads = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_SMALL = 1 << 29
"""Weights up to which one thread reads them as fast as it is wanted."""


@contextmanager
def _calm(model: nn.Module) -> Generator[None]:
    """Evaluation without gradients; mixed weights (a half precision base, fp32 adapters) meet under autocast. Modes are put back."""
    modules: list[nn.Module] = list(model.modules())
    training = [module.training for module in modules]
    half, device = half_type(model), next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
