"""The checks that look at several keys of a run file at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from burnish.config.base import Strict
from burnish.config.objectives import CPO, DPO, Distill, Plugin
from burnish.config.run import RunConfig
from burnish.config.sections import Data, Optimizer, Schedule, Source


@dataclass(frozen=True, slots=True)
class Check:
    """A condition on several keys: called with a run, it returns what contradicts what as a sentence, or None.

    Attributes:
        keys: The keys it speaks of, the one to point at first.
        condition: The function itself.
    """

    keys: tuple[str, ...]
    condition: Callable[[RunConfig], str | None]

    def __call__(self, run: RunConfig) -> str | None:
        """What contradicts what, or None."""
        return self.condition(run)


def _check(*keys: str) -> Callable[[Callable[[RunConfig], str | None]], Check]:
    return lambda condition: Check(keys, condition)


def _changed(section: Strict, *keys: str) -> list[str]:
    """Those of the keys whose value is not the default."""
    fields = type(section).model_fields
    return [key for key in keys if getattr(section, key) != fields[key].default]


@_check("train.epochs", "train.steps", "train.tokens")
def one_length(run: RunConfig) -> str | None:
    """The length of a run is given once."""
    given = [key for key in ("epochs", "steps", "tokens") if getattr(run.train, key) is not None]
    return f"{_and(given)} of train exclude each other; give one of them" if len(given) > 1 else None


@_check("train.batch_tokens", "train.batch_size")
def one_batch_size(run: RunConfig) -> str | None:
    """The size of a step is given once."""
    both = run.train.batch_size is not None and run.train.batch_tokens is not None
    return "batch_size and batch_tokens of train exclude each other; give one of them" if both else None


@_check("train.batch_tokens", "data.max_length")
def longest_example_fits(run: RunConfig) -> str | None:
    """An example of full length fits into a step."""
    tokens = run.train.batch_tokens
    if tokens is None or tokens >= run.data.max_length:
        return None
    return f"train.batch_tokens is {tokens}, which does not hold one example of data.max_length = {run.data.max_length} tokens"


@_check("model.quantize", "adapter")
def quantized_needs_adapter(run: RunConfig) -> str | None:
    """Quantised weights cannot be trained."""
    if run.model.quantize == "none" or run.adapter is not None:
        return None
    return f"model.quantize: {run.model.quantize} freezes the base weights, so it needs an adapter to train, e.g. adapter: lora"


@_check("adapter.init", "model.quantize")
def init_needs_full_weights(run: RunConfig) -> str | None:
    """PiSSA decomposes the base weights themselves."""
    if run.adapter is None or run.adapter.init != "pissa" or run.model.quantize == "none":
        return None
    return f"adapter.init: pissa decomposes the base weights, which model.quantize: {run.model.quantize} does not keep"


@_check("model.quantize", "adapter.dora", "adapter.init")
def fp8_is_read_by_nobody_else(run: RunConfig) -> str | None:
    """DoRA's norms, PiSSA and OLoRA read the base weights, and PEFT does not know ours."""
    adapter = run.adapter
    if run.model.quantize != "fp8" or adapter is None or not (adapter.dora or adapter.init in ("pissa", "olora")):
        return None
    what = "adapter.dora" if adapter.dora else f"adapter.init: {adapter.init}"
    return f"{what} reads the base weights, which model.quantize: fp8 does not let it; write model.quantize: nf4, or leave it out"


@_check("adapter.path", "adapter")
def saved_adapter_keeps_its_shape(run: RunConfig) -> str | None:
    """A saved adapter brings its own rank, alpha and targets."""
    if run.adapter is None or run.adapter.path is None:
        return None
    extra = _changed(run.adapter, "rank", "alpha", "targets", "save_modules", "rslora", "dora", "init")
    return f"adapter.path goes on from a saved adapter, which brings its own {_and(extra)}; leave {_them(extra)} out" if extra else None


@_check("train.optimizer.in_backward", "train.clip")
def update_in_backward_knows_no_norm(run: RunConfig) -> str | None:
    """The global gradient norm is known only when the last weight would be updated already."""
    if not run.train.optimizer.in_backward or run.train.clip is None:
        return None
    return "train.optimizer.in_backward updates weights before the norm of all gradients is known; write train.clip: null"


@_check("train.optimizer.in_backward", "train.precision")
def update_in_backward_knows_no_overflow(run: RunConfig) -> str | None:
    """Loss scaling looks at all gradients before the update."""
    if not run.train.optimizer.in_backward or run.train.precision != "float16":
        return None
    return "train.optimizer.in_backward updates weights before float16 gradients are searched for overflow; take another train.precision"


@_check("train.offload_activations", "train.checkpoint_activations")
def offloading_recomputes(run: RunConfig) -> str | None:
    """What is offloaded is what recomputed layers begin with."""
    contradiction = run.train.offload_activations and run.train.checkpoint_activations == "off"
    return (
        "train.offload_activations keeps only what layers begin with, so it needs train.checkpoint_activations: on"
        if contradiction
        else None
    )


@_check("train.lora_plus_ratio", "adapter")
def lora_plus_needs_adapter(run: RunConfig) -> str | None:
    """LoRA+ is about the adapter's two matrices."""
    missing = run.train.lora_plus_ratio is not None and run.adapter is None
    return "train.lora_plus_ratio sets the rate of an adapter's matrices, but there is no adapter" if missing else None


@_check("data.streaming", "train.steps", "train.tokens")
def stream_needs_length(run: RunConfig) -> str | None:
    """Nobody knows how long an epoch of a stream is."""
    if not run.data.streaming or run.train.steps or run.train.tokens:
        return None
    return "data.streaming does not know how long an epoch is; give train.steps or train.tokens instead of epochs"


@_check("data.eval", "data.streaming")
def stream_cannot_be_split(run: RunConfig) -> str | None:
    """A share of a stream cannot be held out."""
    share = run.data.streaming and isinstance(run.data.eval, float)
    return f"data.eval: {run.data.eval} is a share of rows that data.streaming cannot count; name a data set for it" if share else None


@_check("data.eval", "data.train")
def share_holds_a_row(run: RunConfig) -> str | None:
    """Where every source has a limit, it is known already that a share of it is less than half a row."""
    share, limits = run.data.eval, [source.limit for source in run.data.train]
    if not isinstance(share, float) or run.data.mix == "oversample" or None in limits:
        return None
    rows = sum(limit or 0 for limit in limits)
    return f"data.eval: {share:g} of at most {rows} rows holds out none" if int(share * rows + 0.5) < 1 else None


@_check("data.train", "data.eval")
def sample_needs_limit(run: RunConfig) -> str | None:
    """A sample has a size."""
    lost = [source.path for source in sources(run.data) if source.sample and source.limit is None]
    return f"sample: true of '{lost[0]}' needs limit, the number of rows to take" if lost else None


@_check("evaluation.patience", "data.eval", "evaluation.every")
def patience_needs_evaluation(run: RunConfig) -> str | None:
    """Early stopping looks at the eval loss."""
    if run.evaluation.patience is None:
        return None
    if run.data.eval is None:
        return "evaluation.patience stops early by the eval loss, so it needs data.eval"
    return None if run.evaluation.every else "evaluation.patience counts evaluations, but evaluation.every: null makes none"


@_check("parallel.shards", "parallel.reshard", "parallel.offload", "parallel.strategy")
def strategy_uses_its_keys(run: RunConfig) -> str | None:
    """No key of a strategy is ignored in silence."""
    strategy = run.parallel.strategy
    known: dict[str, tuple[str, ...]] = {"none": (), "ddp": (), "zero1": ("offload",), "zero2": ("offload",)}
    known["hsdp"] = ("shards", "reshard", "offload")
    ignored = [key for key in _changed(run.parallel, *known["hsdp"]) if key not in known.get(strategy, ("reshard", "offload"))]
    return f"parallel.strategy: {strategy} has no {_and(ignored)}; leave {_them(ignored)} out" if ignored else None


@_check("train.deterministic", "train.compile")
def measuring_is_not_deterministic(run: RunConfig) -> str | None:
    """What a clock decides may differ the next time."""
    measured = run.train.deterministic and run.train.compile == "auto"
    return (
        "train.compile: auto keeps what is measured to be faster, which train.deterministic cannot repeat; leave one out"
        if measured
        else None
    )


@_check("parallel.strategy", "train.optimizer", "train.compile", "train.offload_activations", "adapter.init")
def shards_can_be_trained(run: RunConfig) -> str | None:
    """Some things need whole weights."""
    why = unshardable(run) if run.parallel.strategy not in ("auto", "none", "ddp") else None
    return f"parallel.strategy: {run.parallel.strategy} cuts weights into shards, and {why}" if why else None


@_check("parallel.context", "parallel.processes")
def context_divides_processes(run: RunConfig) -> str | None:
    """Devices that share tokens come in groups of one size."""
    context, processes = run.parallel.context, run.parallel.processes
    if processes == "auto" or processes % context == 0:
        return None
    known = [str(size) for size in range(1, processes + 1) if processes % size == 0]
    return f"parallel.context: {context} does not divide parallel.processes: {processes}; take one of {', '.join(known)}"


@_check("parallel.context", "parallel.strategy", "train.compile")
def tokens_can_be_shared(run: RunConfig) -> str | None:
    """Some things know one device only."""
    if run.parallel.context == 1:
        return None
    if run.parallel.strategy == "none":
        return "parallel.strategy: none means one process, and parallel.context shares examples between several; leave one of them out"
    if run.train.compile == "auto":
        return "parallel.context exchanges tokens within layers, where train.compile is not tried; leave train.compile out"
    return None


def unshardable(run: RunConfig) -> str | None:
    """What in a run needs whole weights, as the end of a sentence; None where nothing does."""
    train = run.train
    if train.optimizer.in_backward:
        return "train.optimizer.in_backward updates weights before their gradients have met; set it to false"
    if train.optimizer.kind not in ELEMENTWISE:
        return f"train.optimizer: {train.optimizer.kind} looks at more than single elements; take one of {', '.join(ELEMENTWISE)}"
    if train.compile == "auto":
        return "train.compile is not tried there; leave it out"
    if train.offload_activations:
        return "train.offload_activations does not know them; leave it out"
    if run.adapter is not None and run.adapter.init in ("pissa", "olora"):
        return f"adapter.init: {run.adapter.init} takes a part out of whole weights; take another one"
    return None


ELEMENTWISE = ("adamw", "lion", "sgd", "adamw_schedule_free")
"""Optimisers whose update of one element depends on no other, so that a part of a weight is updated as in the whole."""


@_check("train.optimizer", "train.optimizer.betas", "train.optimizer.eps", "train.optimizer.momentum")
def optimizer_uses_its_keys(run: RunConfig) -> str | None:
    """No key of the optimiser is ignored in silence."""
    optimizer = run.train.optimizer
    ignored = [key for key in _changed(optimizer, "betas", "eps", "momentum") if key not in _used_by(optimizer)]
    return f"the optimizer {optimizer.kind} has no {_and(ignored)}; leave {_them(ignored)} out" if ignored else None


@_check("train.schedule", "train.schedule.decay", "train.schedule.power", "train.schedule.floor")
def schedule_uses_its_keys(run: RunConfig) -> str | None:
    """No key of the schedule is ignored in silence."""
    schedule = run.train.schedule
    ignored = [key for key in _changed(schedule, "decay", "power", "floor") if key in _unused_by(schedule)]
    return f"the schedule {schedule.kind} has no {_and(ignored)}; leave {_them(ignored)} out" if ignored else None


@_check("train.schedule", "train.schedule.kind", "train.schedule.floor", "train.optimizer")
def schedule_free_has_no_curve(run: RunConfig) -> str | None:
    """A schedule-free optimiser averages instead of decaying. Cosine is what a saved run file spells out where nothing was asked for."""
    schedule, optimizer = run.train.schedule, run.train.optimizer.kind
    curved = schedule.kind not in ("constant", Schedule().kind) or schedule.floor
    if not curved or not optimizer.endswith("schedule_free"):
        return None
    return f"{optimizer} averages the weights instead of lowering the rate; of train.schedule it takes the warmup alone, leave the rest out"


@_check("train.rates")
def rates_say_something(run: RunConfig) -> str | None:
    """A group of rates sets at least one."""
    empty = [group.match for group in run.train.rates if group.learning_rate is None and group.weight_decay is None]
    return f"the group '{empty[0]}' of train.rates sets neither learning_rate nor weight_decay" if empty else None


@_check("output", "model.path", "data.train", "data.eval")
def output_is_its_own(run: RunConfig) -> str | None:
    """A run does not write over what it reads."""
    inputs = {run.model.path: "the model", **{source.path: "a data set" for source in sources(run.data)}}
    if run.adapter is not None and run.adapter.path is not None:
        inputs[run.adapter.path] = "the adapter to start from"
    return f"output is also {inputs[run.output]}; a run needs a folder of its own" if run.output in inputs else None


@_check("data.overlong", "objective")
def answers_stay_whole(run: RunConfig) -> str | None:
    """Half an answer is not what was judged."""
    if _batch(run) == "tokens" or run.data.overlong != "split":
        return None
    return f"data.overlong: split cuts answers that {run.objective.kind} compares whole; write truncate, drop or error"


@_check("data.train_on", "data.train_on_prompt", "objective")
def prompts_are_not_compared(run: RunConfig) -> str | None:
    """The prompt is what both answers have in common."""
    asked = "train_on: all" if run.data.train_on == "all" else "train_on_prompt: true" if run.data.train_on_prompt else None
    return f"{run.objective.kind} compares answers, so data.{asked} means nothing to it" if asked and _batch(run) != "tokens" else None


@_check("objective.reference", "adapter", "data.streaming", "objective")
def reference_can_be_had(run: RunConfig) -> str | None:
    """Each kind of reference needs something."""
    kind, sync = getattr(run.objective, "reference", "auto"), getattr(run.objective, "sync", None)
    if kind == "adapter_off" and run.adapter is None:
        return "objective.reference: adapter_off needs an adapter; write precomputed or copy"
    if kind == "adapter_off" and run.adapter is not None and run.adapter.path is not None:
        return "objective.reference: adapter_off would be the model without adapter.path, which the run starts from; leave it out"
    if kind == "precomputed" and not isinstance(run.objective, Plugin) and run.objective.mismatched:
        return "objective.reference: precomputed cannot be had for kto, which asks about answers under other prompts; leave it out"
    if kind == "precomputed" and run.data.streaming:
        return "objective.reference: precomputed looks at every row before the run, which data.streaming does not let it"
    if sync is not None and kind in ("adapter_off", "precomputed"):
        return f"objective.sync moves the reference, which objective.reference: {kind} cannot follow; write copy, or leave it out"
    return None


@_check("parallel.processes", "parallel.strategy")
def one_process_is_one(run: RunConfig) -> str | None:
    """A strategy for one process has one."""
    processes = run.parallel.processes
    if run.parallel.strategy != "none" or processes in ("auto", 1):
        return None
    return f"parallel.strategy: none means one process, parallel.processes is {processes}; leave one of them out"


@_check("parallel.restarts", "resume")
def restarts_go_on(run: RunConfig) -> str | None:
    """A second start finds what the first has saved."""
    if not run.parallel.restarts or run.resume != "never":
        return None
    return "parallel.restarts goes on from the last checkpoint, which resume: never refuses; leave one of them out"


@_check("objective.sync.mix", "adapter", "objective.sync", "objective")
def matrices_do_not_mix(run: RunConfig) -> str | None:
    """A mix of two adapters' matrices is not the adapter of the mixed weights."""
    sync = getattr(run.objective, "sync", None)
    if sync is None or sync.mix == 1 or run.adapter is None:
        return None
    return "objective.sync.mix below 1 mixes weights, which an adapter's two matrices do not do; write mix: 1, or leave the adapter out"


@_check("objective.sync.every", "data.streaming", "objective.sync", "objective")
def stream_counts_no_epochs(run: RunConfig) -> str | None:
    """Nobody knows how long an epoch of a stream is."""
    sync = getattr(run.objective, "sync", None)
    if sync is None or sync.every.unit != "ep" or not run.data.streaming:
        return None
    return f"objective.sync.every: {sync.every} counts epochs, whose length data.streaming does not know; write it in st or tok"


@_check("objective.loss_weights", "objective.loss", "objective")
def every_loss_has_a_weight(run: RunConfig) -> str | None:
    """One weight for each loss."""
    if not isinstance(run.objective, DPO) or run.objective.loss_weights is None:
        return None
    losses, weights = len(run.objective.loss), len(run.objective.loss_weights)
    if losses == weights:
        return None
    count = f"{weights} number{'s' if weights > 1 else ''} for {losses} loss{'es' if losses > 1 else ''}"
    return f"objective.loss_weights has {count}; give one for each"


@_check("objective.label_smoothing", "objective.loss", "objective")
def exo_needs_smoothing(run: RunConfig) -> str | None:
    """EXO compares with a distribution that is not one-sided."""
    if not isinstance(run.objective, DPO) or "exo_pair" not in run.objective.loss or run.objective.label_smoothing:
        return None
    return "the loss exo_pair needs objective.label_smoothing above 0, e.g. 0.001"


@_check("objective.wpo", "objective.loss", "objective")
def sorted_pairs_have_no_weight(run: RunConfig) -> str | None:
    """AOT pairs each answer with one of another row, so no pair's weight belongs to its loss."""
    aot = isinstance(run.objective, DPO) and run.objective.wpo and {"aot", "aot_unpaired"} & set(run.objective.loss)
    return "objective.wpo weighs pairs, which the aot losses take apart; leave one of them out" if aot else None


@_check("objective", "objective.label_smoothing", "objective.divergence", "objective.alpha", "objective.discopop_tau", "objective.mix")
def objective_uses_its_keys(run: RunConfig) -> str | None:
    """No key of the objective is ignored in silence."""
    objective = run.objective
    match objective:
        case DPO():
            used = {key for key, losses in _USED_BY.items() if losses & set(objective.loss)}
            used |= {"alpha"} if objective.divergence == "alpha" else set()
            ignored = [key for key in _changed(objective, *_USED_BY, "alpha") if key not in used]
            name = f"the losses {_and(list(objective.loss))}" if len(objective.loss) > 1 else f"the loss {objective.loss[0]}"
        case CPO():
            ignored, name = _changed(objective, "label_smoothing") if objective.loss != "sigmoid" else [], f"the loss {objective.loss}"
        case Distill():
            ignored, name = _changed(objective, "mix") if objective.divergence != "js" else [], f"the divergence {objective.divergence}"
        case _:
            return None
    has = "have" if name.startswith("the losses") else "has"
    return f"{name} of {objective.kind} {has} no {_and(ignored)}; leave {_them(ignored)} out" if ignored else None


_USED_BY: dict[str, set[str]] = {
    "label_smoothing": {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"},
    "divergence": {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"},
    "discopop_tau": {"discopop"},
}
"""Keys of `dpo` and the losses that use them."""


def _batch(run: RunConfig) -> str:
    """What the objective compares; one of the user's own says so only when it is loaded."""
    return "tokens" if isinstance(run.objective, Plugin) else run.objective.batch


CHECKS = (
    one_length,
    one_batch_size,
    longest_example_fits,
    quantized_needs_adapter,
    init_needs_full_weights,
    saved_adapter_keeps_its_shape,
    lora_plus_needs_adapter,
    fp8_is_read_by_nobody_else,
    update_in_backward_knows_no_norm,
    update_in_backward_knows_no_overflow,
    offloading_recomputes,
    stream_needs_length,
    stream_cannot_be_split,
    share_holds_a_row,
    sample_needs_limit,
    patience_needs_evaluation,
    strategy_uses_its_keys,
    measuring_is_not_deterministic,
    shards_can_be_trained,
    context_divides_processes,
    tokens_can_be_shared,
    optimizer_uses_its_keys,
    schedule_uses_its_keys,
    schedule_free_has_no_curve,
    rates_say_something,
    output_is_its_own,
    answers_stay_whole,
    prompts_are_not_compared,
    reference_can_be_had,
    one_process_is_one,
    restarts_go_on,
    matrices_do_not_mix,
    stream_counts_no_epochs,
    every_loss_has_a_weight,
    exo_needs_smoothing,
    sorted_pairs_have_no_weight,
    objective_uses_its_keys,
)
"""All checks, in the order in which they are reported."""


def sources(data: Data) -> list[Source]:
    """All sources of a run, for training and for evaluation."""
    return [*data.train, *(data.eval if isinstance(data.eval, list) else [])]


def _used_by(optimizer: Optimizer) -> tuple[str, ...]:
    match optimizer.kind:
        case "sgd":
            return ("momentum",)
        case "lion":
            return ("betas",)
        case "muon":
            return ("betas", "eps", "momentum")
        case "adafactor":
            return ()
        case _:
            return ("betas", "eps")


def _unused_by(schedule: Schedule) -> tuple[str, ...]:
    own = {"wsd": "decay", "polynomial": "power"}.get(schedule.kind)
    flat = ("floor",) if schedule.kind == "constant" else ()
    return (*(key for key in ("decay", "power") if key != own), *flat)


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _them(words: list[str]) -> str:
    return "it" if len(words) == 1 else "them"
