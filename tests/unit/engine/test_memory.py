"""Memory that runs out: the same step again in smaller micro-batches, with the same result."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.engine.conftest import TinyExamples, TinyObjective, TinyPolicy

from burnish.config.sections import Recovery
from burnish.core.errors import Interrupted, TrainingError
from burnish.data.loader import Loader
from burnish.data.types import Batch
from burnish.engine.backend import Backend
from burnish.engine.events import Callback, State
from burnish.engine.launcher import MEMORY_NOTE
from burnish.engine.loop import Job, train
from burnish.engine.step import StepResult, is_out_of_memory
from burnish.objectives.base import Loss

MakeJob = Callable[..., Job]
WORDS = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes."


class Small(TinyObjective):
    """A device that holds so many tokens at once, from the step on that `begin` says; it fails in the forward or the backward pass."""

    def __init__(self, room: int, *, begin: int = 1, backward: bool = False) -> None:
        self.room, self.begin, self.backward = room, begin, backward
        self.step = 1
        self.seen: list[int] = []

    def __call__(self, policy: TinyPolicy, batch: Batch) -> Loss:
        tokens = len(batch.input_ids)
        self.seen.append(tokens)
        too_much = tokens > self.room and self.step >= self.begin and torch.is_grad_enabled()
        if too_much and not self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        loss = super().__call__(policy, batch)
        if too_much:
            loss.sum.register_hook(fail)
        return loss


class Counting(Callback):
    def __init__(self, objective: Small) -> None:
        self.objective = objective

    def on_step_end(self, state: State, result: StepResult) -> None:
        self.objective.step = result.step + 1


def fail(gradient: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(WORDS)


def source(micro_batch_tokens: int) -> Loader:
    return Loader(TinyExamples(40), batch_size=8, max_length=16, micro_batch_tokens=micro_batch_tokens, seed=42)


def run(make_job: MakeJob, folder: str, objective: Small, tokens: int = 40, **settings: Any) -> Job:
    job = make_job(folder, callbacks=[Counting(objective)], **settings)
    job.source, job.objective = source(tokens), objective
    return job


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in job.policy.trainable().items()}


@pytest.mark.parametrize("backward", [False, True])
def test_it_is_the_run_that_had_smaller_micro_batches_bit_for_bit(
    make_job: MakeJob, backward: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(make_job, "whole", Small(100), tokens=20, dropout=0.2)
    train(whole)
    halved = run(make_job, "halved", Small(20, backward=backward), dropout=0.2)
    outcome = train(halved)
    assert outcome.state.halvings == 1 and halved.source.micro_batch_tokens == 20  # pyright: ignore[reportAttributeAccessIssue]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(halved)[name]), name
    said = capsys.readouterr().err
    assert "memory ran out in step 1: it is computed once more in micro-batches of at most 20 tokens, and so is all that follows" in said


def test_in_the_middle_of_a_run_the_loss_goes_on_as_it_would_have(make_job: MakeJob) -> None:
    whole, small = run(make_job, "whole", Small(100)), run(make_job, "small", Small(12, begin=4))
    train(whole)
    assert train(small).state.halvings == 2
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(small)[name], value, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_begins_with_what_fitted(make_job: MakeJob) -> None:
    class Stop(Callback):
        def on_step_end(self, state: State, result: StepResult) -> None:
            if result.step == 3:
                (job.folder / "STOP").touch()

    whole = run(make_job, "whole", Small(20), dropout=0.2)
    train(whole)
    job = run(make_job, "parts", Small(20), dropout=0.2)
    job.callbacks = [*job.callbacks, Stop()]
    with pytest.raises(Interrupted):
        train(job)
    objective = Small(20)
    resumed = run(make_job, "parts", objective, dropout=0.2)
    assert train(resumed).state.halvings == 1 and max(objective.seen) <= 20
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_one_example_that_does_not_fit_ends_the_run_and_names_its_length(make_job: MakeJob) -> None:
    job = run(make_job, "run", Small(6), save={"every": "1st"})
    with pytest.raises(TrainingError, match=r"memory ran out in step 1 with one example of \d+ tokens at a time") as caught:
        train(job)
    assert caught.value.hint is not None and "data.max_length" in caught.value.hint


def test_where_it_is_not_wanted_the_run_ends_with_a_sentence(make_job: MakeJob) -> None:
    job = run(make_job, "run", Small(20))
    job.recovery = Recovery(out_of_memory="stop")
    with pytest.raises(TrainingError, match=r"memory ran out in step 1, in micro-batches of up to \d+ tokens"):
        train(job)


def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that cannot leave a micro-batch alone."""
    monkeypatch.setattr(Backend, "coupled", True)


def test_ranks_that_wait_for_each_other_begin_again_smaller(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(make_job, "whole", Small(20), dropout=0.2)
    train(whole)
    together(monkeypatch)
    with pytest.raises(TrainingError, match=r"memory ran out in step 1, in micro-batches of up to \d+ tokens") as caught:
        train(run(make_job, "parts", Small(20), dropout=0.2))
    assert caught.value.hint == "the same command goes on from the newest checkpoint, in micro-batches of half as many tokens"
    again = run(make_job, "parts", Small(20), dropout=0.2)
    assert train(again).state.halvings == 1
    assert "memory ran out before: micro-batches have at most 20 tokens now, instead of 40" in capsys.readouterr().err
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name
    assert not (again.folder / MEMORY_NOTE).exists()


def test_a_note_of_other_micro_batches_or_of_nonsense_is_not_heeded(make_job: MakeJob) -> None:
    for note in ('{"micro_batch_tokens": 80, "halvings": 2}', "{}", "[]", "not json", '{"micro_batch_tokens": 40, "halvings": "x"}'):
        job = run(make_job, f"run-{len(note)}", Small(100))
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / MEMORY_NOTE).write_text(note)
        assert train(job).state.halvings == 0


def test_one_example_leaves_no_note(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    together(monkeypatch)
    job = run(make_job, "run", Small(6), tokens=1)
    with pytest.raises(TrainingError, match="memory ran out in step 1") as caught:
        train(job)
    assert caught.value.hint is not None and "data.max_length" in caught.value.hint
    assert not (job.folder / MEMORY_NOTE).exists()


def test_an_update_is_not_repeated(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = run(make_job, "run", Small(100))

    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(job.optimizer, "step", fail)
    with pytest.raises(TrainingError, match="memory ran out in the update of step 1, which may be done by half"):
        train(job)


def test_memory_that_runs_out_between_ranks_is_no_traceback(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(backend: Backend, parameters: object) -> None:
        raise RuntimeError(WORDS)

    monkeypatch.setattr(Backend, "average_gradients", none_left)
    with pytest.raises(TrainingError, match="memory ran out while the gradients of step 1 were averaged"):
        train(run(make_job, "run", Small(100)))


def test_an_evaluation_is_repeated_too(make_job: MakeJob) -> None:
    class Narrow(Small):
        def __call__(self, policy: TinyPolicy, batch: Batch) -> Loss:
            if not torch.is_grad_enabled() and len(batch.input_ids) > self.room:
                raise RuntimeError(WORDS)
            return super().__call__(policy, batch)

    whole, small = run(make_job, "whole", Small(100)), run(make_job, "small", Narrow(100))
    small.objective.room = 20  # pyright: ignore[reportAttributeAccessIssue]
    settings = {"steps": 2}
    whole.train, small.train = (job.train.model_copy(update=settings) for job in (whole, small))
    there, here = train(whole).evaluation, train(small).evaluation
    assert there is not None and here is not None and here["eval_loss"] == pytest.approx(there["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError(WORDS), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_so(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_what_has_failed_is_gone_before_it_is_tried_again(make_job: MakeJob) -> None:
    class Watched(Small):
        """Remembers the loss of each call, and which of them were still there at the next one."""

        def __init__(self) -> None:
            super().__init__(20, backward=True)
            self.last: weakref.ref[torch.Tensor] | None = None
            self.left: list[bool] = []

        def __call__(self, policy: TinyPolicy, batch: Batch) -> Loss:
            self.left.append(self.last is not None and self.last() is not None)
            tokens = len(batch.input_ids)
            loss = super().__call__(policy, batch)
            self.last = weakref.ref(loss.sum) if tokens > self.room else None  # of what fails
            return loss

    objective = Watched()
    train(run(make_job, "run", objective, held_out=False))
    assert objective.seen[0] > 20 >= max(objective.seen[1:])
    assert not any(objective.left)
