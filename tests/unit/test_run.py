"""Whole runs over a tiny model: what is said, what is written, and what a second call does."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import burnish
from burnish.cli.main import main
from burnish.core.errors import Interrupted
from burnish.engine.events import Callback, State
from burnish.engine.step import StepResult
from burnish.run import Run

Train = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def run_file(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 3 steps in the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"the user asks {n} ", "completion": f"the assistant answers {n}"} for n in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {tiny_model}\nadapter: {{kind: lora, rank: 4}}\ndata: {{train: rows.jsonl, max_length: 64, cache: ./cache, workers: 1}}\n"
        "train: {steps: 3, batch_size: 4, precision: float32}\noutput: runs/one\n"
    )
    return file


@pytest.fixture
def train(run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """`burnish train run.yaml OVERRIDES`: exit code and stderr."""

    def call(*overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["burnish", "train", str(run_file), *overrides])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


class SignalAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: State, result: StepResult) -> None:
        if result.step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_it_says_what_is_being_loaded(train: Train, tiny_model: Path) -> None:
    code, said = train()
    assert code == 0
    assert said.index(f"loading {tiny_model}") < said.index("training ") < said.index("step 3/3")


def test_before_the_first_step_it_says_what_is_trained_on_and_what_was_lost(train: Train) -> None:
    code, said = train("data.max_length=10")
    assert code == 0
    assert "data: 8 examples, 80 tokens, 32 trained (40.0%); 8 rows longer than data.max_length (16 tokens cut off)\n" in said
    assert "training 4.1k of 32.2k parameters (12.72%) for 3 steps on cpu, in float32\n" in said
    assert said.index("data: ") < said.index("loading ") < said.index("training ") < said.index("kernels: ") < said.index("activations: ")
    assert "warning" not in said.lower()


def test_examples_beyond_the_positions_of_the_model_are_remarked_on(train: Train, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, "short")
    settings = json.loads(Path("short/config.json").read_text()) | {"max_position_embeddings": 10}
    Path("short/config.json").write_text(json.dumps(settings))
    code, said = train("model=short")
    assert code == 0
    assert "warning: examples have up to 12 tokens, the model was made for 10 (lower data.max_length if that is not meant)" in said


def test_examples_beyond_a_table_of_positions_are_an_error(train: Train, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, "short")
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=10)).save_pretrained("short")
    code, said = train("model=short")
    assert code == 2 and "field 'data.max_length': examples have up to 12 tokens, but the model has 10 positions only" in said
    assert not Path("runs").exists()


def test_a_run_folder_that_cannot_be_made(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    run_folder = Path("runs/one").absolute()
    original = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **k: refuse(self) if self == run_folder else original(self, *a, **k))
    code, said = train()
    assert code == 2 and f"field 'output': {run_folder} cannot be made: Read-only file system" in said


def test_schedule_free_says_that_the_schedule_is_not_followed(train: Train) -> None:
    code, said = train("train.optimizer=adamw_schedule_free")
    assert code == 0
    assert said.count("the rate stays constant after the warm-up") == 1
    rates = [json.loads(line)["learning_rate"] for line in Path("runs/one/metrics.jsonl").read_text().splitlines()]
    assert rates[-1] == max(rates)


def test_a_tracker_that_cannot_start_leaves_no_run_folder(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked:
        def __init__(self, project: str, **options: object) -> None:
            raise RuntimeError("no API key")

    real = importlib.util.find_spec  # the whole process sees the patched one
    found = lambda name, *rest: object() if name == "wandb" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("burnish.engine.backend_trackers.importlib.util.find_spec", found)
    monkeypatch.setattr("burnish.engine.backend_trackers.LOGGER_TYPE_TO_CLASS", {"wandb": Locked})
    code, said = train("track=[wandb]")
    assert code == 2 and "the tracker 'wandb' could not start: no API key" in said
    assert not Path("runs").exists()


def test_a_disk_that_holds_no_checkpoint_is_found_before_the_first_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sum(p.nbytes for p in Run.from_file("run.yaml", "adapter=null").policy.model.parameters()) / 1e6
    monkeypatch.setattr("burnish.engine.preflight.free_bytes", lambda folder: 5_000)
    code, said = train("adapter=null")
    needed = (
        f"a checkpoint of {3 * model:.2f} MB and a model of {model:.2f} MB are to be written, and 0.01 MB are free"  # weights, two moments
    )
    assert code == 1 and f"runs/one: {needed}" in said
    assert not Path("runs").exists()
    assert train("adapter=null", "save={every: null, best: false}")[0] == 1  # the model alone does not fit either


def test_a_disk_that_will_be_full_is_said(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.from_file("run.yaml", "adapter=null")
    weights = sum(p.nbytes for p in run.policy.model.parameters())
    monkeypatch.setattr("burnish.engine.preflight.free_bytes", lambda folder: 8 * weights)
    code, said = train("adapter=null", "save.keep=9")
    assert code == 0 and "lower save.keep, or make room" in " ".join(said.split())
    monkeypatch.setattr("burnish.engine.preflight.free_bytes", lambda folder: None)  # the file system does not tell
    assert train("adapter=null", "output=runs/two")[0] == 0


def test_a_disk_that_is_full_at_the_tokenizer_is_no_traceback(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        code, said = train()
    assert code == 1 and "the model cannot be written: No space left on device (os error 28)" in " ".join(said.split())
    assert not Path("runs/one/model").exists()
    assert train()[0] == 0 and Path("runs/one/model").is_dir()


def test_room_for_the_model_is_enough_where_the_last_checkpoint_is_there(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        assert train("adapter=null")[0] == 1
    weights = sum(p.nbytes for p in Run.from_file("run.yaml", "adapter=null").policy.model.parameters())
    monkeypatch.setattr("burnish.engine.preflight.free_bytes", lambda folder: weights + 1)  # a checkpoint would be three times that
    code, said = train("adapter=null")
    assert code == 0 and Path("runs/one/model").is_dir() and "are free" not in said


def test_room_that_an_old_checkpoint_leaves_is_counted(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        Run.from_file("run.yaml", "adapter=null", "save.keep=1", callbacks=[SignalAt(2)]).train()
    weights = sum(p.nbytes for p in Run.from_file("run.yaml", "adapter=null").policy.model.parameters())
    monkeypatch.setattr("burnish.engine.preflight.free_bytes", lambda folder: 3 * weights - 1)
    code, said = train("adapter=null", "save.keep=1")
    needed = f"a checkpoint of {3 * weights / 1e6:.2f} MB and a model of {weights / 1e6:.2f} MB are to be written"
    assert code == 1 and needed in said  # the old one stays until then
    monkeypatch.setattr("burnish.engine.preflight.free_bytes", lambda folder: 3 * weights)  # then the model goes where the old one was
    code, said = train("adapter=null", "save.keep=1")
    assert code == 0 and "are free" not in said


class TestInterrupted:
    def test_it_leaves_a_report_that_says_so(self, run_file: Path) -> None:
        with pytest.raises(Interrupted, match="after step 2 of 3"):
            Run.from_file(run_file, callbacks=[SignalAt(2)]).train()
        assert "2 steps, stopped before its end" in Path("runs/one/report.html").read_text()
        assert not Path("runs/one/finished.json").exists()

    def test_in_the_last_step_it_is_finished(self, run_file: Path) -> None:
        Run.from_file(run_file, callbacks=[SignalAt(3)]).train()
        assert "3 steps, finished" in Path("runs/one/report.html").read_text()
        assert Path("runs/one/model/adapter_model.safetensors").is_file()

    def test_gone_on_with_the_report_is_of_the_whole(self, run_file: Path, train: Train) -> None:
        with pytest.raises(Interrupted):
            Run.from_file(run_file, callbacks=[SignalAt(2)]).train()
        code, said = train()
        assert code == 0 and "going on from" in said
        assert "3 steps, finished" in Path("runs/one/report.html").read_text()


class TestFinished:
    def test_the_same_command_tells_where_the_model_is_and_loads_none(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        assert train()[0] == 0
        weights = Path("runs/one/model/adapter_model.safetensors")
        written = weights.stat().st_mtime_ns
        monkeypatch.setattr("burnish.build.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        code, said = train()
        assert code == 0
        assert "already finished after 3 steps: " in said and str(Path("runs/one/model")) in said
        assert weights.stat().st_mtime_ns == written

    def test_a_longer_run_goes_on(self, train: Train) -> None:
        train()
        code, said = train("train.steps=4")
        assert code == 0 and "going on from" in said and "step 4/4" in said
        assert "already finished after 4 steps" in train("train.steps=4")[1]

    def test_another_run_in_the_same_folder_is_refused_as_before(self, train: Train) -> None:
        train()
        code, said = train("train.learning_rate=0.5")
        assert code == 2 and "belongs to a run with other settings: train.learning_rate" in said

    @pytest.mark.parametrize("change", ["train.learning_rate=0.5", "train.steps=2", "data.max_length=7"])
    def test_a_refused_run_loads_no_model_and_leaves_the_folder_as_it_is(
        self, change: str, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def contents() -> dict[Path, bytes]:
            return {path: path.read_bytes() for path in Path("runs/one").rglob("*") if path.is_file()}

        train()
        before = contents()
        with monkeypatch.context() as patched:
            patched.setattr("burnish.build.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
            assert train(change)[0] == 2
        assert contents() == before
        assert "already finished after 3 steps" in train()[1]

    def test_a_shorter_run_than_the_one_that_is_there_is_refused(self, train: Train) -> None:
        train()
        code, said = train("train.steps=2")
        assert code == 2 and "step-000003 is at step 3, and the run that is asked for ends at step 2" in said

    def test_other_rows_are_noticed(self, train: Train) -> None:
        train()
        with Path("rows.jsonl").open("a") as rows:
            rows.write(json.dumps({"prompt": "more ", "completion": "rows"}) + "\n")
        code, said = train()
        assert code == 2 and "belongs to a run with other data: the rows have changed" in said and "data.rows" in said

    def test_of_several_sources_the_one_that_changed_is_named(self, train: Train) -> None:
        shutil.copy("rows.jsonl", "others.jsonl")
        train("data.train=[rows.jsonl, others.jsonl]")
        shutil.copy("rows.jsonl", "new.jsonl")
        code, said = train("data.train=[rows.jsonl, new.jsonl]")
        where = Path.cwd()
        assert code == 2
        assert f'other settings: data.train.1.path was "{where}/others.jsonl", now "{where}/new.jsonl"\n' in said

    def test_held_out_rows_that_change_are_other_rows(self, train: Train) -> None:
        train("data.eval=0.2")
        code, said = train("data.eval=0.4")
        assert code == 2 and "or which of them are held out (data.rows)" in said

    def test_a_share_that_is_held_out_is_compared_before_rows_are_read(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        train("data.eval=0.2")
        monkeypatch.setattr("burnish.run.prepare", lambda *_, **__: pytest.fail("rows were read"))
        code, said = train("data.eval=0.4")
        assert code == 2 and "belongs to a run with other data: data.eval was 0.2, now 0.4" in said

    def test_other_weights_under_the_adapter_are_refused_and_a_copy_is_not(self, train: Train, tiny_model: Path) -> None:
        shutil.copytree(tiny_model, "base")
        assert train("model=base")[0] == 0
        shutil.copytree("base", "moved")
        code, said = train("model=moved", "train.steps=4")
        assert code == 0 and "step 4/4" in said
        with Path("moved/model.safetensors").open("r+b") as weights:
            weights.seek(-1, 2)
            weights.write(b"\x01")
        code, said = train("model=moved", "train.steps=5")
        assert code == 2 and "the weights of the base model have changed" in said
        code, said = train("model=moved", "train.steps=5", "resume=force")
        assert code == 0 and "the weights of the base model have changed" in said and "step 5/5" in said

    def test_weights_that_are_trained_whole_come_from_the_checkpoint(self, train: Train, tiny_model: Path) -> None:
        shutil.copytree(tiny_model, "base")
        assert train("model=base", "adapter=null")[0] == 0
        with Path("base/model.safetensors").open("r+b") as weights:
            weights.seek(-1, 2)
            weights.write(b"\x01")
        code, said = train("model=base", "adapter=null", "train.steps=4")
        assert code == 0 and "going on from" in said

    def test_settings_are_compared_before_rows_are_read(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        train()
        monkeypatch.setattr("burnish.run.prepare", lambda *_, **__: pytest.fail("rows were read"))
        code, said = train("train.learning_rate=0.5")
        assert code == 2 and "train.learning_rate was" in said

    def test_a_new_version_of_the_code_that_makes_the_same_rows_is_no_other_run(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train()
        monkeypatch.setattr("burnish.data.prepare._code_version", lambda: "another")
        assert "already finished after 3 steps" in train()[1]

    def test_a_finished_model_without_checkpoints_is_not_overwritten(self, train: Train) -> None:
        train()
        shutil.rmtree("runs/one/checkpoints")
        weights = Path("runs/one/model/adapter_model.safetensors").read_bytes()
        assert "already finished after 3 steps" in train()[1]
        code, said = train("train.learning_rate=0.5")
        assert code == 2 and "finished.json belongs to a run with other settings: train.learning_rate" in said
        code, said = train("train.steps=4")
        assert code == 2 and "no checkpoint from which a run of 4 could go on" in said
        assert train("resume=never")[0] == 2
        assert Path("runs/one/model/adapter_model.safetensors").read_bytes() == weights
        code, said = train("train.learning_rate=0.5", "resume=force")
        assert code == 0 and "there is no checkpoint: it is trained from the start and overwritten" in " ".join(said.split())
        assert Path("runs/one/model/adapter_model.safetensors").read_bytes() != weights

    def test_another_optimizer_by_force_begins_without_state(self, train: Train) -> None:
        train()
        code, said = train("train.optimizer=sgd", "train.steps=5", "resume=force")
        assert code == 0 and "the optimiser's state is of adamw, which sgd cannot use" in " ".join(said.split())

    def test_a_forced_run_that_trains_other_weights_leaves_the_folder_as_it_is(self, train: Train) -> None:
        def contents() -> dict[Path, bytes]:
            return {path: path.read_bytes() for path in Path("runs/one").rglob("*") if path.is_file()}

        train()
        before = contents()
        code, said = train("adapter=null", "train.steps=5", "resume=force")
        assert code == 2 and "was made with other trained parameters: base_model.model" in " ".join(said.split())
        assert contents() == before and "already finished after 3 steps" in train()[1]

    def test_stop_of_before_is_removed_and_said_and_while_loading_it_counts(
        self, train: Train, run_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(Interrupted):
            Run.from_file(run_file, callbacks=[SignalAt(1)]).train()
        stop = Path("runs/one/STOP")
        stop.touch()
        load = burnish.build.load_model
        monkeypatch.setattr("burnish.build.load_model", lambda *a, **k: (stop.touch(), load(*a, **k))[1])
        code, said = train()
        assert code == 3 and "STOP from before this run: removed" in said and "stopped after step 2 of 3" in said
        assert not stop.exists()

    @pytest.mark.parametrize("spoil", [lambda run: (run / "finished.json").write_text("{"), lambda run: (run / "finished.json").unlink()])
    def test_without_a_whole_marker_the_checkpoint_tells(self, train: Train, spoil: Callable[[Path], object]) -> None:
        train()
        spoil(Path("runs/one"))
        code, said = train()
        assert code == 0 and "going on from" in said and "step 3 of 3" in said

    def test_never_means_never(self, train: Train) -> None:
        train()
        code, said = train("resume=never")
        assert code == 2 and "resume is 'never'" in said

    def test_from_python_the_weights_are_there(self, run_file: Path) -> None:
        first, second = Run.from_file(run_file), Run.from_file(run_file)
        first.train()
        assert second.train().state.step == 3
        theirs = second.policy.trainable()
        assert all(value.equal(theirs[name]) for name, value in first.policy.trainable().items())


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "keeping"])
def test_a_loaded_model_computes_the_same_in_the_trainer_of_transformers(tiny_model: Path, checkpointing: bool) -> None:
    """`burnish.load`: fast modules on or off, three steps of somebody else's loop over padded batches give the same losses."""
    losses: dict[str, list[float]] = {}
    for kernels in ("auto", "off"):
        torch.manual_seed(0)  # the adapter's initial weights
        policy = burnish.load({"path": str(tiny_model), "kernels": kernels}, adapter={"rank": 4}, precision="float32")
        assert all(slot.replaced == slot.found > 0 for slot in policy.kernels.slots.values())
        assert bool(policy.kernels.slots) == (kernels == "auto")
        before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
        texts = [policy.tokenizer(f"the user asks {'again ' * n}").input_ids for n in range(6)]
        arguments = TrainingArguments(
            f"runs/{kernels}",
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
        )
        collate = DataCollatorForLanguageModeling(policy.tokenizer, mlm=False)
        trainer = Trainer(policy.model, arguments, data_collator=collate, train_dataset=[{"input_ids": ids} for ids in texts])
        trainer.train()
        losses[kernels] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert not any(weight.equal(before[name]) for name, weight in policy.trainable().items())
    assert len(losses["auto"]) == 3 and losses["auto"][-1] < losses["auto"][0]
    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-4)
