from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.config.load import LoadedRun

Load = Callable[..., LoadedRun]
Message = Callable[..., str]


def test_extends_merges_key_by_key(load: Load, folder: Path) -> None:
    (folder / "base.yaml").write_text("train: {epochs: 3, learning_rate: 1e-3, optimizer: {kind: adamw, eps: 1e-6}}\nadapter: lora\n")
    config = load("extends: base.yaml\ntrain: {learning_rate: 5e-4, optimizer: {betas: [0.9, 0.95]}}\nadapter: {rank: 4}").config
    assert (config.train.epochs, config.train.learning_rate) == (3, 5e-4)
    assert (config.train.optimizer.eps, config.train.optimizer.betas) == (1e-6, (0.9, 0.95))
    assert config.adapter and config.adapter.rank == 4


def test_extends_is_relative_to_its_file_and_may_be_a_list(load: Load, folder: Path) -> None:
    (folder / "shared" / "deep").mkdir(parents=True)
    (folder / "shared" / "a.yaml").write_text("extends: deep/b.yaml\ntrain: {seed: 1}\n")
    (folder / "shared" / "deep" / "b.yaml").write_text("train: {seed: 2, clip: 0.5}\n")
    (folder / "c.yaml").write_text("train: {seed: 3}\n")
    config = load("extends: [shared/a.yaml, c.yaml]").config
    assert (config.train.seed, config.train.clip) == (3, 0.5)


def test_values_know_which_file_they_came_from(load: Load, folder: Path) -> None:
    (folder / "base.yaml").write_text("\ntrain:\n  seed: 7\n")
    run = load("extends: base.yaml", "train.clip=0.5")
    assert str(run.places["train.seed"]) == "base.yaml:3"
    assert str(run.where("train.clip")) == "command line"
    assert str(run.where("data.max_length")) == "run.yaml:2" and str(run.where("save.keep")) == "run.yaml"
    assert "save" not in run.places and "output" not in run.places


def test_loops_and_missing_bases(fault: Message, folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b.yaml\n")
    (folder / "b.yaml").write_text("extends: a.yaml\n")
    assert "run.yaml:3: extends: the file extends itself: run.yaml -> run.yaml" in fault("extends: run.yaml")
    assert "b.yaml:1: extends: the file extends itself: a.yaml -> b.yaml -> a.yaml" in fault("extends: a.yaml")
    assert "extends: no such file:" in fault("extends: nope.yaml")
    assert "expected a file or a list of files" in fault("extends: {a: b}")


def test_faults_of_a_base_are_reported_in_the_base(fault: Message, folder: Path) -> None:
    (folder / "base.yaml").write_text("train:\n  sede: 7\n")
    said = fault("extends: base.yaml\nsave: {kep: 1}")
    assert "base.yaml:2: train.sede: unknown key" in said and "run.yaml:4: save.kep: unknown key" in said


def test_short_forms_meet_as_long_forms(load: Load) -> None:
    config = load("model: {path: a/b, revision: v1}\ndata: {train: rows.jsonl}\nadapter: lora", "model=c/d", whole=True).config
    assert (config.model.path, config.model.revision) == ("c/d", "v1")


def test_another_kind_replaces_the_section(load: Load) -> None:
    config = load(
        "train: {optimizer: {kind: adamw, eps: 1e-6}, schedule: {kind: wsd, decay: 0.5}}",
        "train.optimizer=lion",
        "train.schedule.kind=linear",
    ).config
    assert config.train.optimizer.eps == 1e-8 and config.train.schedule.decay == 0.2


def test_keys_that_exclude_each_other_replace_each_other(load: Load) -> None:
    train = load("train: {epochs: 3, batch_size: 8}", "train.steps=10", "train.batch_tokens=4096").config.train
    assert (train.epochs, train.steps, train.batch_size, train.batch_tokens) == (None, 10, None, 4096)
    assert load("train: {epochs: 3}", "train.steps=null").config.train.epochs == 3


def test_but_not_within_one_layer(fault: Message) -> None:
    assert "epochs and steps of train exclude each other" in fault("", "train.steps=10", "train.epochs=1")
    assert "epochs and steps of train exclude each other" in fault("train: {epochs: 1, steps: 10}")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=1", "train.learning_rate", 1),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.tokens=1.5B", "train.tokens", 1_500_000_000),
        ("adapter=null", "adapter", None),
        ("adapter=lora", "adapter.rank", 16),
        ("adapter.rank=8", "adapter.rank", 8),
        ("adapter.targets=[q_proj, v_proj]", "adapter.targets", ["q_proj", "v_proj"]),
        ("adapter.targets=mlp", "adapter.targets", "mlp"),
        ("data.eval=0.1", "data.eval", 0.1),
        ("data.train_on=[user, assistant]", "data.train_on", ["user", "assistant"]),
        ("data.train.limit=5", "data.train.0.limit", 5),
        ("data.train.0.system=You are: terse", "data.train.0.system", "You are: terse"),
        ("data.train.columns.prompt=question", "data.train.0.columns", {"prompt": "question"}),
        ("data.train={path: rows.jsonl, weight: 2}", "data.train.0.weight", 2.0),
        ("model.revision=1e5", "model.revision", "1e5"),
        ("model.revision=2024", "model.revision", "2024"),
        ("model.revision=null", "model.revision", None),
        ("model.new_tokens=[<a>, <b>]", "model.new_tokens", ["<a>", "<b>"]),
        ("train.checkpoint_activations=on", "train.checkpoint_activations", "on"),
        ("train.clip=null", "train.clip", None),
        ("train.rates=[{match: lora_B, learning_rate: 1e-3}]", "train.rates.0.match", "lora_B"),
        ("objective.z_loss=1e-4", "objective.z_loss", 1e-4),
        ("--train.seed=3", "train.seed", 3),
        ("train.seed = 4", "train.seed", 4),
    ],
)
def test_overrides_are_typed_by_the_schema(load: Load, override: str, key: str, value: object) -> None:
    found: object = load("", override).config
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
    assert found == value


def test_the_last_override_wins_and_they_build_on_each_other(load: Load) -> None:
    config = load("", "train.seed=1", "train.seed=2", "data.train=[rows.jsonl, rows.jsonl]", "data.train.1.weight=3").config
    assert config.train.seed == 2 and [source.weight for source in config.data.train] == [1, 3]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=2", "command line: train.epoch: unknown key 'epoch'; did you mean 'train.epochs'?"),
        ("learning_rate=1", "did you mean 'train.learning_rate'?"),
        ("train.epochs", "expected key=value, found 'train.epochs'"),
        ("=3", "expected key=value"),
        ("train.learning_rate=fast", "train.learning_rate: expected a number, found 'fast'"),
        ("train.epochs=", "train.epochs: expected a number or null, found ''"),
        ("train.steps.x=1", "train.steps has no keys of its own"),
        ("data.train.7.limit=5", "no item '7': data.train is a list of 1"),
        ("train.rates.0.match=x", "unknown key"),
        ("train.seed=1.5", "expected a whole number, found 1.5"),
        ("train.seed=null", "expected a whole number, found null"),
    ],
)
def test_bad_overrides(fault: Message, override: str, words: str) -> None:
    assert words in fault("", override)


def test_an_item_must_be_named_where_there_are_several(fault: Message) -> None:
    assert "no item 'limit': data.train is a list of 2" in fault("", "data.train=[rows.jsonl, rows.jsonl]", "data.train.limit=3")


def test_an_override_of_the_kind_says_which_keys_it_takes_away(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    config = load("objective: {kind: dpo, beta: 0.3, loss: ipo}", "objective.kind=simpo", "objective.beta=2.0").config
    assert config.objective.kind == "simpo" and config.objective.beta == 2.0
    assert "warning: objective.kind=simpo replaces the section: the file's loss of 'dpo' is left out" in capsys.readouterr().err
    load("objective: {kind: dpo, beta: 0.3}", "objective.kind=dpo")
    load("objective: dpo", "objective.kind=simpo")
    assert capsys.readouterr().err == ""
