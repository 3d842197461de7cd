"""The contracts of the data path: what a row means (Conversation, Pair, Text ...) and what a model is given (Example, Batch).

Data flows one way:

    row -> format -> Conversation | Completion | Text | Tokens | Pair | Judged | Stepwise -> render -> Example -> loader -> Batch

Shapes: T tokens of a batch, K predictions that are trained, N segments, B branches, E examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # formats and sources must stay importable without torch
    import numpy as np
    import torch

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the assistant makes. `arguments` is the decoded JSON object."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `train` decides about this message alone: None leaves it to `data.train_on`, False masks it, True trains it, and a number trains it
    with that weight (0 masks).
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | float | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with the tools that the assistant may call (JSON schemas, as the row gave them)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion as plain strings: no template, the completion (and the end token) is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text for continued pre-training: every token is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row that is tokenised already. `labels` is -100 where not trained (the field's convention), unshifted; None trains all."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None


Answer = Conversation | Completion
"""A prompt with one answer: the messages of the prompt have `train=False`, those that answer have `train=None`."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same prompt, one of which is preferred.

    `margin` says by how much (for reward models, 2307.09288 section 3.2.2), `weight` how much the pair counts in the loss.
    """

    chosen: Answer
    rejected: Answer
    margin: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer and whether it is a good one. `weight` is how much it counts in the loss."""

    answer: Answer
    label: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Stepwise:
    """A solution in steps, each of them right (1) or wrong (0), for process reward models."""

    prompt: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]


Item = Conversation | Completion | Text | Tokens | Pair | Judged | Stepwise
"""What a format makes of one row."""

BatchKind = Literal["tokens", "pairs", "judged", "steps"]
"""What an objective compares: trained tokens, the two answers of a pair, judged answers, or the steps of a solution."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example: a line of tokens, or a small tree of segments.

    `weights[i]` is the training weight of token i as something to be *predicted* (from the tokens before it): 0 is masked, 1 is trained.
    The first token of a root has no effect: nothing comes before it.

    A preference pair is its shared prompt with two children, `ends` = (end of the prompt, of chosen, of rejected) and `parents` =
    (-1, 0, 0); where the answers share nothing, two roots. A segment with trained tokens is a *branch*.
    """

    input_ids: np.ndarray  # int32 [L]
    weights: np.ndarray  # float32 [L]
    ends: tuple[int, ...] = ()  # of its segments, the last one L; empty: the whole example is one root
    parents: tuple[int, ...] = ()  # of each segment, by number within the example; -1 is a root
    values: tuple[float, ...] = ()  # what the row says beside its text: the margin of a pair, the label of an answer or of each step
    weight: float | None = None  # what the example counts in the loss; None: the sum of its token weights
    reference: np.ndarray | None = None  # float32 [K]: the reference model's log-probability of each trained token


@dataclass(slots=True)
class Batch:
    """A micro-batch: a flat, never padded forest of segments.

    Segment i covers tokens `doc_ends[i-1]..doc_ends[i]` and attends causally to itself and fully to its parent's chain; `parents[i] == -1`
    marks a root. Packing is a forest of roots; a preference pair is a prompt with two children.

    Predictions stand apart from tokens: prediction k is made at token `rows[k]` and its truth is `targets[k]`. So the last token of
    a shared prompt can predict the first token of each of its children, and nobody searches for trained positions on the device.

    `weight` is what the loss of this micro-batch sums over (for SFT: the sum of `token_weights`; for pairs: how many there are);
    `step_weight` is the same over all micro-batches of the optimiser step on all ranks, known to the loader in advance. The engine divides
    by it, nobody else does.

    Where examples have branches (`branches` is not empty), the predictions of one branch stand together, in the order of the branches:
    chosen and rejected of the first pair, then of the second. `extras` then holds

        lengths    int64 [B]     trained predictions of each branch, as in `branches`
        ends       int64 [B]     the last token of each branch
        values     float32 [V]   the examples' values one after another: [E] margins or labels, [B] labels of steps
        weights    float32 [E]   what each example counts in the loss
        reference  float32 [K]   the reference model's log-probabilities, where they are known already

    A *mismatched* answer (KTO) is the answer of another example, put under the prompt as a second branch: then branches alternate, own
    answer and mismatched one, and `reference` covers the own answers alone.
    """

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    doc_ends: tuple[int, ...]  # N
    parents: tuple[int, ...]  # N
    rows: torch.Tensor  # int64 [K]
    targets: torch.Tensor  # int64 [K]
    token_weights: torch.Tensor  # float32 [K]
    weight: float
    step_weight: float
    last: bool = True  # the last micro-batch of its optimiser step
    examples: int = 0  # examples in this micro-batch
    branches: tuple[int, ...] = ()  # B: trained predictions of each branch; empty: examples have none
    branch_segments: tuple[int, ...] = ()  # B: the segment of each branch
    values: tuple[float, ...] = ()  # V: the same as in `extras`, on the host
    step_tokens: float = 0.0  # weight of the trained tokens in the first branches of all examples of the step, on all ranks
    extras: dict[str, torch.Tensor] = field(default_factory=lambda: {})  # noqa: PIE807  # typed, where dict itself would not be

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device` (copies only where needed)."""
        import dataclasses

        moved: dict[str, Any] = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "positions", "rows", "targets", "token_weights")
        }
        moved["extras"] = {key: value.to(device, non_blocking=True) for key, value in self.extras.items()}
        return dataclasses.replace(self, **moved)


class Source(Protocol):
    """Where the loop gets its micro-batches from: a file-backed loader, or a rollout."""

    def next(self, policy: Any) -> list[Batch] | None:
        """The micro-batches of the next optimiser step on this rank, or None at the end. A loader ignores `policy`."""
        ...

    def state(self) -> dict[str, Any]:
        """A JSON-able state that `restore` takes back exactly."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`: the next step is the one that would have come next."""
        ...


@runtime_checkable
class Recut(Protocol):
    """A source that can cut its present step into other micro-batches."""

    micro_batch_tokens: int  # most tokens computed at once on this rank

    def again(self) -> list[Batch]:
        """The micro-batches of the step that `next` gave last, cut as `micro_batch_tokens` says now."""
        ...

    def halve(self, times: int) -> None:
        """Halves `micro_batch_tokens` so often."""
        ...


class Row(Protocol):
    """One raw row with its place, as sources yield it."""

    file: str
    number: int  # from 1
    fields: Mapping[str, Any]


RowIterator = Iterator[Row]
