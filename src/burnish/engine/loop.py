"""The training loop. Every objective, every device and every source of batches goes through it.

    resume                                     the newest whole checkpoint, if there is one
    on_train_start
    on_eval_start, on_eval_end                 with evaluation.at_start
    until the last step, or state.stop is set:
        source.next                            the micro-batches of one step
        on_step_start
        objective.begin_step                   where the loss of an example depends on the others of its step
        for each micro-batch:
            objective, backward                gradients add up
        update                                 average over ranks, clip, check, optimiser
        on_step_end
        on_eval_start, on_eval_end             every evaluation.every, and after the last step; may set state.stop
        save, on_save                          every save.every, when the eval loss is the lowest so far, and after the last step
        Ctrl-C or SIGTERM: save, on_save       and Interrupted is raised
    weights of the best checkpoint             with save.best, where there is one
    on_train_end

The `on_...` are methods of `events.Callback`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from burnish.config.base import Duration
from burnish.config.sections import Evaluation, Save, Train
from burnish.core.errors import CheckpointError, ConfigError, Interrupted, Where
from burnish.core.log import info, warn
from burnish.data.types import Batch, Source
from burnish.engine import checkpoint, resume, shards
from burnish.engine.backend import Backend, Trackers
from burnish.engine.evaluation import evaluate, judge
from burnish.engine.events import Callback, Callbacks, Signals, State
from burnish.engine.guard import GuardReport
from burnish.engine.metrics import MetricsLog, step_line
from burnish.engine.optim import use_final_weights
from burnish.engine.progress import TrainingProgress
from burnish.engine.schedule import effective, learning_rate, total_steps
from burnish.engine.step import Stepper, StepResult, begin_step
from burnish.objectives.base import Objective

_QUALITY = {
    "eval_perplexity": "perplexity {eval_perplexity:.3f}",
    "eval_reward_accuracy": "preference accuracy {eval_reward_accuracy:.1%}",
    "eval_accuracy": "accuracy {eval_accuracy:.1%}",
}
"""What is said of an evaluation beside its loss: the first that there is."""

__all__ = ["Job", "Outcome", "build_stepper", "due", "length_of", "train"]


@dataclass(slots=True)
class Job:
    """All that a training run needs, built and ready."""

    policy: Any  # models.policy.Policy
    objective: Objective
    source: Source
    optimizer: Any  # torch.optim.Optimizer, from engine.optim
    backend: Backend
    train: Train
    evaluation: Evaluation
    save: Save
    folder: Path  # the run folder
    eval_batches: Callable[[], Iterable[Batch]] | None = None  # a fresh pass over the held-out data
    callbacks: Sequence[Callback] = ()
    trackers: Trackers = field(default_factory=lambda: Trackers({}))
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what a checkpoint must share, see resume.identity_of
    resume: bool = True

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    state: State
    skipped: int  # steps whose gradient was not finite
    evaluation: dict[str, float] | None  # the last one
    guard: GuardReport
    resumed_from: Path | None


def train(job: Job) -> Outcome:
    """Trains until the end, an early stop or a signal. Afterwards the policy holds the weights to keep: the best, or the last.

    Raises:
        Interrupted: a signal came; the checkpoint is saved, and the same call goes on from it.
        TrainingError: the gradients are not finite or missing.
        CheckpointError: the checkpoint to resume from belongs to another run, or one could not be written.
    """
    state = State(total=length_of(job.source, job.train))
    stepper = build_stepper(job, state.total)
    resumed_from = _begin(job, state, stepper)

    with (
        MetricsLog(job.folder, after=state.step, active=job.backend.is_main) as log,
        TrainingProgress(state.total, done=state.step, active=job.backend.is_main) as progress,
        Signals() as signals,
    ):
        run = _Run(job, state, stepper, log, progress, signals, saved_step=state.step if resumed_from else None)
        run.events.on_train_start(state)
        if state.evaluation_pending or (job.evaluation.at_start and state.step == 0):
            run.evaluate()

        while not state.finished:
            began = time.perf_counter()
            batches = job.source.next(job.policy)
            if batches is None:
                break
            run.events.on_step_start(state)
            for batch in begin_step(batches, job.objective, job.policy, job.backend):
                with job.backend.autocast():
                    loss = job.backend.compute(partial(job.objective, job.policy, batch))
                stepper.accumulate(loss, batch)
            result = stepper.update()
            run.note(result, seconds=time.perf_counter() - began)
            run.events.on_step_end(state, result)

            if run.evaluation_is_due():
                run.evaluate()
            if run.save_is_due():
                run.save()
            if not state.finished:  # after the last step there is nothing to stop
                run.stop_on_signal()

        run.finish()
    return Outcome(state, stepper.skipped, run.last_evaluation, stepper.guard.report, resumed_from)


def build_stepper(job: Job, total: int) -> Stepper:
    """The stepper of a run of `total` steps. With it and the source anyone can write a loop of their own."""
    schedule = effective(job.train.schedule, job.train.optimizer.kind)
    size = {"steps_per_epoch": _steps_per_epoch(job.source) or math.inf, "tokens_per_step": _tokens_per_step(job.source)}
    return Stepper(
        job.backend,
        job.optimizer,
        job.policy.trainable(),
        learning_rate=job.train.learning_rate,
        multiplier=lambda step: learning_rate(schedule, step, total, **size),
        clip=job.train.clip,
    )


def length_of(source: Source, train: Train) -> int:
    """The optimiser steps of a run over `source`.

    Raises:
        ConfigError: the length is given in epochs and the source has no end.
    """
    return total_steps(train, steps_per_epoch=_steps_per_epoch(source), tokens_per_step=_tokens_per_step(source))


def due(every: Duration | None, step: int, *, steps_per_epoch: float | None, tokens_per_step: float, key: str) -> bool:
    """Whether something that happens `every` so often happens after `step`: a multiple of `every` lies in the step just done.

    So `0.5ep` of a 3-step epoch is due after steps 2, 3, 5, 6: each time as early as whole steps allow, without drifting.

    Raises:
        ConfigError: `every` counts epochs and nobody knows how long one is; `key` names the setting.
    """
    if every is None:
        return False
    if every.unit == "ep" and steps_per_epoch is None:
        raise ConfigError(
            f"the length of streamed data is not known, so '{every}' never comes", where=Where(field=key), hint="write it in st or tok"
        )
    period = every.value * {"st": 1.0, "ep": steps_per_epoch or math.inf, "tok": 1.0 / tokens_per_step}[every.unit]
    return math.floor(step / period + 1e-9) > math.floor((step - 1) / period + 1e-9)


class _Run:
    """What happens around the steps of one run."""

    def __init__(
        self,
        job: Job,
        state: State,
        stepper: Stepper,
        log: MetricsLog,
        progress: TrainingProgress,
        signals: Signals,
        *,
        saved_step: int | None,
    ) -> None:
        self.job = job
        self.state = state
        self.stepper = stepper
        self.log = log
        self.progress = progress
        self.signals = signals
        self.events = Callbacks(job.callbacks)
        self.last_evaluation: dict[str, float] | None = None
        self._saved_step = saved_step
        self._first_step = state.step
        self._evaluated_step: int | None = None

    def note(self, result: StepResult, *, seconds: float) -> None:
        """Brings the state up to the step just done, and writes its line."""
        state = self.state
        state.step = result.step
        state.epoch = getattr(self.job.source, "epoch", 0.0)
        state.tokens += result.tokens
        state.trained_tokens += result.trained_tokens
        state.seconds += seconds
        line = step_line(result, seconds)
        self.log.step(line)
        self.job.trackers.log({key: value for key, value in line.items() if key != "step"}, step=result.step)
        self.progress.step(line)
        if result.skipped:
            warn(f"step {result.step} is skipped: its gradient is not finite (norm {result.grad_norm:.4g}, loss {result.loss:.4f})")

    def evaluation_is_due(self) -> bool:
        """By `evaluation.every`."""
        return self.job.eval_batches is not None and self._due(self.job.evaluation.every, "evaluation.every")

    def save_is_due(self) -> bool:
        """By `save.every`."""
        return self._due(self.job.save.every, "save.every")

    def evaluate(self) -> None:
        """Looks at the held-out data, and keeps a checkpoint of what is best so far. A signal cuts it short."""
        job, state = self.job, self.state
        if job.eval_batches is None:
            return
        self.events.on_eval_start(state)
        self.progress.status("evaluating")
        metrics = evaluate(
            job.policy,
            job.objective,
            job.eval_batches(),
            backend=job.backend,
            optimizer=job.optimizer,
            cancelled=lambda: job.backend.world_size == 1 and self.signals.received is not None,
        )
        self.progress.status("training")
        state.evaluation_pending = metrics is None
        if metrics is None:
            return
        self.last_evaluation, self._evaluated_step = metrics, state.step
        self.log.evaluation({"step": state.step, **metrics})
        job.trackers.log(metrics, step=state.step)
        quality = _QUALITY.get(next((key for key in _QUALITY if key in metrics), ""), "").format_map(metrics)
        self.progress.say(f"step {state.step}  eval loss {metrics['eval_loss']:.4f}  {quality}  ({metrics['eval_seconds']:.1f} s)")
        # Untrained weights (at_start) are a point on the curve, never a result to keep.
        if state.step and judge(state, metrics["eval_loss"], job.evaluation) and job.save.best:
            state.best_saved = state.step
            self.save()
        self.events.on_eval_end(state, metrics)

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one, and deletes those that are not to be kept."""
        job, state = self.job, self.state
        if self._saved_step == state.step:
            return
        self.progress.status("saving")
        content = resume.capture(
            state=state,
            stepper=self.stepper,
            source=job.source,
            named_parameters=resume.weights_of(job.policy),
            backend=job.backend,
            identity=job.identity,
        )
        folder = job.checkpoints / f"step-{state.step:06d}"
        if (sharding := job.backend.sharding) is not None:
            shards.save(job.checkpoints, content, sharding)
        elif job.backend.is_main:
            checkpoint.save(job.checkpoints, content)
        if job.backend.is_main:
            checkpoint.prune(job.checkpoints, keep=job.save.keep, best=state.best_saved)
        job.backend.barrier()
        self._saved_step = state.step
        self.progress.status("training")
        self.events.on_save(state, folder)

    def stop_on_signal(self) -> None:
        """Saves and raises Interrupted where any rank has got a signal."""
        if not self.job.backend.any(self.signals.received is not None):
            return
        self.save()
        rest = ", before its evaluation" if self.state.evaluation_pending else ""
        raise Interrupted(
            f"stopped after step {self.state.step} of {self.state.total}{rest}, with a checkpoint in {self.job.checkpoints}",
            hint="run the same command again to go on",
        )

    def finish(self) -> None:
        """The last evaluation and checkpoint; then the weights to keep."""
        job, state = self.job, self.state
        if state.stop is not None:
            info(f"stopped after step {state.step} of {state.total}: {state.stop}")
        unseen = state.step > self._first_step and self._evaluated_step != state.step and not state.evaluation_pending
        if job.evaluation.every is not None and unseen:
            self.evaluate()
        if state.evaluation_pending:  # cut short by a signal, and the weights to keep hang on it
            self.stop_on_signal()
        if job.save.every is not None:
            self.save()
        if job.save.best and state.best_saved is not None and state.best_saved != state.step:
            self._take_best(job.checkpoints / f"step-{state.best_saved:06d}")
        use_final_weights(job.optimizer)
        self.events.on_train_end(state)

    def _take_best(self, folder: Path) -> None:
        found = shards.load(folder, self.job.backend.layout)
        resume.restore_weights(found, resume.weights_of(self.job.policy), folder)
        self.job.optimizer.load_state_dict(found.optimizer)  # a schedule-free optimiser makes the final weights from its state
        info(f"the weights are those of step {found.step}, where the eval loss was lowest ({self.state.best_loss:.4f})")

    def _due(self, every: Duration | None, key: str) -> bool:
        source = self.job.source
        size = {"steps_per_epoch": _steps_per_epoch(source), "tokens_per_step": _tokens_per_step(source)}
        return due(every, self.state.step, **size, key=key)


def _begin(job: Job, state: State, stepper: Stepper) -> Path | None:
    """Starts afresh, or goes on from the newest whole checkpoint and returns it."""
    job.backend.prepare(job.policy.model)
    job.policy.train()
    # From here on the random numbers belong to training alone, whatever loading and initialising drew.
    job.backend.seed(job.train.seed, per_rank=True)
    folder = checkpoint.newest(job.checkpoints)
    if folder is None:
        return None
    if not job.resume:
        raise CheckpointError(f"{job.folder} holds a run already, and resume is off", hint="choose another output folder, or resume: auto")
    resume.restore(
        folder,
        state=state,
        stepper=stepper,
        source=job.source,
        named_parameters=resume.weights_of(job.policy),
        backend=job.backend,
        identity=job.identity,
    )
    info(f"going on from {folder}: step {state.step} of {state.total}")
    return folder


def _steps_per_epoch(source: Source) -> float | None:
    return getattr(source, "steps_per_epoch", None)


def _tokens_per_step(source: Source) -> float:
    return getattr(source, "tokens_per_step", math.inf)
