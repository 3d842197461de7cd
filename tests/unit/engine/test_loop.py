"""The loop: what it writes, what it keeps, when it stops, and that going on is the same as never having stopped."""

import json
import math
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from burnish.config.base import Duration
from burnish.config.sections import Recovery
from burnish.core.errors import CheckpointError, ConfigError, Interrupted, StorageError, TrainingError
from burnish.engine import checkpoint, identity, loop, resume
from burnish.engine.events import Callback, Requests, State
from burnish.engine.loop import Job, due, train
from burnish.engine.step import StepResult

MakeJob = Callable[..., Job]
KEYS = ["step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "seconds", "tokens_per_second"]


def lines(job: Job, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.folder / name).read_text().splitlines()]


def without_clock(found: list[dict[str, float]]) -> list[dict[str, float]]:
    clock = ("seconds", "tokens_per_second", "eval_seconds")
    return [{key: value for key, value in line.items() if key not in clock} for line in found]


def saved_steps(job: Job) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.folders(job.checkpoints)]


class SignalAt(Callback):
    """Sends this process a signal in the middle of a run."""

    def __init__(self, step: int, *, event: str = "step", number: signal.Signals = signal.SIGINT) -> None:
        self.step, self.event, self.number = step, event, number

    def on_step_end(self, state: State, result: StepResult) -> None:
        if self.event == "step" and result.step == self.step:
            signal.raise_signal(self.number)

    def on_eval_start(self, state: State) -> None:
        if self.event == "eval" and state.step == self.step:
            signal.raise_signal(self.number)


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_train_start(self, state: State) -> None:
        self.events.append("train_start")

    def on_step_start(self, state: State) -> None:
        self.events.append(f"step_start {state.step}")

    def on_step_end(self, state: State, result: StepResult) -> None:
        self.events.append(f"step_end {state.step}")

    def on_eval_start(self, state: State) -> None:
        self.events.append("eval_start")

    def on_eval_end(self, state: State, metrics: Mapping[str, float]) -> None:
        self.events.append("eval_end")

    def on_save(self, state: State, folder: Path) -> None:
        self.events.append(f"save {folder.name}")

    def on_train_end(self, state: State) -> None:
        self.events.append("train_end")


def test_a_run_learns_and_writes_one_line_a_step(make_job: MakeJob):
    job = make_job(steps=30)
    outcome = train(job)
    found = lines(job)
    assert [line["step"] for line in found] == list(range(1, 31))
    assert all(list(line) == [*KEYS, "nll", "sure"] for line in found)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert found[0]["nll"] == pytest.approx(found[0]["loss"])
    assert outcome.state.step == 30
    assert outcome.state.tokens == sum(line["tokens"] for line in found)
    assert outcome.guard.parameters == 6
    table = (job.folder / "metrics.csv").read_text().splitlines()
    assert len(table) == 31
    assert table[0].startswith("step,loss,learning_rate") and "eval_perplexity" in table[0]


def test_the_events_come_in_the_documented_order(make_job: MakeJob):
    recorder = Recorder()
    train(
        make_job(steps=2, evaluation={"every": "2st", "at_start": True}, save={"every": "1st", "background": False}, callbacks=[recorder])
    )
    assert recorder.events == [
        *("train_start", "eval_start", "eval_end"),
        *("step_start 0", "step_end 1", "save step-000001"),
        *("step_start 1", "step_end 2", "eval_start", "save step-000002", "eval_end", "train_end"),
    ]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *[(kind, "float32") for kind in ("adamw", "lion", "muon", "sgd", "adafactor", "adamw_schedule_free", "adamw_8bit")],
        *[(kind, "bfloat16") for kind in ("adamw", "adamw_schedule_free")],
        ("adamw", "float16"),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(make_job: MakeJob, kind: str, precision: str):
    settings = {"optimizer": kind, "precision": precision, "dropout": 0.2, "steps": 8, "evaluation": {"every": "3st"}, "weight_decay": 0.1}
    settings["save"] = {"best": False}
    whole = make_job("whole", **settings)
    train(whole)
    stopped = make_job("parts", **settings, callbacks=[SignalAt(4)])
    with pytest.raises(Interrupted):
        train(stopped)
    resumed = make_job("parts", **settings)
    outcome = train(resumed)
    assert outcome.resumed_from == resumed.checkpoints / "step-000004"
    for name, parameter in whole.policy.trainable().items():
        assert torch.equal(parameter, resumed.policy.trainable()[name]), name
    left, left_tensors = checkpoint.flatten(whole.optimizer.state_dict())
    right, right_tensors = checkpoint.flatten(resumed.optimizer.state_dict())
    assert left == right
    assert all(torch.equal(left_tensors[key], right_tensors[key]) for key in left_tensors)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_clock(lines(whole, name)) == without_clock(lines(resumed, name))


def test_a_signal_in_an_evaluation_makes_up_for_it_after_the_resume(make_job: MakeJob):
    settings = {"steps": 6, "evaluation": {"every": "2st"}, "dropout": 0.1}
    whole = make_job("whole", **settings)
    train(whole)
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        train(make_job("parts", **settings, callbacks=[SignalAt(4, event="eval", number=signal.SIGTERM)]))
    resumed = make_job("parts", **settings)
    train(resumed)
    assert without_clock(lines(whole, "eval.jsonl")) == without_clock(lines(resumed, "eval.jsonl"))
    assert [line["step"] for line in lines(resumed, "eval.jsonl")] == [2, 4, 6]


def test_a_signal_saves_and_the_handlers_come_back(make_job: MakeJob):
    before = signal.getsignal(signal.SIGINT)
    job = make_job(callbacks=[SignalAt(3)], save={"every": None})
    with pytest.raises(Interrupted) as caught:
        train(job)
    assert caught.value.exit_code == 3
    assert saved_steps(job) == [3]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_changes_nothing(make_job: MakeJob, number: signal.Signals):
    whole = make_job("whole", steps=4, held_out=False)
    train(whole)
    signalled = make_job("signalled", steps=4, held_out=False, callbacks=[SignalAt(4, number=number)])
    assert train(signalled).state.step == 4
    assert saved_steps(signalled) == saved_steps(whole)
    for name, parameter in whole.policy.trainable().items():
        assert torch.equal(parameter, signalled.policy.trainable()[name]), name


@pytest.mark.parametrize("every", ["2st", "3st"])
def test_a_signal_in_the_last_step_that_cuts_its_evaluation_is_said_and_made_up_for(make_job: MakeJob, every: str):
    settings = {"steps": 4, "evaluation": {"every": every}}
    with pytest.raises(Interrupted, match="stopped after step 4 of 4, before its evaluation"):
        train(make_job("parts", **settings, callbacks=[SignalAt(4)]))
    resumed = make_job("parts", **settings)
    assert train(resumed).evaluation is not None
    assert lines(resumed, "eval.jsonl")[-1]["step"] == 4


def test_lines_after_the_checkpoint_are_cut_when_a_run_goes_on(make_job: MakeJob):
    class Crash(Callback):
        def on_step_end(self, state: State, result: StepResult) -> None:
            if state.step == 7:
                raise RuntimeError("the power is out")

    with pytest.raises(RuntimeError):
        train(make_job(callbacks=[Crash()], save={"every": "5st"}))
    job = make_job(save={"every": "5st"})
    train(job)
    assert [line["step"] for line in lines(job)] == list(range(1, 11))


def test_a_finished_run_trains_no_further_and_keeps_its_result(make_job: MakeJob):
    first = make_job()
    train(first)
    recorder = Recorder()
    again = make_job(callbacks=[recorder])
    train(again)
    assert recorder.events == ["train_start", "train_end"]
    for name, parameter in first.policy.trainable().items():
        assert torch.equal(parameter, again.policy.trainable()[name])


def test_evaluation_is_one_mean_over_all_weight(make_job: MakeJob):
    job = make_job(steps=1, evaluation={"every": "1st"})
    outcome = train(job)
    assert job.eval_batches is not None
    job.policy.eval()
    amount = weight = 0.0
    for batch in job.eval_batches(0):
        for row in range(len(batch.rows)):  # one prediction at a time
            amount -= (batch.token_weights[row] * job.policy.logprobs(batch)[row]).item()
            weight += float(batch.token_weights[row])
    assert outcome.evaluation is not None
    assert outcome.evaluation["eval_loss"] == pytest.approx(amount / weight, rel=1e-6)
    assert outcome.evaluation["eval_perplexity"] == pytest.approx(math.exp(amount / weight), rel=1e-6)


def test_evaluating_does_not_change_the_training(make_job: MakeJob):
    often = make_job("often", dropout=0.3, steps=6, evaluation={"every": "1st", "at_start": True}, save={"best": False})
    never = make_job("never", dropout=0.3, steps=6, held_out=False)
    train(often)
    train(never)
    assert without_clock(lines(often)) == without_clock(lines(never))


class Script:
    """An objective whose eval loss follows a script, and whose training loss is real."""

    needs_reference = False

    def __init__(self, inner: object, losses: list[float]) -> None:
        self.inner, self.losses = inner, iter(losses)

    def __call__(self, policy: object, batch: object) -> object:
        loss = self.inner(policy, batch)
        if not torch.is_grad_enabled():
            loss.sum = torch.tensor(next(self.losses) * batch.weight)
            loss.metrics = {}
        return loss


def scripted(job: Job, losses: list[float]) -> Job:
    assert job.eval_batches is not None
    one = next(iter(job.eval_batches(0)))
    job.eval_batches = lambda halvings: [one]
    job.objective = Script(job.objective, losses)
    return job


def test_the_best_checkpoint_stays_and_is_what_training_ends_with(make_job: MakeJob):
    weights: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(Callback):
        def on_step_end(self, state: State, result: StepResult) -> None:
            weights[state.step] = {name: p.detach().clone() for name, p in job.policy.trainable().items()}

    settings = {"evaluation": {"every": "1st"}, "save": {"every": "1st", "keep": 2}}
    job = scripted(make_job(steps=6, callbacks=[Keep()], **settings), [3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    outcome = train(job)
    assert (outcome.state.best_step, outcome.state.best_loss) == (2, pytest.approx(2.0))
    assert saved_steps(job) == [2, 5, 6]
    for name, parameter in job.policy.trainable().items():
        assert torch.equal(parameter, weights[2][name])


def test_early_stopping_counts_evaluations_without_improvement(make_job: MakeJob):
    job = scripted(make_job(evaluation={"every": "1st", "patience": 2, "min_delta": 0.1}), [3.0, 2.0, 1.95, 1.94, 0.0, 0.0])
    outcome = train(job)
    assert outcome.state.step == 4
    assert outcome.state.stop == "the eval loss has not improved for 2 evaluations"
    assert outcome.state.best_step == 4  # the lowest, though not by enough to go on


def test_an_eval_loss_that_is_not_a_number_is_no_improvement(make_job: MakeJob):
    job = scripted(make_job(steps=3, evaluation={"every": "1st", "patience": 2}), [math.nan, math.nan, 1.0])
    outcome = train(job)
    assert outcome.state.step == 2
    assert outcome.state.best_loss is None
    assert [line["eval_loss"] for line in lines(job, "eval.jsonl")] == [None, None]


def test_old_checkpoints_go(make_job: MakeJob):
    job = make_job(save={"every": "2st", "keep": 2}, held_out=False)
    train(job)
    assert saved_steps(job) == [8, 10]


def test_no_checkpoints_on_request(make_job: MakeJob):
    job = make_job(save={"every": None, "best": False})
    train(job)
    assert not job.checkpoints.exists()


def test_a_damaged_checkpoint_is_passed_over(make_job: MakeJob):
    settings = {"save": {"every": "2st", "keep": 9}, "held_out": False, "dropout": 0.1}
    whole = make_job(**settings)
    train(whole)
    for step in (8, 10):
        file = whole.checkpoints / f"step-{step:06d}" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    again = make_job(**settings)
    outcome = train(again)
    assert outcome.resumed_from == again.checkpoints / "step-000006"
    for name, parameter in whole.policy.trainable().items():
        assert torch.equal(parameter, again.policy.trainable()[name])


def test_a_checkpoint_of_another_run_is_refused(make_job: MakeJob):
    train(make_job(identity={"train.learning_rate": 0.1, "model.path": "a"}))
    with pytest.raises(CheckpointError, match=r"belongs to a run with other settings: train.learning_rate was 0.1, now 0.2"):
        train(make_job(identity={"train.learning_rate": 0.2, "model.path": "a"}))


def test_a_setting_that_an_older_burnish_did_not_know_is_no_other_run(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as older:
        older.setattr(resume, "versions", lambda: {"burnish": "0.0.1"})
        train(make_job(identity={"train.seed": 1}))
    train(make_job(identity={"train.seed": 1, "train.new": True}))
    train(make_job("other", identity={"train.seed": 1}))
    with pytest.raises(CheckpointError, match=r"train\.new was null, now true"):
        train(make_job("other", identity={"train.seed": 1, "train.new": True}))


def test_a_checkpoint_of_another_model_is_refused(make_job: MakeJob):
    train(make_job())
    job = make_job()
    job.policy.model["more"] = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"other trained parameters: more.bias is in this run only"):
        train(job)


def test_a_folder_with_a_run_is_refused_without_resume(make_job: MakeJob):
    train(make_job())
    with pytest.raises(CheckpointError, match="holds a run already, and resume is off"):
        train(make_job(resume="never"))


def test_a_longer_run_goes_on_from_a_shorter_one(make_job: MakeJob):
    train(make_job(steps=4))
    job = make_job(steps=6)
    outcome = train(job)
    assert outcome.resumed_from is not None
    assert [line["step"] for line in lines(job)] == [1, 2, 3, 4, 5, 6]


def test_a_parameter_cut_off_from_the_loss_stops_the_run(make_job: MakeJob):
    job = make_job()
    job.policy.model["unused"] = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=r"2 of 8 trained parameters got no gradient in update 1: unused.weight, unused.bias"):
        train(job)


def test_callbacks_can_end_a_run(make_job: MakeJob):
    class Enough(Callback):
        def on_step_end(self, state: State, result: StepResult) -> None:
            if state.step == 3:
                state.stop = "enough"

    outcome = train(make_job(callbacks=[Enough()]))
    assert (outcome.state.step, outcome.state.stop) == (3, "enough")


@pytest.mark.parametrize(
    ("every", "steps"),
    [("3st", [3, 6]), ("0.5ep", [2, 3, 5, 6]), ("2ep", [6]), ("250tok", [3, 5]), ("0.1ep", [1, 2, 3, 4, 5, 6])],
)
def test_when_things_are_due(every: str, steps: list[int]):
    size = {"steps_per_epoch": 3, "tokens_per_step": 100.0, "key": "save.every"}
    assert [step for step in range(1, 7) if due(Duration.parse(every), step, **size)] == steps
    assert not due(None, 3, **size)


def test_a_stream_has_no_half_epochs():
    with pytest.raises(ConfigError, match=r"'0\.5ep' never comes"):
        due(Duration.parse("0.5ep"), 1, steps_per_epoch=None, tokens_per_step=10, key="save.every")


# What the outside asks for, and what goes wrong.


class TouchAt(Callback):
    """Makes a file in the run folder after a step."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_step_end(self, state: State, result: StepResult) -> None:
        if result.step == self.step:
            self.file.touch()


class PoisonAt(Callback):
    """Makes the weights bad before some steps: the loss of a step is huge, or no number."""

    def __init__(self, job: Job, steps: set[int], factor: float) -> None:
        self.policy, self.steps, self.factor = job.policy, steps, factor

    def on_step_start(self, state: State) -> None:
        if state.step + 1 in self.steps:
            with torch.no_grad():
                self.policy.model["lm_head"].weight.mul_(self.factor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_every_polite_signal_saves_and_stops(make_job: MakeJob, number: signal.Signals):
    job = make_job(callbacks=[SignalAt(3, number=number)])
    with pytest.raises(Interrupted, match="stopped after step 3 of 10") as caught:
        train(job)
    assert caught.value.exit_code == 3 and saved_steps(job) == [3]


def test_a_file_named_stop_saves_and_stops_and_is_gone(make_job: MakeJob):
    job = make_job()
    job.folder.mkdir()
    (job.folder / "STOP").touch()  # left there before the run began: not meant for it
    Requests(job.folder).forget()
    job.callbacks = [TouchAt(4, job.folder / "STOP")]
    with pytest.raises(Interrupted, match="stopped after step 4 of 10"):
        train(job)
    assert saved_steps(job) == [4] and not (job.folder / "STOP").exists()


def test_a_file_named_save_saves_and_goes_on(make_job: MakeJob, capsys: pytest.CaptureFixture[str]):
    job = make_job(save={"every": None, "best": False})
    job.callbacks = [TouchAt(4, job.folder / "SAVE")]
    assert train(job).state.step == 10
    assert saved_steps(job) == [4] and not (job.folder / "SAVE").exists()
    assert "step 4  saved, as" in capsys.readouterr().err


def test_checkpoints_that_stay_for_ever(make_job: MakeJob):
    job = make_job(save={"every": "2st", "keep": 1, "keep_every": "3st", "best": False})
    train(job)
    assert saved_steps(job) == [3, 6, 9, 10]


def test_a_full_disk_ends_no_run_but_the_last_save_must_succeed(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = checkpoint.save

    def full(root: Path, content: checkpoint.Checkpoint) -> Path:
        if content.step in bad:
            raise StorageError(f"step {content.step} could not be written: no space") from OSError(28, "no space")
        return real(root, content)

    monkeypatch.setattr(checkpoint, "save", full)
    bad = {4, 6}
    job = make_job("first", save={"every": "2st", "best": False})
    assert train(job).state.step == 10
    assert saved_steps(job) == [8, 10]
    said = capsys.readouterr().err
    assert said.count("could not be written: no space; training goes on, and the next checkpoint is tried when it is due") == 2
    assert (
        "(4 steps in none so far)" in said or "(5 steps in none so far)" in said
    )  # of the save of step 4, heard of at the next one or before
    bad = {10}
    with pytest.raises(StorageError, match="step 10 could not be written") as caught:
        train(make_job("second", save={"every": "2st", "best": False}))
    assert caught.value.exit_code == 1


SPIKE = {"sigma": 6.0, "window": 8}


def test_a_spike_is_skipped_and_counted(make_job: MakeJob):
    job = make_job(steps=20)
    job.recovery = Recovery.model_validate({"spike": SPIKE})
    job.callbacks = [PoisonAt(job, {15}, 1000.0), PoisonAt(job, {16}, 1 / 1000)]
    outcome = train(job)
    assert outcome.skipped == 1 and [line["step"] for line in lines(job) if line.get("skipped")] == [15]
    assert lines(job)[15]["loss"] < lines(job)[14]["loss"] / 10


def test_a_rollback_takes_the_newest_checkpoint_and_the_data_goes_on(make_job: MakeJob, capsys: pytest.CaptureFixture[str]):
    job = make_job(steps=20, save={"every": "5st", "keep": 9, "best": False}, held_out=False)
    job.recovery = Recovery.model_validate({"spike": {**SPIKE, "action": "rollback"}})
    job.callbacks = [PoisonAt(job, {13}, 1000.0)]
    outcome = train(job)
    assert outcome.state.rollbacks == 1 and outcome.state.step == 20
    assert "the weights are those of " in capsys.readouterr().err
    again = checkpoint.load(job.checkpoints / "step-000010")
    expected = make_job("expected", steps=20, save={"every": None}, held_out=False)
    swap = SwapAt(expected, 13, again)
    expected.callbacks = [swap]
    train(expected)
    for name, value in expected.policy.trainable().items():
        assert torch.equal(value, job.policy.trainable()[name]), name


class SwapAt(Callback):
    """After a step, the weights and the optimiser's state of a checkpoint: what a rollback is, by hand."""

    def __init__(self, job: Job, step: int, content: checkpoint.Checkpoint) -> None:
        self.job, self.step, self.content = job, step, content

    def on_step_end(self, state: State, result: StepResult) -> None:
        if result.step == self.step:
            resume.restore_weights(self.content, self.job.policy.trainable(), Path("none"))
            self.job.optimizer.load_state_dict(self.content.optimizer)


def test_a_run_that_goes_back_too_often_stops(make_job: MakeJob):
    job = make_job(steps=30, save={"every": "5st", "best": False})
    job.recovery = Recovery.model_validate({"spike": {**SPIKE, "action": "rollback"}, "rollbacks": 2})
    job.callbacks = [PoisonAt(job, {13, 16, 19}, 1000.0)]
    with pytest.raises(TrainingError, match=r"go back to an older state at step 19, and it has done so 2 times \(recovery.rollbacks\)"):
        train(job)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(make_job: MakeJob):
    job = make_job(steps=20, save={"every": None, "best": False})
    job.recovery = Recovery.model_validate({"non_finite": "rollback", "patience": 2})
    job.callbacks = [PoisonAt(job, {3}, math.nan)]
    with pytest.raises(TrainingError, match="at step 4, and there is no checkpoint yet"):
        train(job)


def test_what_is_not_finite_for_long_is_rolled_back(make_job: MakeJob):
    job = make_job(steps=12, save={"every": "2st", "best": False})
    job.recovery = Recovery.model_validate({"non_finite": "rollback", "patience": 2})
    job.callbacks = [PoisonAt(job, {7}, math.nan)]
    outcome = train(job)
    assert outcome.skipped == 2 and outcome.state.rollbacks == 1
    assert [line["step"] for line in lines(job) if line["loss"] is None] == [7, 8]
    assert all(torch.isfinite(value).all() for value in job.policy.trainable().values())


def test_non_finite_can_stop_at_once(make_job: MakeJob):
    job = make_job(save={"every": "2st", "best": False})
    job.recovery = Recovery(non_finite="stop")
    job.callbacks = [PoisonAt(job, {5}, math.nan)]
    with pytest.raises(TrainingError, match="the gradient was not finite for 1 step in a row"):
        train(job)
    assert saved_steps(job) == [2, 4]


def test_another_run_is_gone_on_with_by_force_and_said(make_job: MakeJob, capsys: pytest.CaptureFixture[str]):
    train(make_job(steps=4, identity={"train.learning_rate": 0.1}))
    other = make_job(steps=6, identity={"train.learning_rate": 0.2}, resume="force")
    identity.refuse_another_run(other.folder, other.identity, 6, force=True)
    assert "train.learning_rate was 0.1, now 0.2; it goes on nevertheless, as resume: force says" in capsys.readouterr().err
    assert train(other).state.step == 6
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        identity.refuse_another_run(other.folder, {"train.learning_rate": 0.3}, 6)


def test_damaged_checkpoints_step_aside_and_do_not_count_as_kept(make_job: MakeJob):
    settings = {"steps": 8, "save": {"every": "2st", "keep": 2, "best": False}}
    train(make_job(**settings))
    first = make_job(**settings)
    (first.checkpoints / "step-000008" / "model.safetensors").write_bytes(b"")
    stopped = make_job(**{**settings, "save": {"every": "1st", "keep": 1, "best": False}}, callbacks=[SignalAt(7)])
    with pytest.raises(Interrupted):
        train(stopped)
    assert saved_steps(stopped) == [7] and (stopped.checkpoints / "damaged-step-000008").is_dir()
    assert train(make_job(**settings)).resumed_from == stopped.checkpoints / "step-000007"


def test_a_forced_resume_follows_the_settings_of_now(make_job: MakeJob):
    with pytest.raises(Interrupted):
        train(make_job(steps=6, weight_decay=0.1, callbacks=[SignalAt(3)]))
    job = make_job(steps=6, learning_rate=0.001, weight_decay=0.3, optimizer={"kind": "adamw", "betas": (0.5, 0.6)}, resume="force")
    train(job)
    assert {group["peak_lr"] for group in job.optimizer.param_groups} == {0.001}
    assert {group["weight_decay"] for group in job.optimizer.param_groups} == {0.3, 0.0}
    assert {tuple(group["betas"]) for group in job.optimizer.param_groups} == {(0.5, 0.6)}


@pytest.mark.parametrize("kind", ["lion", "sgd"])
def test_a_forced_resume_with_another_optimizer_trains(make_job: MakeJob, kind: str):
    with pytest.raises(Interrupted):
        train(make_job(steps=6, callbacks=[SignalAt(3)]))
    assert train(make_job(steps=6, optimizer=kind, resume="force")).state.step == 6


def test_the_best_checkpoint_is_waited_for(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch):
    last, real = threading.Event(), checkpoint.save

    def slow(*arguments: Any, **options: Any) -> Path:
        last.wait(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, **options: {"eval_loss": next(losses), "eval_seconds": 0.0})
    job = make_job(steps=2, evaluation={"every": "1st"}, save={"every": None, "best": True})
    outcome = train(job)
    assert outcome.state.best_saved == 1
    kept = checkpoint.load(job.checkpoints / "step-000001")
    assert all(torch.equal(value, kept.weights[name]) for name, value in job.policy.trainable().items())


@pytest.mark.parametrize("again", [False, True])
def test_the_best_that_is_written_stays_after_a_resume(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, again: bool):
    real, losses = checkpoint.save, iter([1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0])  # the best but one is that of step 1

    def full(root: Path, content: checkpoint.Checkpoint) -> Path:
        if content.step == 4:
            raise StorageError("step 4 could not be written: no space")
        return real(root, content)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, **options: {"eval_loss": next(losses), "eval_seconds": 0.0})
    settings = {"steps": 7, "evaluation": {"every": "1st"}, "save": {"every": "1st", "keep": 1, "background": False}}
    with pytest.raises(Interrupted):
        train(make_job(**settings, callbacks=[TouchAt(3, make_job(**settings).folder / "STOP")]))
    if again:  # the checkpoint that it goes on from knows of step 4 as the best, which is not there
        with pytest.raises(Interrupted):
            train(make_job(**settings, callbacks=[TouchAt(5, make_job(**settings).folder / "STOP")]))
    job = make_job(**settings)
    assert train(job).state.best_saved == 4 and saved_steps(job) == [1, 7]
    kept = checkpoint.load(job.checkpoints / "step-000001")
    assert all(torch.equal(value, kept.weights[name]) for name, value in job.policy.trainable().items())


@pytest.mark.parametrize("text", ["{}", "[]", '{"state": null}', '{"state": {"best_saved": "1"}}', '{"state": {"best_'])
def test_a_damaged_checkpoint_knows_no_best(tmp_path: Path, text: str):
    for step, content in ((1, '{"state": {"best_saved": 1}}'), (2, text)):
        folder = checkpoint.folder_of(tmp_path, step)
        folder.mkdir()
        (folder / "trainer.json").write_text(content)
    assert resume.written_best(tmp_path) == 1


def test_an_evaluation_that_is_no_longer_asked_for_is_not_waited_for(make_job: MakeJob):
    settings = {"steps": 4, "evaluation": {"every": "2st"}}
    with pytest.raises(Interrupted, match="before its evaluation"):
        train(make_job(**settings, callbacks=[SignalAt(2, event="eval")]))
    outcome = train(make_job(**settings, held_out=False))
    assert outcome.state.step == 4 and not outcome.state.evaluation_pending


def test_an_evaluation_that_is_cut_short_twice_stays_where_it_belongs(make_job: MakeJob):
    settings = {"steps": 6, "evaluation": {"every": "2st", "at_start": True}, "dropout": 0.1}
    whole = make_job("whole", **settings)
    train(whole)
    for step in (0, 2, 2):
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 6, before its evaluation"):
            train(make_job("parts", **settings, callbacks=[SignalAt(step, event="eval")]))
    parts = make_job("parts", **settings)
    train(parts)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert without_clock(lines(whole, name)) == without_clock(lines(parts, name))


def test_a_checkpoint_that_was_asked_for_and_cannot_be_written_ends_no_run(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = checkpoint.save

    def full(root: Path, saved: checkpoint.Checkpoint) -> Path:
        if saved.step == 2:
            raise StorageError("the disk is full")
        return real(root, saved)

    class Ask(Callback):
        def on_step_end(self, state: State, result: StepResult) -> None:
            if result.step == 2:
                (job.folder / "SAVE").touch()

    monkeypatch.setattr(checkpoint, "save", full)
    job = make_job(steps=4, callbacks=[Ask()])
    assert train(job).state.step == 4
    assert saved_steps(job) == [4] and not (job.folder / "SAVE").exists()
    said = capsys.readouterr().err
    assert "the disk is full; training goes on" in said and "saved, as" not in said
