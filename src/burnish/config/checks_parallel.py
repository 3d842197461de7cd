"""Checks across keys: several devices, and runs that go back or go on."""

from __future__ import annotations

from burnish.config.check import changed, check, joined, them
from burnish.config.run import RunConfig
from burnish.core.errors import divisors, one_of


@check("parallel.shards", "parallel.reshard", "parallel.offload", "parallel.strategy")
def strategy_uses_its_keys(run: RunConfig) -> str | None:
    """No key of a strategy is ignored in silence."""
    strategy = run.parallel.strategy
    known: dict[str, tuple[str, ...]] = {"none": (), "ddp": (), "zero1": ("offload",), "zero2": ("offload",)}
    known["hsdp"] = ("shards", "reshard", "offload")
    ignored = [key for key in changed(run.parallel, *known["hsdp"]) if key not in known.get(strategy, ("reshard", "offload"))]
    return f"parallel.strategy: {strategy} has no {joined(ignored)}; leave {them(ignored)} out" if ignored else None


@check("train.deterministic", "train.compile")
def measuring_is_not_deterministic(run: RunConfig) -> str | None:
    """What a clock decides may differ the next time."""
    if not run.train.deterministic or run.train.compile != "auto":
        return None
    return "train.compile: auto keeps what is measured to be faster, which train.deterministic cannot repeat; leave one out"


@check("parallel.strategy", "train.optimizer", "train.compile", "train.offload_activations", "adapter.init")
def shards_can_be_trained(run: RunConfig) -> str | None:
    """Some things need whole weights."""
    why = unshardable(run) if run.parallel.strategy not in ("auto", "none", "ddp") else None
    return f"parallel.strategy: {run.parallel.strategy} cuts weights into shards, and {why}" if why else None


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


@check("parallel.context", "parallel.tensor", "parallel.processes")
def groups_divide_processes(run: RunConfig) -> str | None:
    """Devices that share micro-batches come in groups of one size."""
    parallel, processes = run.parallel, run.parallel.processes
    for key, size in (("context", parallel.context), ("tensor", parallel.tensor)):
        if processes != "auto" and processes % size:
            hint = one_of(divisors(processes)) or f"a multiple of {size} for parallel.processes"
            return f"parallel.{key}: {size} does not divide parallel.processes: {processes}; take {hint}"
    return None


@check("parallel.context", "parallel.strategy", "train.compile")
def tokens_can_be_shared(run: RunConfig) -> str | None:
    """Some things know one device only."""
    if run.parallel.context == 1:
        return None
    if run.parallel.strategy == "none":
        return "parallel.strategy: none means one process, and parallel.context shares examples between several; leave one of them out"
    if run.train.compile == "auto":
        return "parallel.context exchanges tokens within layers, where train.compile is not tried; leave train.compile out"
    return None


@check("parallel.tensor", "parallel.strategy", "parallel.context", "model.quantize", "adapter", "train.optimizer", "train.compile")
def layers_can_be_shared(run: RunConfig) -> str | None:
    """What a part of a layer can do by itself."""
    parallel, adapter = run.parallel, run.adapter
    if parallel.tensor == 1:
        return None
    shares = f"parallel.tensor: {parallel.tensor} shares the weights of each layer, and"
    if parallel.strategy not in ("auto", "ddp"):
        return f"{shares} goes with strategy: ddp only, found {parallel.strategy}; take ddp, or leave parallel.tensor out"
    if parallel.context > 1:
        return f"{shares} parallel.context the tokens of each example; leave one of them out"
    if run.model.quantize != "none":
        return f"{shares} model.quantize: {run.model.quantize} stores them in blocks that are not cut; leave one of them out"
    if adapter is not None and adapter.dora:
        return f"{shares} adapter.dora needs the lengths of whole columns; leave one of them out"
    if adapter is not None and adapter.dropout:
        return f"{shares} adapter.dropout would differ from that on one device; leave one of them out"
    why = unshardable(run)
    return f"{shares} {why}" if why else None


@check("parallel.processes", "parallel.strategy")
def one_process_is_one(run: RunConfig) -> str | None:
    """A strategy for one process has one."""
    processes = run.parallel.processes
    if run.parallel.strategy != "none" or processes in ("auto", 1):
        return None
    return f"parallel.strategy: none means one process, parallel.processes is {processes}; leave one of them out"


@check("parallel.restarts", "resume")
def restarts_go_on(run: RunConfig) -> str | None:
    """A second start finds what the first has saved."""
    if not run.parallel.restarts or run.resume != "never":
        return None
    return "parallel.restarts goes on from the last checkpoint, which resume: never refuses; leave one of them out"


@check("parallel.shards", "parallel.processes")
def groups_share_out_the_processes(run: RunConfig) -> str | None:
    """As far as the number of processes is known."""
    processes, shards = run.parallel.processes, run.parallel.shards
    if shards is None or processes == "auto" or processes == 1 or processes % shards == 0:
        return None
    return f"parallel.processes: {processes} cannot be cut into groups of parallel.shards: {shards}; take a divisor"


@check("recovery.spike.action", "recovery.non_finite", "save.every")
def going_back_needs_a_checkpoint(run: RunConfig) -> str | None:
    """Where nothing is saved, there is nothing to go back to."""
    spike = run.recovery.spike
    back = {"recovery.non_finite": run.recovery.non_finite, "recovery.spike.action": spike.action if spike is not None else ""}
    keys = [key for key, action in back.items() if action == "rollback"]
    best = run.save.best and run.data.eval is not None and run.evaluation.every is not None
    if not keys or run.save.every is not None or run.save.keep_every is not None or best:
        return None
    return f"{keys[0]}: rollback goes back to the newest checkpoint, and save.every: null writes none; set it, e.g. 100st"
