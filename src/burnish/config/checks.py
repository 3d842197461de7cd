"""The checks that look at several keys of a run file at once."""

from __future__ import annotations

from burnish.config.check import changed, check, joined, them
from burnish.config.checks_parallel import (
    going_back_needs_a_checkpoint,
    groups_divide_processes,
    groups_share_out_the_processes,
    layers_can_be_shared,
    measuring_is_not_deterministic,
    one_process_is_one,
    restarts_go_on,
    shards_can_be_trained,
    strategy_uses_its_keys,
    tokens_can_be_shared,
)
from burnish.config.objectives import CPO, DPO, Distill, Plugin
from burnish.config.run import RunConfig
from burnish.config.sections import Data, Optimizer, Schedule, Source


@check("train.epochs", "train.steps", "train.tokens")
def one_length(run: RunConfig) -> str | None:
    """The length of a run is given once."""
    given = [key for key in ("epochs", "steps", "tokens") if getattr(run.train, key) is not None]
    return f"{joined(given)} of train exclude each other; give one of them" if len(given) > 1 else None


@check("train.batch_tokens", "train.batch_size")
def one_batch_size(run: RunConfig) -> str | None:
    """The size of a step is given once."""
    both = run.train.batch_size is not None and run.train.batch_tokens is not None
    return "batch_size and batch_tokens of train exclude each other; give one of them" if both else None


@check("train.batch_tokens", "data.max_length")
def longest_example_fits(run: RunConfig) -> str | None:
    """An example of full length fits into a step."""
    tokens = run.train.batch_tokens
    if tokens is None or tokens >= run.data.max_length:
        return None
    return f"train.batch_tokens is {tokens}, which does not hold one example of data.max_length = {run.data.max_length} tokens"


@check("model.quantize", "adapter")
def quantized_needs_adapter(run: RunConfig) -> str | None:
    """Quantised weights cannot be trained."""
    if run.model.quantize == "none" or run.adapter is not None:
        return None
    return f"model.quantize: {run.model.quantize} freezes the base weights, so it needs an adapter to train, e.g. adapter: lora"


@check("adapter.init", "model.quantize")
def init_needs_full_weights(run: RunConfig) -> str | None:
    """PiSSA decomposes the base weights themselves."""
    if run.adapter is None or run.adapter.init != "pissa" or run.model.quantize == "none":
        return None
    return f"adapter.init: pissa decomposes the base weights, which model.quantize: {run.model.quantize} does not keep"


@check("model.quantize", "adapter.dora", "adapter.init")
def fp8_is_read_by_nobody_else(run: RunConfig) -> str | None:
    """DoRA's norms, PiSSA and OLoRA read the base weights, and PEFT does not know ours."""
    adapter = run.adapter
    if run.model.quantize != "fp8" or adapter is None or not (adapter.dora or adapter.init in ("pissa", "olora")):
        return None
    what = "adapter.dora" if adapter.dora else f"adapter.init: {adapter.init}"
    return f"{what} reads the base weights, which model.quantize: fp8 does not let it; write model.quantize: nf4, or leave it out"


@check("adapter.path", "adapter")
def saved_adapter_keeps_its_shape(run: RunConfig) -> str | None:
    """A saved adapter brings its own rank, alpha and targets."""
    if run.adapter is None or run.adapter.path is None:
        return None
    extra = changed(run.adapter, "rank", "alpha", "targets", "save_modules", "rslora", "dora", "init")
    return f"adapter.path goes on from a saved adapter, which brings its own {joined(extra)}; leave {them(extra)} out" if extra else None


@check("train.optimizer.in_backward", "train.clip")
def update_in_backward_knows_no_norm(run: RunConfig) -> str | None:
    """The global gradient norm is known only when the last weight would be updated already."""
    if not run.train.optimizer.in_backward or run.train.clip is None:
        return None
    return "train.optimizer.in_backward updates weights before the norm of all gradients is known; write train.clip: null"


@check("train.optimizer.in_backward", "train.precision")
def update_in_backward_knows_no_overflow(run: RunConfig) -> str | None:
    """Loss scaling looks at all gradients before the update."""
    if not run.train.optimizer.in_backward or run.train.precision != "float16":
        return None
    return "train.optimizer.in_backward updates weights before float16 gradients are searched for overflow; take another train.precision"


@check("train.offload_activations", "train.checkpoint_activations")
def offloading_recomputes(run: RunConfig) -> str | None:
    """What is offloaded is what recomputed layers begin with."""
    contradiction = run.train.offload_activations and run.train.checkpoint_activations == "off"
    return (
        "train.offload_activations keeps only what layers begin with, so it needs train.checkpoint_activations: on"
        if contradiction
        else None
    )


@check("train.lora_plus_ratio", "adapter")
def lora_plus_needs_adapter(run: RunConfig) -> str | None:
    """LoRA+ is about the adapter's two matrices."""
    missing = run.train.lora_plus_ratio is not None and run.adapter is None
    return "train.lora_plus_ratio sets the rate of an adapter's matrices, but there is no adapter" if missing else None


@check("data.streaming", "train.steps", "train.tokens")
def stream_needs_length(run: RunConfig) -> str | None:
    """Nobody knows how long an epoch of a stream is."""
    if not run.data.streaming or run.train.steps or run.train.tokens:
        return None
    return "data.streaming does not know how long an epoch is; give train.steps or train.tokens instead of epochs"


@check("data.eval", "data.streaming")
def stream_cannot_be_split(run: RunConfig) -> str | None:
    """A share of a stream cannot be held out."""
    share = run.data.streaming and isinstance(run.data.eval, float)
    return f"data.eval: {run.data.eval} is a share of rows that data.streaming cannot count; name a data set for it" if share else None


@check("data.eval", "data.train")
def share_holds_a_row(run: RunConfig) -> str | None:
    """Where every source has a limit, it is known already that a share of it is less than half a row."""
    share, limits = run.data.eval, [source.limit for source in run.data.train]
    if not isinstance(share, float) or run.data.mix == "oversample" or None in limits:
        return None
    rows = sum(limit or 0 for limit in limits)
    return f"data.eval: {share:g} of at most {rows} rows holds out none" if int(share * rows + 0.5) < 1 else None


@check("data.train", "data.eval")
def sample_needs_limit(run: RunConfig) -> str | None:
    """A sample has a size."""
    lost = [source.path for source in sources(run.data) if source.sample and source.limit is None]
    return f"sample: true of '{lost[0]}' needs limit, the number of rows to take" if lost else None


@check("evaluation.patience", "data.eval", "evaluation.every")
def patience_needs_evaluation(run: RunConfig) -> str | None:
    """Early stopping looks at the eval loss."""
    if run.evaluation.patience is None:
        return None
    if run.data.eval is None:
        return "evaluation.patience stops early by the eval loss, so it needs data.eval"
    return None if run.evaluation.every else "evaluation.patience counts evaluations, but evaluation.every: null makes none"


@check("train.optimizer", "train.optimizer.betas", "train.optimizer.eps", "train.optimizer.momentum")
def optimizer_uses_its_keys(run: RunConfig) -> str | None:
    """No key of the optimiser is ignored in silence."""
    optimizer = run.train.optimizer
    ignored = [key for key in changed(optimizer, "betas", "eps", "momentum") if key not in _used_by(optimizer)]
    return f"the optimizer {optimizer.kind} has no {joined(ignored)}; leave {them(ignored)} out" if ignored else None


@check("train.schedule", "train.schedule.decay", "train.schedule.power", "train.schedule.floor")
def schedule_uses_its_keys(run: RunConfig) -> str | None:
    """No key of the schedule is ignored in silence."""
    schedule = run.train.schedule
    ignored = [key for key in changed(schedule, "decay", "power", "floor") if key in _unused_by(schedule)]
    return f"the schedule {schedule.kind} has no {joined(ignored)}; leave {them(ignored)} out" if ignored else None


@check("train.schedule", "train.schedule.kind", "train.schedule.floor", "train.optimizer")
def schedule_free_has_no_curve(run: RunConfig) -> str | None:
    """A schedule-free optimiser averages instead of decaying. Cosine is what a saved run file spells out where nothing was asked for."""
    schedule, optimizer = run.train.schedule, run.train.optimizer.kind
    curved = schedule.kind not in ("constant", Schedule().kind) or schedule.floor
    if not curved or not optimizer.endswith("schedule_free"):
        return None
    return f"{optimizer} averages the weights instead of lowering the rate; of train.schedule it takes the warmup alone, leave the rest out"


@check("train.rates")
def rates_say_something(run: RunConfig) -> str | None:
    """A group of rates sets at least one."""
    empty = [group.match for group in run.train.rates if group.learning_rate is None and group.weight_decay is None]
    return f"the group '{empty[0]}' of train.rates sets neither learning_rate nor weight_decay" if empty else None


@check("output", "model.path", "data.train", "data.eval")
def output_is_its_own(run: RunConfig) -> str | None:
    """A run does not write over what it reads."""
    inputs = {run.model.path: "the model", **{source.path: "a data set" for source in sources(run.data)}}
    if run.adapter is not None and run.adapter.path is not None:
        inputs[run.adapter.path] = "the adapter to start from"
    return f"output is also {inputs[run.output]}; a run needs a folder of its own" if run.output in inputs else None


@check("data.overlong", "objective")
def answers_stay_whole(run: RunConfig) -> str | None:
    """Half an answer is not what was judged."""
    if _batch(run) == "tokens" or run.data.overlong != "split":
        return None
    return f"data.overlong: split cuts answers that {run.objective.kind} compares whole; write truncate, drop or error"


@check("data.train_on", "data.train_on_prompt", "objective")
def prompts_are_not_compared(run: RunConfig) -> str | None:
    """The prompt is what both answers have in common."""
    asked = "train_on: all" if run.data.train_on == "all" else "train_on_prompt: true" if run.data.train_on_prompt else None
    return f"{run.objective.kind} compares answers, so data.{asked} means nothing to it" if asked and _batch(run) != "tokens" else None


@check("objective.reference", "adapter", "data.streaming", "objective")
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


@check("objective.sync.mix", "adapter", "objective.sync", "objective")
def matrices_do_not_mix(run: RunConfig) -> str | None:
    """A mix of two adapters' matrices is not the adapter of the mixed weights."""
    sync = getattr(run.objective, "sync", None)
    if sync is None or sync.mix == 1 or run.adapter is None:
        return None
    return "objective.sync.mix below 1 mixes weights, which an adapter's two matrices do not do; write mix: 1, or leave the adapter out"


@check("objective.sync.every", "data.streaming", "objective.sync", "objective")
def stream_counts_no_epochs(run: RunConfig) -> str | None:
    """Nobody knows how long an epoch of a stream is."""
    sync = getattr(run.objective, "sync", None)
    if sync is None or sync.every.unit != "ep" or not run.data.streaming:
        return None
    return f"objective.sync.every: {sync.every} counts epochs, whose length data.streaming does not know; write it in st or tok"


@check("objective.loss_weights", "objective.loss", "objective")
def every_loss_has_a_weight(run: RunConfig) -> str | None:
    """One weight for each loss."""
    if not isinstance(run.objective, DPO) or run.objective.loss_weights is None:
        return None
    losses, weights = len(run.objective.loss), len(run.objective.loss_weights)
    if losses == weights:
        return None
    count = f"{weights} number{'s' if weights > 1 else ''} for {losses} loss{'es' if losses > 1 else ''}"
    return f"objective.loss_weights has {count}; give one for each"


@check("objective.label_smoothing", "objective.loss", "objective")
def exo_needs_smoothing(run: RunConfig) -> str | None:
    """EXO compares with a distribution that is not one-sided."""
    if not isinstance(run.objective, DPO) or "exo_pair" not in run.objective.loss or run.objective.label_smoothing:
        return None
    return "the loss exo_pair needs objective.label_smoothing above 0, e.g. 0.001"


@check("objective.wpo", "objective.loss", "objective")
def sorted_pairs_have_no_weight(run: RunConfig) -> str | None:
    """AOT pairs each answer with one of another row, so no pair's weight belongs to its loss."""
    aot = isinstance(run.objective, DPO) and run.objective.wpo and {"aot", "aot_unpaired"} & set(run.objective.loss)
    return "objective.wpo weighs pairs, which the aot losses take apart; leave one of them out" if aot else None


@check("objective", "objective.label_smoothing", "objective.divergence", "objective.alpha", "objective.discopop_tau", "objective.mix")
def objective_uses_its_keys(run: RunConfig) -> str | None:
    """No key of the objective is ignored in silence."""
    objective = run.objective
    match objective:
        case DPO():
            used = {key for key, losses in _USED_BY.items() if losses & set(objective.loss)}
            used |= {"alpha"} if objective.divergence == "alpha" else set()
            ignored = [key for key in changed(objective, *_USED_BY, "alpha") if key not in used]
            name = f"the losses {joined(list(objective.loss))}" if len(objective.loss) > 1 else f"the loss {objective.loss[0]}"
        case CPO():
            ignored, name = changed(objective, "label_smoothing") if objective.loss != "sigmoid" else [], f"the loss {objective.loss}"
        case Distill():
            ignored, name = changed(objective, "mix") if objective.divergence != "js" else [], f"the divergence {objective.divergence}"
        case _:
            return None
    has = "have" if name.startswith("the losses") else "has"
    return f"{name} of {objective.kind} {has} no {joined(ignored)}; leave {them(ignored)} out" if ignored else None


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
    groups_divide_processes,
    tokens_can_be_shared,
    layers_can_be_shared,
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
    groups_share_out_the_processes,
    going_back_needs_a_checkpoint,
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
