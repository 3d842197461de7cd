"""A run: the one place where settings become objects.

    run = Run.from_file("run.yaml")
    run.train()                                what `burnish train run.yaml` does

or the loop in your own hands, with a loss of your own if you like:

    run = Run.from_file("run.yaml")
    for batch in run.batches():                micro-batches, flat and on the device, until the run's last step
        loss = run.loss(batch)                 the objective's sum over this micro-batch
        run.step(loss)                         backward; with the last micro-batch of a step also clip, check, update
    run.save()

Each part is built when it is first asked for, in the order in which the properties stand here: the data before the model, so that bad rows
are found before weights are loaded, and everything before the run folder, so that bad input leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerFast

from burnish.build import build_objective, build_policy, build_teacher, fit_activations, settle_strategy
from burnish.config.dump import dump_run, resolved
from burnish.config.load import load_run, parse_run
from burnish.config.objectives import Distill, Plugin, batch_kind
from burnish.config.run import RunConfig
from burnish.config.sections import Adapter, Model
from burnish.core.errors import CheckpointError, ConfigError, Interrupted
from burnish.core.log import busy, info
from burnish.core.signals import Stopped
from burnish.data.account import Account
from burnish.data.cache import Examples
from burnish.data.loader import ExampleSet, Loader, eval_batches
from burnish.data.prepare import Prepared, prepare, prepare_eval
from burnish.data.render import Renderer
from burnish.data.stream import StreamLoader
from burnish.data.types import Batch, BatchKind
from burnish.engine import checkpoint, loop, preflight, reference, resume
from burnish.engine.backend import Backend, Precision
from burnish.engine.events import Callback, State
from burnish.engine.folder import RunFolder
from burnish.engine.identity import ROWS, identity_of, marks_of, refuse_another_run
from burnish.engine.optim import build_optimizer
from burnish.engine.step import Stepper, StepResult, begin_step
from burnish.engine.together import agree, once_per_machine
from burnish.engine.watchdog import Watchdog
from burnish.models.locate import locate
from burnish.models.policy import Policy
from burnish.models.save import save_model
from burnish.models.tokenizer import load_tokenizer
from burnish.objectives.base import Loss, Objective

T = TypeVar("T")
DEFAULT_BATCH_SIZE = 32
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class Run:
    """One training run.

    Args:
        config: The settings.
        base: Folder that relative paths of plug-ins belong to.
        callbacks: What is called while training, see `engine.events.Callback`.
    """

    def __init__(self, config: RunConfig, *, base: Path | None = None, callbacks: Sequence[Callback] = ()) -> None:
        self.config = _dated(config)
        self.base = base or Path.cwd()
        self.callbacks = list(callbacks)
        self._batch: Batch | None = None
        self._activations = "activations: as the run file says"
        self._compiled = ""

    @classmethod
    def from_file(cls, path: str | Path, *overrides: str, callbacks: Sequence[Callback] = ()) -> Run:
        """The run of a run file, with `key=value` overrides.

        Raises:
            ConfigError: the file or an override is wrong; all faults are reported together.
        """
        return cls(load_run(path, overrides).config, base=Path(path).resolve().parent, callbacks=callbacks)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, callbacks: Sequence[Callback] = ()) -> Run:
        """The run of a mapping with the keys of a run file.

        Raises:
            ConfigError: as for a file.
        """
        return cls(parse_run(config, base=Path.cwd()).config, callbacks=callbacks)

    # The parts, in the order in which they are built.

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @cached_property
    def backend(self) -> Backend:
        """Devices and precision, and how they share the work."""
        parallel, train = self.config.parallel, self.config.train
        backend = Backend(precision=train.precision, parallel=parallel, timeout=parallel.timeout, deterministic=train.deterministic)
        settle_strategy(self.config, backend)
        return backend

    @cached_property
    def watchdog(self) -> Watchdog:
        """Finds the rank that does not answer."""
        backend = self.backend
        return Watchdog(backend.rank, backend.world_size, timeout=self.config.parallel.timeout, folder=self.folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer, with the new tokens and the chat template of the run."""
        return load_tokenizer(self.config.model)

    @cached_property
    def renderer(self) -> Renderer:
        """Turns rows into token ids and the trained mask."""
        return Renderer.of(self.tokenizer, self.config.data)

    @cached_property
    def kind(self) -> BatchKind:
        """What the objective compares, and so which rows it can use."""
        return batch_kind(self.config.objective, self.base)

    @cached_property
    def data(self) -> Prepared:
        """The tokenised data and its account; of streamed data, which is not there yet, see `loader` and `held_out`."""
        data = self._prepared(lambda: prepare(self.config.data, self.renderer, seed=self.config.train.seed, kind=self.kind, base=self.base))
        parts = [data.train, *([data.eval] if data.eval is not None else [])]
        agree(" ".join(f"{part.fingerprint}/{part.selection()}" for part in parts), what="the training rows", backend=self.backend)
        return data

    def _prepared(self, work: Callable[[], T]) -> T:
        """Rows are tokenised once for each machine: the other ranks find them in the cache."""
        return once_per_machine(work, what="prepare the data", backend=self.backend)

    @cached_property
    def held_out(self) -> Examples | None:
        """The tokenised held-out data."""
        data = self.config.data
        if not data.streaming:
            return self.data.eval
        held_out = self._prepared(lambda: prepare_eval(data, self.renderer, seed=self.config.train.seed, kind=self.kind, base=self.base))
        return held_out[0] if held_out else None

    @property
    def account(self) -> Account:
        """What became of every row and token; it grows while data is streamed."""
        return self.loader.account if isinstance(self.loader, StreamLoader) else self.data.account

    @cached_property
    def loader(self) -> Loader | StreamLoader:
        """The micro-batches of each step."""
        train, data = self.config.train, self.config.data
        batch_size = self._batch_size
        device = {"rank": self.backend.data_rank, "world_size": self.backend.data_world_size, "micro_batch_tokens": self.micro_batch_tokens}
        if data.streaming:
            return StreamLoader(
                data,
                self.renderer,
                batch_size=batch_size,
                batch_tokens=train.batch_tokens,
                seed=train.seed,
                base=self.base,
                kind=self.kind,
                mismatched=self._mismatched,
                processes=self.backend.world_size,
                **device,
            )
        return Loader(
            self.data.train,
            batch_size=batch_size,
            batch_tokens=train.batch_tokens,
            max_length=data.max_length,
            packing=data.packing,
            shuffle=data.shuffle,
            seed=train.seed,
            mismatched=self._mismatched,
            **device,
        )

    @property
    def _batch_size(self) -> int | None:
        """Examples of a step; None where a step is counted in tokens."""
        train = self.config.train
        return None if train.batch_tokens else train.batch_size or DEFAULT_BATCH_SIZE

    @property
    def _mismatched(self) -> bool:
        """Whether the objective wants every answer once more, under another prompt."""
        return not isinstance(self.config.objective, Plugin) and self.config.objective.mismatched

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens computed at once, on all devices that share a micro-batch together."""
        asked = self.config.train.micro_batch_tokens
        return MICRO_BATCH_TOKENS.get(self.backend.device.type, 8192) * self.backend.grid.context if asked == "auto" else asked

    @cached_property
    def policy(self) -> Policy:
        """The model to train, with its adapter."""
        self.backend.seed(self.config.train.seed)  # the adapter's initial weights
        model = self.config.model
        with busy(f"loading {model.path}", spinner=locate(model.path).kind != "hub"):  # a download has a bar of its own
            judges = None if isinstance(self.config.objective, Plugin) else self.config.objective.judges
            policy = build_policy(model, self.config.adapter, self.backend, self.tokenizer, judges=judges)
            self._activations = fit_activations(self.config.train, policy, self.backend, self.micro_batch_tokens)
            if self.config.train.compile == "auto":
                with self.backend.autocast():
                    self._compiled = policy.compile_layers(self.micro_batch_tokens)
        policy.noise(getattr(self.config.objective, "neftune_alpha", 0.0))
        self.backend.shard(policy)
        return policy

    @cached_property
    def objective(self) -> Objective:
        """What is minimised."""
        teacher = self.teacher if isinstance(self.config.objective, Distill) else None
        return build_objective(self.config, self.base, teacher=teacher)

    @cached_property
    def teacher(self) -> Policy:
        """The model that a distilled one learns from, frozen."""
        objective = cast(Distill, self.config.objective)
        with busy(f"loading the teacher {objective.teacher}"):
            return build_teacher(objective.teacher, self.backend, self.tokenizer)

    @cached_property
    def job(self) -> loop.Job:
        """All of it, as the training loop takes it."""
        source, policy, held_out = self.loader, self.policy, self.held_out
        if self.objective.needs_reference:
            held_out = self._reference(policy)
        if self.config.train.optimizer.in_backward and isinstance(source, Loader):
            preflight.refuse_cut_steps(source.tokens_per_step / self.backend.data_world_size, self.micro_batch_tokens)
        passes = partial(self._eval_batches, held_out) if held_out is not None else None
        return loop.Job(
            policy=policy,
            objective=self.objective,
            source=source,
            optimizer=build_optimizer(
                policy.trainable(),
                self.config.train,
                in_backward=self.config.train.optimizer.in_backward,
                parted=self.backend.parted,
            ),
            backend=self.backend,
            train=self.config.train,
            folder=self.folder,
            evaluation=self.config.evaluation,
            save=self.config.save,
            recovery=self.config.recovery,
            eval_batches=passes,
            callbacks=[*self.callbacks, *self._moves, self.watchdog],
            identity=self._identity,
            resume=self.config.resume,
        )

    def _eval_batches(self, held_out: ExampleSet, halvings: int) -> Iterator[Batch]:
        budget = max(1, self.micro_batch_tokens >> halvings)
        options = {"packing": self.config.data.packing, "mismatched": self._mismatched}
        return self.watchdog.counted(eval_batches(held_out, budget, self.backend.data_rank, self.backend.data_world_size, **options))

    @cached_property
    def _files(self) -> RunFolder:
        return RunFolder(self.folder, active=self.backend.is_main)

    @cached_property
    def _moves(self) -> list[Callback]:
        """What moves the reference, in a run where it follows the policy."""
        return reference.moves(self.policy, self.config, self.loader)

    def _reference(self, policy: Policy) -> ExampleSet | None:
        """Gets the reference's log-probabilities ready; returns the held-out examples, with theirs where they are computed already."""
        train = None if self.config.data.streaming else self.data.train
        return reference.prepare(
            policy, self.config, self.loader, train, self.held_out, self.total_steps, self.backend, self.micro_batch_tokens
        )

    @cached_property
    def stepper(self) -> Stepper:
        """What a loop of your own steps with."""
        self.policy.train()
        self.backend.seed(self.config.train.seed, per_rank=True)
        return loop.build_stepper(self.job, self.total_steps)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return loop.length_of(self.loader, self.config.train)

    # The whole run in one call.

    def train(self) -> loop.Outcome:
        """Trains, saves the model and writes the report.

        Raises:
            BurnishError: see `core.errors`; before the first step nothing is written.
        """
        self._refuse_to_overwrite(self._settings, None)
        self._refuse_to_overwrite(self._identity, self.total_steps)
        began = time.perf_counter()
        if not self.config.data.streaming:
            info(self.account.line())
        self.watchdog.start()
        try:
            return self._train(began)
        finally:
            self.watchdog.stop()

    def _train(self, began: float) -> loop.Outcome:
        job = self.job
        sets = () if self.config.data.streaming else (self.data.train, self.held_out)
        preflight.look_at_lengths(self.policy.model, sets, self.config.data.max_length)
        if self._mismatched and not self.config.data.streaming:
            preflight.tell_lone_answer(len(self.data.train), self._batch_size)
        resume.refuse_other_parameters(self.folder / "checkpoints", self.policy)
        preflight.look_at_disk(self.folder, self.policy, self.backend, self.config, self.total_steps)
        info(preflight.announcement(self.policy, self.backend, self.total_steps))
        for line in filter(None, (*preflight.notes(self.policy, self.backend, self.config), self._activations, self._compiled)):
            info(line)
        # Before the run folder is made: a tracker without its key is wrong input, which leaves nothing behind.
        job.trackers = self.backend.trackers(self.config.track, name=self.folder.name, folder=self.folder, config=resolved(self.config))
        self.open()
        try:
            outcome = loop.train(job)
            job.trackers.close()
            self.save()
            self._files.report()
            if outcome.state.step == self.total_steps:  # not where it was stopped early, which a longer patience may undo
                self._files.finish(outcome.state.step, self._identity)
            seconds = time.perf_counter() - began
            info(f"done in {seconds:.0f} s: {self._files.model}  report: {self.folder / 'report.html'}")
        except (Interrupted, Stopped):
            self._files.report(stopped=True)
            raise
        finally:
            job.trackers.close()
            self._files.lock.release()
        return outcome

    # The loop in the user's hands.

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this rank, on the device, until the run's last step."""
        while self.stepper.step < self.total_steps:
            for batch in begin_step(self.loader.next(self.policy), self.objective, self.policy, self.backend):
                self._batch = batch
                yield batch

    def loss(self, batch: Batch) -> Loss:
        """The run's objective on a micro-batch: a sum, which `step` divides by the weight of the whole step."""
        with self.backend.autocast():
            return self.backend.compute(lambda: self.objective(self.policy, batch))

    def step(self, loss: Loss | torch.Tensor, batch: Batch | None = None) -> StepResult | None:
        """Adds the gradient of one micro-batch; with the last one of its step, updates the weights.

        Args:
            loss: The sum over the micro-batch's weight, as `loss` gives it, or a scalar tensor of your own.
            batch: The micro-batch; left out, the one that `batches` gave last.

        Returns:
            What the update did, or None where the step has more micro-batches.
        """
        batch = batch or self._batch
        if batch is None:
            raise ValueError("step needs a batch: take one from batches(), or pass it")
        self.stepper.accumulate(loss if isinstance(loss, Loss) else Loss(loss), batch)
        if not batch.last:
            return None
        result = self.stepper.update()
        for callback in self._moves:
            callback.on_step_end(State(self.total_steps, step=result.step), result)
        return result

    def save(self) -> Path:
        """Writes the trained model (the adapter as a PEFT folder, or the whole model) into the run folder, and returns the place."""
        target, alone = self._files.model, not self._files.lock.held
        self.open()
        try:
            with self.backend.whole(frozen=self.config.adapter is None):
                if self.backend.is_main:
                    save_model(self.policy.model, self.tokenizer, target)
            self.backend.barrier()
        finally:
            if alone:
                self._files.lock.release()
        return target

    def open(self) -> None:
        """Makes the run folder, with the resolved run file and the account of the data."""
        self._files.open(dump_run(self.config), self.account.to_json())

    @property
    def finished(self) -> Path | None:
        """The trained model, if the run folder holds this very run (the same settings, data and length) and it is finished.

        The data is prepared for that, or taken from its cache; the model is not loaded.

        Raises:
            CheckpointError: it holds a run with other settings.
            ConfigError: another process writes to it.
        """
        if self.config.resume == "never" or not self.folder.is_dir():
            return None
        self._refuse_to_overwrite(self._settings, None)
        return self._files.model if self._files.is_finished(self.total_steps, self._identity) else None

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Of its identity, what is known before there are rows."""
        return identity_of(self.config) | marks_of(self.config)

    @property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint of this run must share with it."""
        rows = {} if self.config.data.streaming else {ROWS: self.data.train.identity()}
        return self._settings | rows

    def _refuse_to_overwrite(self, identity: Mapping[str, Any], total: int | None) -> None:
        """A refused run must leave the folder of another one as it is: its settings, its model, and the note that it is finished.

        What needs no rows is compared before they are prepared; then there is no `total`, and nothing that is forced is said yet.
        """
        asked = self.config.resume
        self._files.lock.look()
        if asked == "never" and (self._files.note.is_file() or checkpoint.newest(self.folder / "checkpoints") is not None):
            raise CheckpointError(
                f"{self.folder} holds a run already, and resume is 'never'",
                hint="choose another output folder, or resume: auto to go on with this run",
            )
        if total is not None or asked != "force":
            refuse_another_run(self.folder, identity, total, force=asked == "force")
        self._files.forget_requests()


def _dated(config: RunConfig) -> RunConfig:
    """Pins the day that chat templates see: the one that the run began on, so that a run resumed next week has the same tokens."""
    if config.data.date is not None:
        return config
    begun = Path(config.output) / "run.yaml"
    try:
        day = load_run(begun).config.data.date if begun.is_file() else None
    except ConfigError:  # not a file of ours, or of another version: what it says does not matter here
        day = None
    return config.model_copy(update={"data": config.data.model_copy(update={"date": day or date.today().isoformat()})})


def train(path: str | Path, *overrides: str, callbacks: Sequence[Callback] = ()) -> loop.Outcome:
    """Trains as a run file says: `burnish.train("run.yaml", "train.epochs=2")`."""
    return Run.from_file(path, *overrides, callbacks=callbacks).train()


def load(
    model: str | Mapping[str, Any],
    *,
    adapter: Mapping[str, Any] | None = None,
    trainable: bool = True,
    precision: Precision = "auto",
) -> Policy:
    """Loads a model for use in anyone's training code.

    Args:
        model: Hub id, folder, `file.gguf` or `package:NAME`, or a mapping with the keys of the run file's `model`.
        adapter: Keys of the run file's `adapter`, e.g. `{"rank": 16}`; None is the whole model.
        trainable: Whether weights will be trained; without, they are frozen.
        precision: Type of the matrix products; `auto` is bfloat16 where the device computes it fast.

    Returns:
        A Policy: `.model` is an ordinary transformers (or PEFT) model, which the HF Trainer and TRL take as it is, and
        `.tokenizer` its tokenizer.
        Its own `token_stats` computes flat batches without padding and without stored logits.

    Raises:
        ModelError: the model cannot be loaded.
        AdapterError: the adapter does not fit it.
    """
    settings = Model.model_validate({"path": model} if isinstance(model, str) else dict(model))
    backend = Backend(precision=precision)
    tokenizer = load_tokenizer(settings)
    policy = build_policy(settings, Adapter.model_validate(dict(adapter)) if adapter is not None else None, backend, tokenizer)
    if not trainable:
        policy.model.requires_grad_(False)
        policy.eval()
    return policy
