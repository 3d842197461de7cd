"""`burnish check`: is the run file right, and what would it do?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish.cli.parts import needed_by
from burnish.config.base import written_seconds
from burnish.config.document import Fault
from burnish.config.dump import resolved
from burnish.config.load import examine, raise_faults
from burnish.config.places import REDACTED, redact
from burnish.config.run import RunConfig
from burnish.config.schema import run_schema
from burnish.config.sections import Data, Parallel, Recovery, Source, Train
from burnish.core.errors import ConfigError


def main(file: Path | None, overrides: Sequence[str], *, schema: bool = False, as_json: bool = False) -> None:
    """Prints what the run file would do, or everything that is wrong with it. Reads no weights and writes nothing.

    Raises:
        ConfigError: the run file has faults.
    """
    if schema:
        print(json.dumps(run_schema(), indent=2))
        return
    if file is None:
        raise ConfigError("check needs a run file", hint="burnish check RUN.yaml, or burnish check --schema for the schema of run files")
    loaded, faults = examine(file, overrides)
    config = loaded.config if loaded else None
    if as_json:
        print(json.dumps(report(config, faults), indent=2))
        raise SystemExit(2 if faults else 0)
    if config is None:
        raise_faults(faults, str(file))
    else:
        print(f"{file} is valid. It would train:\n")
        print("\n".join(f"  {name:<11}{text}" for name, text in summary(config).items()))
        print("".join(f"\nnote: {note}" for note in notes(config)), end="\n" if notes(config) else "")


def report(config: RunConfig | None, faults: Sequence[Fault]) -> dict[str, Any]:
    """The document of `--json`."""
    return {
        "ok": not faults,
        "faults": [fault.to_json() for fault in faults],
        "notes": notes(config) if config else [],
        "resolved": resolved(config) if config else None,
    }


def summary(config: RunConfig) -> dict[str, str]:
    """Section -> a line on what it says."""
    return {
        "model": _model(config),
        "adapter": _adapter(config),
        "data": ", ".join(_source(source) for source in config.data.train) + f"; {_lengths(config.data)}",
        "held out": _held_out(config.data),
        "objective": config.objective.kind,
        "length": f"{_length(config.train)}, {_step(config.train)} a step",
        "optimizer": f"{config.train.optimizer.kind}, learning rate {config.train.learning_rate:g}, {_schedule(config.train)}",
        "saves": _saves(config),
        "recovery": _recovery(config.recovery),
        "parallel": _parallel(config.parallel),
        "output": _short(config.output) + (f", resume: {config.resume}" if config.resume != "auto" else ""),
    }


def notes(config: RunConfig) -> list[str]:
    """What is not wrong, but worth knowing before the run."""
    found = [
        f"{part.purpose} needs {' and '.join(name for name, version in part.packages.items() if not version)}: {part.install}"
        for part in needed_by(config)
        if not part.installed
    ]
    if config.adapter is None and config.train.learning_rate == Train().learning_rate:
        found.append("train.learning_rate is 2e-4, the default, which suits an adapter; full fine-tuning usually wants 1e-5 to 5e-5")
    if config.model.trust_remote_code:
        found.append("model.trust_remote_code runs Python code that comes with the model")
    if REDACTED in json.dumps(resolved(config)):
        found.append("a URL holds a secret, which the run folder will not keep; write it as ${NAME}, and the saved file can be run again")
    if (Path(config.output) / "checkpoints").is_dir():
        same = "the same settings go on from its newest checkpoint, unless it is finished; others are refused"
        rest = same if config.resume == "auto" else "this one is refused, as resume: never says"
        found.append(f"{_short(config.output)} holds a run already: {rest}")
    return found + [f"{_short(path)} is trained on and held out: its loss says nothing new" for path in _leaks(config.data)]


def _leaks(data: Data) -> list[str]:
    """Sources that are trained on and held out at once."""
    trained = {(source.path, source.name, source.split) for source in data.train}
    held_out = data.eval if isinstance(data.eval, list) else []
    return [source.path for source in held_out if (source.path, source.name, source.split) in trained]


def _model(config: RunConfig) -> str:
    model = config.model
    quantized = "" if model.quantize == "none" else f", quantised to {model.quantize}"
    return _short(model.path) + (f" at {model.revision}" if model.revision else "") + quantized


def _adapter(config: RunConfig) -> str:
    adapter = config.adapter
    if adapter is None:
        return "none: full fine-tuning, every weight is trained"
    if adapter.path is not None:
        return f"goes on from {_short(adapter.path)}"
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    kind = "DoRA" if adapter.dora else adapter.kind
    return f"{kind}, rank {adapter.rank}, alpha {adapter.alpha:g}, on {'all linear layers' if targets == 'all' else targets}"


def _source(source: Source) -> str:
    form = "format found in the rows" if source.format == "auto" else source.format
    limit = f", at most {source.limit} rows" if source.limit else ""
    return f"{_short(redact(source.path))} ({form}{limit})"


def _lengths(data: Data) -> str:
    past = {"truncate": "longer ones truncated", "drop": "longer ones dropped", "split": "longer ones split", "error": "none longer"}
    return f"at most {data.max_length} tokens, {past[data.overlong]}"


def _held_out(data: Data) -> str:
    if data.eval is None:
        return "nothing"
    return ", ".join(_source(source) for source in data.eval) if isinstance(data.eval, list) else f"{data.eval:.3g} of the rows"


def _length(train: Train) -> str:
    if train.steps is not None:
        return _count(train.steps, "step")
    if train.tokens is not None:
        return f"{train.tokens:,} tokens"
    return _count(train.epochs or 1, "epoch")


def _step(train: Train) -> str:
    return f"{train.batch_tokens:,} tokens" if train.batch_tokens else _count(train.batch_size or 32, "example")


def _schedule(train: Train) -> str:
    if train.optimizer.kind.endswith("schedule_free"):
        return "constant after the warm-up: it averages the weights instead of lowering the rate"
    return f"{train.schedule.kind} schedule"


def _saves(config: RunConfig) -> str:
    save = config.save
    best = "the best by eval loss and " if save.best and config.data.eval is not None else ""
    if save.every is None:
        kept = [*filter(None, (best.removesuffix(" and "), save.keep_every and f"one every {save.keep_every} for ever"))]
        return f"{' and '.join(kept) or 'no checkpoint'} before the end"
    forever = f", and one every {save.keep_every} for ever" if save.keep_every is not None else ""
    return f"every {save.every}; {best}the newest {save.keep} stay{forever}"


def _recovery(recovery: Recovery) -> str:
    spike = recovery.spike
    spikes = "spikes are not looked for" if spike is None else f"spikes beyond {spike.sigma:g} sigma: {spike.action}"
    return f"not finite: {recovery.non_finite}; {spikes}; out of memory: {recovery.out_of_memory}"


def _parallel(parallel: Parallel) -> str:
    processes = "one for each accelerator" if parallel.processes == "auto" else f"processes: {parallel.processes}"
    default = Parallel()
    keys = ("shards", "context", "tensor", "reshard", "offload")
    given = [f"{key}: {str(value).lower()}" for key in keys if (value := getattr(parallel, key)) != getattr(default, key)]
    rest = f"{_count(parallel.restarts, 'restart')}, patience {written_seconds(parallel.timeout)}"
    return ", ".join([parallel.strategy, processes, *given, rest])


def _count(number: float, noun: str) -> str:
    return f"{number:,g} {noun}{'' if number == 1 else 's'}"


def _short(path: str) -> str:
    """A path as a person in this folder would write it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if path.startswith("/") and Path(path).is_relative_to(here) else path
