"""The policy: a causal language model as objectives see it, over flat batches.

    batch ─ backbone (forest attention) ─▶ hidden states [T, H] ─ rows ─▶ head in chunks ─▶ TokenStats [K]

Any transformers causal LM will do, with or without a PEFT adapter. At construction a probe of a dozen tokens shows whether segments can
share a call and whether the head was understood (models/anatomy.py). Where not, the policy computes one segment at a time, or takes the
model's own logits, says so once, and gives the same numbers.

Mixture-of-experts models are trained without the router's auxiliary loss: the backbone alone is called, and transformers adds that loss
only in the whole model. With a frozen router, as under an adapter, it would have no effect.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as functional
from torch import nn

from burnish.core.errors import ConfigError, ModelError, Where
from burnish.core.log import warn
from burnish.data.types import Batch
from burnish.kernels.attention import Forest
from burnish.kernels.casts import Casts
from burnish.kernels.dispatch import AttentionKind
from burnish.kernels.divergence import HeadInputs
from burnish.kernels.linear_ce import TokenStats, default_chunk, head_stats, head_stats_module, stats_from_logits
from burnish.kernels.logit_rows import wide_dtype
from burnish.models import activations, tensor
from burnish.models.adapters import disabled, is_adapted
from burnish.models.anatomy import alone, dissect, doubt_cut, doubt_shared, half_type, probe, rehearse, trace
from burnish.models.compiled import try_compile
from burnish.models.context import Context, Group, Reach
from burnish.models.forest import Packed, install, last_hidden, run
from burnish.models.noise import EmbeddingNoise
from burnish.models.offload import offload, storages
from burnish.models.patch import KernelReport, patch
from burnish.models.score import score_of

_MEASURED = 64
"""Tokens that activations are measured on."""
_TYPICAL = 256
"""Tokens of a segment that compiled layers are tried on."""


class Shards(Protocol):
    """What a policy knows of weights that lie in shards on several ranks (satisfied by `engine.backend_fsdp.Sharding`)."""

    trained: dict[str, nn.Parameter]
    """This rank's part of each trained weight."""

    def rewriting(self) -> AbstractContextManager[None]:
        """Inside, their values may be changed."""
        ...


class Policy:
    """A model for training: statistics of targets, hidden states, a reference.

    Args:
        model: A transformers causal LM, or a PEFT model around one. Its attention is replaced in place; generation still works.
        tokenizer: Kept for whoever holds the policy.
        reference: A frozen model to compare with, for full fine-tuning. An adapter needs none: switched off, it is the reference.
        attention: How attention is computed; see kernels/dispatch.py.
        kernels: Put fast modules in the place of the model's own where they are proven to agree (models/patch.py); `report` says where.
        verify: Probe the model. Without, packing and the head are taken on trust (weights that are not there yet).

    Raises:
        ModelError: This is not a transformers causal LM.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        reference: nn.Module | None = None,
        attention: AttentionKind = "auto",
        kernels: bool = True,
        verify: bool = True,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self._attention: AttentionKind = attention
        self._reference = (
            Policy(reference, tokenizer, attention=attention, kernels=kernels, verify=verify) if reference is not None else None
        )
        self._refer = False
        self._kept: dict[str, torch.Tensor] = {}
        self._shards: Shards | None = None
        self._context: Context | None = None
        self._reach: Reach | None = None
        self._noise = EmbeddingNoise()
        self._casts = Casts()
        self._offloaded: Collection[int] | None = None
        self.recomputed: Sequence[activations.Way] | activations.Way = "keep"
        """What of each layer, or of all, is computed again in the backward pass."""
        anatomy = dissect(model)
        self.kernels = KernelReport(reason="switched off")
        if not verify:
            install(anatomy.whole)
            self.anatomy = replace(anatomy, packed=True)
            return
        with alone(model):
            self.anatomy = probe(anatomy, attention)
            if kernels:
                self.kernels = self._patch()
        self._warn()

    def token_stats(self, batch: Batch, *, want: frozenset[str] = frozenset()) -> TokenStats:
        """Statistics [K] of the batch's targets; `want` names the optional fields to fill.

        The sum of any function of them can be differentiated. Logits exist only at trained positions, a chunk at a time.
        """
        if self._refer and self._reference is not None:
            return self._reference.token_stats(batch, want=want)
        anatomy = self.anatomy
        if anatomy.head is None:
            if score_of(self.model) is not None:
                raise ModelError("a reward model has no log-probabilities, expected a model with an output head")
            return stats_from_logits(self._own_logits(batch), batch.targets, want)
        rows, targets, hidden = batch.rows, batch.targets, self.hidden(batch)
        if self._context is not None and len(targets):  # the head's work is shared, too
            places = self._context.places(len(targets), targets.device)
            rows, targets = rows[places], targets[places]
        hidden = hidden.index_select(0, rows)
        shape: dict[str, Any] = {"softcap": anatomy.softcap, "scale": anatomy.scale, "want": want}
        if _is_plain_linear(anatomy.head):
            stats = head_stats(hidden, anatomy.head.weight, targets, bias=anatomy.head.bias, **shape)
        else:
            stats = head_stats_module(hidden, anatomy.head, anatomy.vocabulary, targets, **shape)
        return stats if self._context is None or not len(targets) else self._context.stats(stats, len(batch.targets))

    def head_inputs(self, batch: Batch) -> HeadInputs:
        """Hidden states [K, H] at the batch's rows and the head, for objectives that compare whole distributions."""
        if self._refer and self._reference is not None:
            return self._reference.head_inputs(batch)
        head, vocabulary = self.anatomy.head, self.anatomy.vocabulary
        if head is None:
            logits = self._own_logits(batch)
            return HeadInputs(logits, logits.shape[-1])
        hidden = self.hidden(batch).index_select(0, batch.rows)
        shape: dict[str, Any] = {"softcap": self.anatomy.softcap, "scale": self.anatomy.scale}
        if _is_plain_linear(head):
            return HeadInputs(hidden, head.weight.shape[0], head.weight, head.bias, **shape)
        return HeadInputs(hidden, vocabulary, module=head, **shape)

    def own_rows(self, batch: Batch) -> Batch:
        """The batch with the predictions that are this rank's share of the head's work: all, where no other rank has the same batch."""
        return batch if self._context is None else self._context.own_rows(batch)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that have the same batch of what each computed of its `own_rows`; differentiable."""
        return part if self._context is None else self._context.group.gather(part[None]).sum(dim=0)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [T, H], after the final norm."""
        if self._refer and self._reference is not None:
            return self._reference.hidden(batch)
        return self._whole([last_hidden(output)[-length:] for output, length in self._run(self.anatomy.backbone, batch)], batch)

    def scores(self, batch: Batch) -> torch.Tensor:
        """The score head's outputs [B, n] at the last token of each branch (`extras["ends"]`), in fp32; see models/score.py.

        Raises:
            ModelError: The model has no score head.
        """
        head = score_of(self.model)
        if head is None:
            raise ModelError("the model has no score head, expected a reward model")
        hidden = self.hidden(batch).index_select(0, batch.extras["ends"])
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.to(wide_dtype(hidden.dtype)), *_wide(head, hidden))

    @contextmanager
    def reference(self) -> Generator[None]:
        """Inside, the policy answers as the reference model: no gradients, no dropout, the adapter off (or a copy in its place).

        Raises:
            ModelError: There is neither an adapter nor a copy.
        """
        if self._reference is None and not self._kept and not is_adapted(self.model):
            raise ModelError("a reference model is needed, expected an adapter to switch off or a frozen copy of the model")
        training = self.model.training
        self.eval()
        self._refer = True
        try:
            with torch.no_grad():
                if self._reference is not None:
                    yield
                elif self._kept:
                    with self._exchanged():
                        yield
                else:
                    with disabled(self.model):
                        yield
        finally:
            self._refer = False
            self.model.train(training)

    def keep_reference(self) -> None:
        """From now on the reference is what the trained weights are at this moment: a copy of them is kept."""
        self._kept = {name: parameter.detach().clone() for name, parameter in self.trainable().items()}

    def move_reference(self, mix: float) -> None:
        """Moves the kept reference towards the policy: `mix policy + (1 - mix) reference` (TR-DPO, 2404.09656, equations 3 and 4)."""
        for name, parameter in self.trainable().items():
            self._kept[name].lerp_(parameter.detach(), mix)

    @property
    def kept_reference(self) -> dict[str, torch.Tensor]:
        """The copy that `keep_reference` made, by parameter name; empty where there is none."""
        return self._kept

    @contextmanager
    def _exchanged(self) -> Generator[None]:
        """Inside, the trained weights have the kept values. Pointers are exchanged, nothing is copied; contents, where these are shards."""
        if self._shards is not None:
            self._exchange_contents(self._shards)
            try:
                yield
            finally:
                self._exchange_contents(self._shards)
            return
        trained = {name: parameter.data for name, parameter in self.trainable().items()}
        try:
            for name, parameter in self.trainable().items():
                parameter.data = self._kept[name]
            yield
        finally:
            for name, parameter in self.trainable().items():
                parameter.data = trained[name]

    def _exchange_contents(self, shards: Shards) -> None:
        with torch.no_grad(), shards.rewriting():
            for name, parameter in shards.trained.items():
                trained = parameter.detach().clone()
                parameter.copy_(self._kept[name])
                self._kept[name].copy_(trained)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that is trained, by its name in `model`. Tied parameters appear once. Of shards, those of this rank."""
        if self._shards is not None:
            return dict(self._shards.trained)
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def layers(self) -> list[nn.Module]:
        """The model's layers, where they are known."""
        whole = self.anatomy.whole
        return activations.layers_of(whole) if whole.supports_gradient_checkpointing else []

    @property
    def findings(self) -> tuple[bool, bool, tuple[str, ...]]:
        """What the probe of the model has shown: it can be packed, its head was understood, and why not."""
        return self.anatomy.packed, self.anatomy.head is not None, self.anatomy.doubts

    def take_findings(self, findings: tuple[bool, bool, tuple[str, ...]]) -> None:
        """Believes what the probe has shown elsewhere, where the weights are."""
        packed, understood, doubts = findings
        self.anatomy = replace(self.anatomy, packed=packed, head=self.anatomy.head if understood else None, doubts=doubts)

    def hold_shards(self, shards: Shards) -> None:
        """From now on `model` has its weights only while it computes, and `trainable` tells the parts that are here."""
        self._shards = shards
        self._casts = Casts(())  # what was asked for last time is not there between two calls

    def share_context(self, group: Group, *, verify: bool = True) -> None:
        """From now on each rank of a group computes its part of the tokens of every micro-batch, the same one on all (models/context.py).

        What the policy returns is that of the whole batch, on every rank. Gradients are those of the sum of all ranks' losses.

        Args:
            group: The ranks.
            verify: Compute a dozen tokens together and alone, and compare. All ranks then have the same weights.

        Raises:
            ConfigError: the model cannot be computed in parts.
        """
        context = Context(group)
        with alone(self.model):
            doubt = self.anatomy.doubts[-1] if not self.anatomy.packed else ""
            if verify and not doubt:
                doubt = doubt_shared(self.anatomy, context, self._attention)
        if doubt:
            name, where = type(self.anatomy.whole).__name__, Where(field="parallel.context")
            raise ConfigError(f"the tokens of {name} cannot be shared: {doubt}", where=where, hint="leave parallel.context out")
        self._context, self._reach = context, Reach(self.anatomy.whole)
        if self._reference is not None:
            self._reference.share_context(group, verify=verify)

    def share_layers(self, group: tensor.Group, device: torch.device, *, kernels: bool = False) -> tensor.Cuts:
        """From now on each rank of a group has its part of the weights of every layer (models/tensor.py).

        Args:
            group: The ranks. All have the same weights.
            device: Where the model goes when it is cut.
            kernels: Put fast modules in the place of the model's own, as at construction, where it was too early for it.

        Raises:
            ConfigError: the layers cannot be shared.
        """
        with alone(self.model):
            whole = trace(self.anatomy, self._attention)
            cuts = tensor.cut(self.model, self.anatomy, group)
            self.model.to(device)
            self._casts = Casts()
            doubt = doubt_cut(self.anatomy, whole, self._attention)
            if group.total(torch.tensor([1.0 if doubt else 0.0], device=device)) > 0:  # what one rank doubts by rounding, all do
                name, where = type(self.anatomy.whole).__name__, Where(field="parallel.tensor")
                found = doubt or "another device has found that they differ from those on one"
                raise ConfigError(f"the layers of {name} cannot be shared: {found}", where=where, hint="leave parallel.tensor out")
            if kernels:
                self.kernels = self._patch()
        return cuts

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> Policy:
        """Switches dropout, noise and activation checkpointing on (they act in training only)."""
        self.model.train(mode)
        if self._reference is not None:
            self._reference.eval()
        return self

    def eval(self) -> Policy:
        """Switches them off."""
        return self.train(False)

    def noise(self, alpha: float) -> None:
        """NEFTune (2310.05914): while training, uniform noise of size alpha / sqrt(L d) on the embeddings, L a segment's length.

        Args:
            alpha: 5 to 15 in the paper; 0 takes the noise away.
        """
        self._noise.attach(self.anatomy.whole.get_input_embeddings(), alpha)

    def checkpoint_activations(self, on: bool = True, *, tile: int | None = None, offloaded: bool = False) -> None:
        """Recompute each layer's activations in the backward pass instead of storing them. Works with frozen embeddings.

        Args:
            on: Whether.
            tile: Compute feed-forwards in pieces of this many tokens (see models/activations.py).
            offloaded: Keep the layers' inputs in the host's memory (see models/offload.py).

        Raises:
            ModelError: The model's code has no checkpointing.
        """
        self.recompute("layer" if on else "keep", tile=tile)
        self._offloaded = storages(self.model) if offloaded else None

    def recompute(self, ways: Sequence[activations.Way] | activations.Way, *, tile: int | None = None) -> None:
        """Sets what each layer recomputes, or all of them; see `activations.apply`."""
        activations.apply(self.anatomy.whole, ways, tile=tile)
        self.recomputed = ways

    def fit_activations(self, tokens: int, budget: float, *, tile: int | None = None) -> str:
        """Recompute as little as fits, by measurement; see models/activations.py.

        Args:
            tokens: Tokens computed at once.
            budget: Bytes that activations may take.
            tile: As in `checkpoint_activations`.

        Returns:
            What was decided, in one line. Nothing is recomputed where the model does not let itself be measured.
        """
        whole = self.anatomy.whole
        if not (self.anatomy.packed and whole.supports_gradient_checkpointing and activations.layers_of(whole)):
            return "activations: all kept"
        ids = torch.arange(_MEASURED, device=self.device) % self.anatomy.vocabulary
        packed = Packed(Forest((_MEASURED // 2, _MEASURED), (-1, -1)), self._attention)

        def rehearsal() -> Any:
            return run(self.anatomy.backbone, ids, ids % (_MEASURED // 2), packed)

        self.recompute("keep", tile=tile)
        with alone(self.model):
            needed = tokens * activations.kept_bytes(whole, rehearsal, _MEASURED)
            if needed <= budget:
                return activations.describe([], tokens, needed, budget)
            costs = activations.measure(whole, rehearsal, _MEASURED)
        ways = activations.plan(costs, tokens, budget)
        self.recompute(ways, tile=tile)
        return activations.describe(ways, tokens, tokens * costs.total(ways), budget)

    def compile_layers(self, tokens: int) -> str:
        """Compiles the layers where that is faster for `tokens` tokens at once, and agrees; see models/compiled.py. Returns one line."""
        whole = self.anatomy.whole
        if not (self.anatomy.packed and whole.supports_gradient_checkpointing and activations.layers_of(whole)):
            return "compile: not used, the layers of this model are not known"
        ids = torch.arange(tokens, device=self.device) % self.anatomy.vocabulary
        ends = tuple(dict.fromkeys((*range(_TYPICAL, tokens, _TYPICAL), tokens)))
        packed = Packed(Forest(ends, (-1,) * len(ends)), self._attention)
        self.train()
        trial = try_compile(whole, lambda: last_hidden(run(self.anatomy.backbone, ids, ids % _TYPICAL, packed)))
        return trial.line()

    def head_bytes(self) -> float:
        """What the head holds at once: a chunk of logits and of their gradients, in float32."""
        if score_of(self.model) is not None:
            return 0.0
        vocabulary = self.anatomy.vocabulary
        return 8.0 * vocabulary * default_chunk(vocabulary, self.device)

    def _run(self, module: nn.Module, batch: Batch, **options: Any) -> Iterator[tuple[Any, int]]:
        """Calls `module` on the batch: (output, new tokens at its end), once for all segments or once for each with its chain."""
        forest = Forest(batch.doc_ends, batch.parents)
        if self._context is not None and self._reach is not None:
            share = self._context.share(forest)
            part = Packed(share.forest, self._attention, context=self._context)
            noise = self._noise.over(share.forest, batch.input_ids.device)
            with self._reach.over(batch.positions), noise, self._moving(), self._casts.at_once():
                self._noise.only([slice(share.start, share.stop)])
                yield run(module, share.of(batch.input_ids), share.of(batch.positions), part, **options), share.stop - share.start
            return
        with self._noise.over(forest, batch.input_ids.device), self._moving(), self._casts.at_once():
            if self.anatomy.packed:
                yield run(module, batch.input_ids, batch.positions, Packed(forest, self._attention), **options), forest.doc_ends[-1]
                return
            for segment, length in enumerate(forest.lengths):
                chain = [forest.rows(link) for link in forest.chain(segment)]
                ids, positions = (torch.cat([x[rows] for rows in chain]) for x in (batch.input_ids, batch.positions))
                self._noise.only(chain)
                yield run(module, ids, positions, **options), length

    def _moving(self) -> AbstractContextManager[None]:
        """Where kept activations go while the model runs."""
        return nullcontext() if self._offloaded is None else offload(self.device, self._offloaded)

    def _own_logits(self, batch: Batch) -> torch.Tensor:
        """[K, V] at the trained positions, from the whole model: for heads that we do not understand."""
        logits = self._whole([output.logits[0, -length:] for output, length in self._run(self.anatomy.whole, batch)], batch)
        return logits.index_select(0, batch.rows)

    def _whole(self, parts: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """[T, ...] of the segments' parts, or of the ranks'."""
        return torch.cat(parts) if self._context is None else self._context.gather(parts[0], batch.doc_ends[-1])

    def _patch(self) -> KernelReport:
        return patch(self.anatomy.whole, lambda: rehearse(self.anatomy, self._attention), half_type(self.anatomy.whole))

    def _warn(self) -> None:
        name = type(self.anatomy.whole).__name__
        if not self.anatomy.packed:
            warn(f"{name} is computed one segment at a time, exact but slower: {self.anatomy.doubts[-1]}")
        if self.anatomy.head is None and score_of(self.model) is None:
            warn(f"{name} is trained through its own full logits, exact but with more memory: {self.anatomy.doubts[0]}")
        if getattr(self.anatomy.whole.config, "output_router_logits", False):
            warn(f"{name} asks for the router's auxiliary loss (output_router_logits), which is not part of this objective")


def _wide(head: nn.Linear, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a score head in fp32, or fp64 where the hidden states are that."""
    dtype, bias = wide_dtype(hidden.dtype), cast("torch.Tensor | None", head.bias)
    return head.weight.to(dtype), None if bias is None else bias.to(dtype)


def _is_plain_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the head is its weight and bias and nothing else: no adapter, no quantisation, no hooks."""
    changed = vars(head).get("_forward_hooks") or vars(head).get("_forward_pre_hooks") or "forward" in vars(head)
    return type(head) is nn.Linear and not changed
