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
        once more in smaller micro-batches     where memory ran out, see `engine.memory`
        update                                 average over ranks, clip, check, optimiser
        on_step_end
        back to the newest checkpoint          where `recovery` says so
        on_eval_start, on_eval_end             every evaluation.every, and after the last step; may set state.stop
        save, on_save                          every save.every, for the lowest eval loss so far, on request, and after the last step
        a signal, or a file STOP               save, on_save, and Interrupted is raised
    weights of the best checkpoint             with save.best, where there is one
    on_train_end

The `on_...` are methods of `events.Callback`. Checkpoints are written beside the training (`engine.writer`), and on_save comes when one is
on the disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from burnish.config.base import Duration
from burnish.config.sections import Evaluation, Recovery, Save, Train
from burnish.core.errors import CheckpointError, Elsewhere, Interrupted, StorageError, TrainingError
from burnish.core.log import counted, info, warn
from burnish.data.types import Batch, Source
from burnish.engine import checkpoint, resume, shards
from burnish.engine.backend import Backend, Trackers
from burnish.engine.checkpoint import Checkpoint
from burnish.engine.evaluation import early_stop, evaluate, judge
from burnish.engine.events import Callback, Callbacks, Requests, State
from burnish.engine.guard import GuardReport
from burnish.engine.memory import Memory
from burnish.engine.metrics import MetricsLog, step_line
from burnish.engine.optim import use_final_weights
from burnish.engine.progress import TrainingProgress
from burnish.engine.schedule import due, effective, learning_rate, total_steps
from burnish.engine.step import Stepper, StepResult, begin_step
from burnish.engine.writer import Writer
from burnish.objectives.base import Objective

_QUALITY = {
    "eval_perplexity": "perplexity {eval_perplexity:.3f}",
    "eval_reward_accuracy": "preference accuracy {eval_reward_accuracy:.1%}",
    "eval_accuracy": "accuracy {eval_accuracy:.1%}",
}
"""What is said of an evaluation beside its loss: the first that there is."""

Resume = Literal["auto", "force", "never"]

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
    recovery: Recovery = field(default_factory=Recovery)
    eval_batches: Callable[[int], Iterable[Batch]] | None = None  # a fresh pass over the held-out data, micro-batches halved so often
    callbacks: Sequence[Callback] = ()
    trackers: Trackers = field(default_factory=lambda: Trackers({}))
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what a checkpoint must share, see engine/identity.py
    resume: Resume = "auto"

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
        TrainingError: the gradients are not finite or missing, memory does not hold one example, or the run went back too often.
        CheckpointError: the checkpoint to resume from belongs to another run.
        StorageError: the last checkpoint could not be written.
    """
    state = State(total=length_of(job.source, job.train))
    stepper = build_stepper(job, state.total)
    resumed_from = _begin(job, state, stepper)

    with (
        MetricsLog(job.folder, after=state.step, evaluated=state.evaluated_step, active=job.backend.is_main) as log,
        TrainingProgress(state.total, done=state.step, active=job.backend.is_main) as progress,
        Requests(job.folder, active=job.backend.is_main) as requests,
        _writer(job) as writer,
    ):
        memory = Memory(job.backend, job.source, stepper, state, job.recovery, job.folder)
        run = _Run(job, state, stepper, memory, log, progress, requests, writer, saved_step=state.step if resumed_from else None)
        run.events.on_train_start(state)
        if state.evaluation_pending or (job.evaluation.at_start and state.step == 0):
            run.evaluate()
            if state.evaluation_pending:  # cut short: it belongs to this step, and comes first when the run goes on
                run.answer()

        while not state.finished:
            began = time.perf_counter()
            batches = job.source.next(job.policy)
            if batches is None:
                state.stop = "there is no more data"
                break
            run.events.on_step_start(state)
            for attempt in memory.attempts(batches):
                with attempt:
                    _accumulate(job, stepper, attempt.batches)
            result = stepper.update()
            run.note(result, seconds=time.perf_counter() - began)
            run.events.on_step_end(state, result)

            if result.roll_back:
                run.roll_back()
            if run.evaluation_is_due():
                run.evaluate()
            if run.save_is_due():
                run.save()
            run.answer()

        run.finish()
    return Outcome(state, stepper.skipped, run.last_evaluation, stepper.guard.report, resumed_from)


def _accumulate(job: Job, stepper: Stepper, batches: Sequence[Batch]) -> None:
    """The gradient of a step. Where it fails, nothing is left of it: a loss that is kept keeps all that its backward pass needs."""
    for batch in begin_step(batches, job.objective, job.policy, job.backend):
        with job.backend.autocast():
            loss = job.backend.compute(partial(job.objective, job.policy, batch))
        stepper.accumulate(loss, batch)


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
        recovery=job.recovery,
    )


def length_of(source: Source, train: Train) -> int:
    """The optimiser steps of a run over `source`.

    Raises:
        ConfigError: the length is given in epochs and the source has no end.
    """
    return total_steps(train, steps_per_epoch=_steps_per_epoch(source), tokens_per_step=_tokens_per_step(source))


class _Run:
    """What happens around the steps of one run."""

    def __init__(
        self,
        job: Job,
        state: State,
        stepper: Stepper,
        memory: Memory,
        log: MetricsLog,
        progress: TrainingProgress,
        requests: Requests,
        writer: Writer,
        *,
        saved_step: int | None,
    ) -> None:
        self.job = job
        self.state = state
        self.stepper = stepper
        self.memory = memory
        self.log = log
        self.progress = progress
        self.requests = requests
        self.writer = writer
        self.events = Callbacks(job.callbacks)
        self.last_evaluation: dict[str, float] | None = None
        self._saved_step = saved_step  # when the last save began
        self._safe_step = saved_step or 0  # of the last one that is on the disk
        self._save_error: StorageError | None = None  # of the newest checkpoint that was tried

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
        if result.fault is not None:
            why = "its gradient is not finite" if result.fault == "non_finite" else "its loss is far above those before it"
            warn(f"step {result.step} is skipped: {why} (norm {result.grad_norm:.4g}, loss {result.loss:.4f})")

    def evaluation_is_due(self) -> bool:
        """By `evaluation.every`, and after the last step, before that is saved: the checkpoint is to know what came of it."""
        every, state = self.job.evaluation.every, self.state
        if self.job.eval_batches is None or every is None or state.evaluated_step == state.step:
            return False
        return state.finished or self._due(every, "evaluation.every")

    def save_is_due(self) -> bool:
        """By `save.every` and `save.keep_every`."""
        return self._due(self.job.save.every, "save.every") or self._due(self.job.save.keep_every, "save.keep_every")

    def evaluate(self) -> None:
        """Looks at the held-out data, and keeps a checkpoint of what is best so far. A signal cuts it short."""
        job, state = self.job, self.state
        if job.eval_batches is None:
            state.evaluation_pending = False  # it was of a run with held-out data
            return
        self.events.on_eval_start(state)
        self.progress.status("evaluating")
        metrics = self._metrics()
        self.progress.status("training")
        state.evaluation_pending = metrics is None
        if metrics is None:
            return
        self.last_evaluation, state.evaluated_step = metrics, state.step
        self.log.evaluation({"step": state.step, **metrics})
        job.trackers.log(metrics, step=state.step)
        quality = _QUALITY.get(next((key for key in _QUALITY if key in metrics), ""), "").format_map(metrics)
        self.progress.say(f"step {state.step}  eval loss {metrics['eval_loss']:.4f}  {quality}  ({metrics['eval_seconds']:.1f} s)")
        # Untrained weights (at_start) are a point on the curve, never a result to keep.
        if state.step and judge(state, metrics["eval_loss"], job.evaluation) and job.save.best:
            state.best_saved = state.step
            self.save()
        self.events.on_eval_end(state, metrics)

    def _metrics(self) -> dict[str, float] | None:
        job = self.job
        assert job.eval_batches is not None
        while True:
            try:
                return evaluate(
                    job.policy,
                    job.objective,
                    job.eval_batches(self.state.halvings),
                    backend=job.backend,
                    optimizer=job.optimizer,
                    cancelled=lambda: job.backend.world_size == 1 and self.requests.received is not None,
                )
            except (RuntimeError, MemoryError) as error:
                if not self.memory.evaluates_again(error):
                    raise

    def save(self) -> None:
        """Begins to write a checkpoint, unless this step has one; those that are not to be kept go when it is there."""
        job, state = self.job, self.state
        if self._saved_step == state.step:
            return
        self.progress.status("saving")
        self.log.sync()
        content = resume.capture(
            state=state,
            stepper=self.stepper,
            source=job.source,
            named_parameters=resume.weights_of(job.policy),
            backend=job.backend,
            identity=job.identity,
            permanent=self._due(job.save.keep_every, "save.keep_every"),
        )
        self.writer.write(content, best=state.best_saved)
        self._saved_step = state.step
        self.progress.status("training")
        self._tell_written()

    def _save_now(self) -> None:
        """Returns when the checkpoint of this step is on the disk.

        Raises:
            StorageError: it cannot be written.
        """
        self.save()
        written = self._all_written()
        if self._save_error is not None:
            raise self._save_error
        if not written:
            raise Elsewhere("another rank could not write the checkpoint", exit_code=StorageError.exit_code)

    def _all_written(self) -> bool:
        """Waits until no rank is writing; whether all could write the newest checkpoint."""
        self.writer.wait()
        self._tell_written()
        return not self.job.backend.any(self._save_error is not None)

    def _tell_written(self) -> None:
        """Says what became of the checkpoints that were being written."""
        for written in self.writer.finished():
            self._save_error = written.error
            if written.error is None:
                self._safe_step = written.step
                self.events.on_save(self.state, written.folder)
                continue
            if not self.state.finished:
                unsafe = counted(self.state.step - self._safe_step, "step")
                warn(f"{written.error}; training goes on, and the next checkpoint is tried when it is due ({unsafe} in none so far)")

    def answer(self) -> None:
        """Does what the outside asks for, of any rank: saves, or saves and raises Interrupted."""
        self._tell_written()
        here = self.requests.seen()
        asked = self.job.backend.union(here)
        if not asked or self.state.finished:  # after the last step there is nothing to stop, and it is saved anyway
            return
        self.save()
        saved = self._all_written()
        self.requests.answered(asked)
        if asked & Requests.SAVE and saved:
            self.progress.say(f"step {self.state.step}  saved, as {self.job.folder / 'SAVE'} asked")
        if asked & Requests.STOP:
            if not here & Requests.STOP:
                self.progress.say("another rank got the signal to stop")
            self._stop()

    def _stop(self) -> None:
        self._save_now()
        rest = ", before its evaluation" if self.state.evaluation_pending else ""
        raise Interrupted(
            f"stopped after step {self.state.step} of {self.state.total}{rest}, with a checkpoint in {self.job.checkpoints}",
            hint="run the same command again to go on",
        )

    def roll_back(self) -> None:
        """Takes the weights and the optimiser's state of the newest checkpoint. The data goes on: what led here is not repeated.

        Raises:
            TrainingError: there is no checkpoint, or the run went back too often.
        """
        job, state = self.job, self.state
        self._all_written()
        folder = _newest(job)
        if folder is None or state.rollbacks >= job.recovery.rollbacks:
            why = "there is no checkpoint yet" if folder is None else f"it has done so {job.recovery.rollbacks} times (recovery.rollbacks)"
            raise TrainingError(
                f"the run should go back to an older state at step {state.step}, and {why}",
                hint="lower train.learning_rate, lengthen the warm-up, or use train.precision=float32",
            )
        self._take(folder)
        self.stepper.calm_down()
        state.rollbacks += 1
        warn(f"the weights are those of {folder} again; the data goes on after step {state.step}")

    def finish(self) -> None:
        """The last evaluation and checkpoint; then the weights to keep."""
        job, state = self.job, self.state
        if state.stop is not None:
            info(f"stopped after step {state.step} of {state.total}: {state.stop}")
        if not state.evaluation_pending and self.evaluation_is_due():
            self.evaluate()
        if state.evaluation_pending:  # cut short by a signal, and the weights to keep hang on it
            self._stop()
        if job.save.every is not None:
            self._save_now()
        elif job.save.best:
            self._all_written()
        if job.save.best and state.best_saved is not None and state.best_saved != state.step:
            self._take_best(state.best_saved)
        use_final_weights(job.optimizer)
        self.memory.forget()
        self.events.on_train_end(state)

    def _take_best(self, step: int) -> None:
        folder, older = checkpoint.folder_of(self.job.checkpoints, step), self.writer.best
        if older is not None and not folder.is_dir():
            warn(f"{folder}, where the eval loss was lowest, could not be written; before that it was lowest at step {older:,}")
            folder = checkpoint.folder_of(self.job.checkpoints, older)
        try:
            found = self._take(folder)
        except CheckpointError as error:  # weeks of training are not lost over it
            warn(f"{error}; the eval loss was lowest there, and the weights are those of the last step instead")
            return
        lowest = f" ({self.state.best_loss:.4f})" if found.step == step else " of those that are saved"
        info(f"the weights are those of step {found.step}, where the eval loss was lowest{lowest}")

    def _take(self, folder: Path) -> Checkpoint:
        found = shards.load(folder, self.job.backend.layout)
        resume.restore_weights(found, resume.weights_of(self.job.policy), folder)
        self.job.optimizer.load_state_dict(found.optimizer)  # a schedule-free optimiser makes the final weights from its state
        return found

    def _due(self, every: Duration | None, key: str) -> bool:
        source = self.job.source
        size = {"steps_per_epoch": _steps_per_epoch(source), "tokens_per_step": _tokens_per_step(source)}
        return due(every, self.state.step, **size, key=key)


def _writer(job: Job) -> Writer:
    backend, save = job.backend, job.save
    ranks = backend.writing(sum(weight.nbytes for weight in resume.weights_of(job.policy).values()))
    best = resume.written_best(job.checkpoints)
    return Writer(job.checkpoints, keep=save.keep, background=save.background, active=backend.is_main, ranks=ranks, best=best)


def _newest(job: Job) -> Path | None:
    """The newest checkpoint that is whole, as the first rank finds it; the others must see the same one.

    Raises:
        CheckpointError: all are damaged, or a rank does not see it.
    """
    backend = job.backend
    found: Path | CheckpointError | None = None
    if backend.is_main:
        try:
            found = checkpoint.newest(job.checkpoints)
            if found is not None:
                checkpoint.set_aside(job.checkpoints, found)
        except CheckpointError as error:
            found = error
        except OSError as error:  # storage that is read-only now: training may go on without
            warn(f"the damaged checkpoints in {job.checkpoints} could not be set aside: {error}")
    found = backend.gather(found)[0]
    if isinstance(found, CheckpointError):
        raise found
    missing = [rank for rank, sees in enumerate(backend.gather(found is None or found.is_dir())) if not sees]
    if missing:
        raise CheckpointError(
            f"rank {missing[0]} does not see {found}, from which rank 0 goes on", hint="the run folder must be the same on all machines"
        )
    return found


def _begin(job: Job, state: State, stepper: Stepper) -> Path | None:
    """Starts afresh, or goes on from the newest whole checkpoint and returns it."""
    job.backend.prepare(job.policy.model)
    job.policy.train()
    # From here on the random numbers belong to training alone, whatever loading and initialising drew.
    job.backend.seed(job.train.seed, per_rank=True)
    folder = _newest(job)
    if folder is None:
        return None
    if job.resume == "never":
        raise CheckpointError(f"{job.folder} holds a run already, and resume is off", hint="choose another output folder, or resume: auto")
    resume.restore(
        folder,
        state=state,
        stepper=stepper,
        source=job.source,
        named_parameters=resume.weights_of(job.policy),
        backend=job.backend,
        identity=job.identity,
        force=job.resume == "force",
    )
    state.stop = early_stop(state, job.evaluation)
    info(f"going on from {folder}: step {state.step} of {state.total}")
    return folder


def _steps_per_epoch(source: Source) -> float | None:
    return getattr(source, "steps_per_epoch", None)


def _tokens_per_step(source: Source) -> float:
    return getattr(source, "tokens_per_step", math.inf)
