"""Run files that are wrong: what the message says."""

# ruff: noqa: E501  # a table with a case a line reads best
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.config.load import LoadedRun, examine, load_run, parse_run
from burnish.core.errors import ConfigError, Where

Message = Callable[..., str]


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("train: {learning_rat: 1e-4}", "run.yaml:3: train.learning_rat: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("model.quantize: nf4", "run.yaml:3: model.quantize: unknown key 'model.quantize'; in a file sections are nested: 'model: {quantize: ...}'"),
        ("trian: {epochs: 1}", "run.yaml:3: trian: unknown key 'trian'; did you mean 'train'?"),
        ("learning_rate: 1e-4", "run.yaml:3: learning_rate: unknown key 'learning_rate'; did you mean 'train.learning_rate'?"),
        ("train: {workers: 2}", "run.yaml:3: train.workers: unknown key 'workers'; did you mean 'data.workers'?"),
        ("lora_r: 8", "run.yaml:3: lora_r: unknown key 'lora_r'; did you mean 'adapter.rank'?"),
        ("train:\n  gradient_accumulation_steps: 8", "run.yaml:4: train.gradient_accumulation_steps: unknown key 'gradient_accumulation_steps'; did you mean 'train.batch_size (over all devices and accumulation steps)'?"),
        ("zzz: 1", "run.yaml:3: zzz: unknown key 'zzz'; known here: model, adapter, data, objective, train, evaluation, parallel, save, recovery, track, output, resume"),
        ("train: {epochs: many}", "run.yaml:3: train.epochs: expected a number or null, found 'many'"),
        ("train: {learning_rate: '1e-4'}", "run.yaml:3: train.learning_rate: expected a number, found '1e-4'; leave the quotes out"),
        ("train: {learning_rate: .inf}", "run.yaml:3: train.learning_rate: must be a finite number, found inf"),
        ("train: {learning_rate: .nan}", "run.yaml:3: train.learning_rate: must be a finite number, found nan"),
        ("train: {learning_rate: true}", "run.yaml:3: train.learning_rate: expected a number, found true"),
        ("train: {steps: 0}", "run.yaml:3: train.steps: must be at least 1, found 0"),
        ("train: {seed: 4294967296}", "run.yaml:3: train.seed: must be below 4294967296, found 4294967296"),
        ("train: 3", "run.yaml:3: train: expected a section with keys like epochs, steps, tokens, found 3"),
        ("train: {schedule: cosin}", "run.yaml:3: train.schedule.kind: expected 'constant', 'linear', 'cosine', 'wsd', 'inverse_sqrt' or 'polynomial', found 'cosin'; did you mean 'cosine'?"),
        ("train: {schedule: {warmup: 1.5}}", "run.yaml:3: train.schedule.warmup: expected a share of the steps below 1, a number of steps, or a duration like '0.1ep', found 1.5"),
        ("train: {optimizer: {betas: [0.9]}}", "run.yaml:3: train.optimizer.betas.1: is missing: the list is too short"),
        ("train: {optimizer: {betas: [0.9, 1.0]}}", "run.yaml:3: train.optimizer.betas.1: must be below 1, found 1"),
        ("train: {rates: [{match: '(', learning_rate: 1}]}", "run.yaml:3: train.rates.0.match: '(' is no regular expression: missing ), unterminated subpattern at position 0"),
        ("train: {tokens: 1.5G}", "run.yaml:3: train.tokens: expected a number of tokens like 250000000 or '1.5B', found '1.5G'"),
        ("save: {every: 1 epoch}", "run.yaml:3: save.every: expected a duration like '2ep', '500st' or '1.5Btok', found '1 epoch'"),
        ("adapter: {kind: lora, dropout: 1.5}", "run.yaml:3: adapter.dropout: must be below 1, found 1.5"),
        ("adapter: true", "run.yaml:3: adapter: expected a section with keys like kind, rank, alpha, its kind alone or null, found true"),
        ("adapter: {targets: []}", "run.yaml:3: adapter.targets: must not be empty"),
        ("adapter: {targets: 3}", "run.yaml:3: adapter.targets: expected text or a list of texts, found 3"),
        ("objective: sfft", "run.yaml:3: objective.kind: unknown name 'sfft'; did you mean 'sft'? (one of your own is './file.py:Name')"),
        ("objective: {kind: sft, z_lss: 1}", "run.yaml:3: objective.z_lss: unknown key 'z_lss'; did you mean 'z_loss'?"),
        ("objective: [sft]", "run.yaml:3: objective: expected a section with keys like kind, label_smoothing, z_loss or its kind alone, found a list of 1"),
        ("track: csv", "run.yaml:3: track: expected a list of 'csv', 'tensorboard', 'wandb', 'mlflow', 'trackio', found 'csv'"),
        ("track: [csv, tensorbord]", "run.yaml:3: track.1: expected 'csv', 'tensorboard', 'wandb', 'mlflow' or 'trackio', found 'tensorbord'; did you mean 'tensorboard'?"),
        ("resume: yes", "run.yaml:3: resume: expected 'auto', 'force' or 'never', found 'yes'"),
        ("evaluation: {at_start: yes}", "run.yaml:3: evaluation.at_start: expected true or false, found 'yes'; YAML 1.2 writes booleans as true and false"),
        ("output: 3", "run.yaml:3: output: expected text, found 3"),
        ("output: ''", "run.yaml:3: output: must not be empty"),
    ],
)  # fmt: skip
def test_a_wrong_value_gets_exactly_this_sentence(fault: Message, added: str, said: str) -> None:
    assert fault(added) == said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{train: [{pth: rows.jsonl}]}", "data.train.0.pth: unknown key 'pth'; did you mean 'path'?"),
        ("{train: {path: rows.jsonl, weight: -1}}", "data.train.0.weight: must be above 0, found -1"),
        ("{train: {path: rows.jsonl, format: alpca}}", "data.train.0.format: unknown name 'alpca'; did you mean 'alpaca'? (one of your own is './file.py:Name')"),
        ("{train: {path: rows.jsonl, roles: {bot: asst}}}", "data.train.0.roles.bot: expected 'system', 'user', 'assistant' or 'tool', found 'asst'; did you mean 'assistant'?"),
        ("{train: {path: rows.jsonl, columns: [a]}}", "data.train.0.columns: expected a mapping of names to texts, found a list of 1"),
        ("{train: rows.jsonl, eval: 1.5}", "data.eval: must be below 1, found 1.5"),
        ("{train: rows.jsonl, eval: true}", "data.eval: expected a number, a path, a list of paths or null, found true"),
        ("{train: rows.jsonl, eval: {path: 3}}", "data.eval.0.path: expected text, found 3"),
        ("{train: rows.jsonl, eval: [{path: rows.jsonl, limit: 0}]}", "data.eval.0.limit: must be at least 1, found 0"),
        ("{train: rows.jsonl, train_on: asistant}", "data.train_on: expected 'assistant', 'all', 'last' or a list of 'system', 'user', 'assistant', 'tool', found 'asistant'; did you mean 'assistant'?"),
        ("{train: rows.jsonl, train_on: [asistant]}", "data.train_on.0: expected 'system', 'user', 'assistant' or 'tool', found 'asistant'; did you mean 'assistant'?"),
        ("{train: rows.jsonl, workers: many}", "data.workers: expected 'auto' or a whole number, found 'many'"),
        ("{train: rows.jsonl, workers: 0}", "data.workers: must be at least 1, found 0"),
        ("{train: []}", "data.train: must not be empty"),
        ("{train: 5}", "data.train: expected a path or a list of paths, found 5"),
        ("{train: null}", "data.train: expected a path or a list of paths, found null"),
        ("{}", "data.train: is missing"),
    ],
)  # fmt: skip
def test_a_wrong_data_section_gets_exactly_this_sentence(fault: Message, data: str, said: str) -> None:
    assert fault(f"model: a/b\ndata: {data}", whole=True) == f"run.yaml:2: {said}"


def test_every_fault_is_reported_at_once(fault: Message) -> None:
    said = fault(
        "train: {epochs: many, lr: 1}\nadapter: {rank: 0}\nmodle: x\noutput: ${BURNISH_UNSET}/x\nsave: {every: 2x}\n", "train.seed=x"
    )
    assert said.splitlines() == [
        "run.yaml has 7 faults:",
        "  command line: train.seed: expected a whole number, found 'x'",
        "  run.yaml:3: train.epochs: expected a number or null, found 'many'",
        "  run.yaml:3: train.lr: unknown key 'lr'; did you mean 'train.learning_rate'?",
        "  run.yaml:4: adapter.rank: must be at least 1, found 0",
        "  run.yaml:5: modle: unknown key 'modle'; did you mean 'model'?",
        "  run.yaml:6: output: the environment variable BURNISH_UNSET is not set",
        "  run.yaml:7: save.every: expected a duration like '2ep', '500st' or '1.5Btok', found '2x'",
    ]


def test_contradictions_are_reported_beside_wrong_values(fault: Message) -> None:
    said = fault("train: {sede: 1, batch_size: 4, batch_tokens: 4096}\nevaluation: {patience: 2}")
    assert "unknown key 'sede'" in said and "batch_size and batch_tokens of train exclude each other" in said and "needs data.eval" in said


def test_but_not_about_values_that_are_wrong_already(fault: Message) -> None:
    said = fault("model: a/b\ndata: {train: rows.jsonl, eval: 7.0}\nevaluation: {patience: 2}", whole=True)
    assert said == "run.yaml:2: data.eval: must be below 1, found 7"


def test_one_slip_is_one_fault(fault: Message) -> None:
    said = fault("base_model: a/b\ndatasets: [rows.jsonl]", whole=True)
    assert said.splitlines()[1:] == [
        "  run.yaml:1: base_model: unknown key 'base_model'; did you mean 'model'?",
        "  run.yaml:2: datasets: unknown key 'datasets'; did you mean 'data.train'?",
    ]


def test_what_is_missing(fault: Message) -> None:
    assert fault("model: a/b", whole=True) == "run.yaml:1: data: is missing"
    assert fault("data: {train: rows.jsonl}", whole=True) == "run.yaml:1: model: is missing"
    assert fault("", whole=True) == "run.yaml: the file is empty; a run needs at least model and data"


def test_python_callers_get_the_same_sentences(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run({"model": "a/b", "data": {"train": "rows.jsonl"}, "train": {"sede": 1, "clip": -1}})
    assert str(caught.value).splitlines() == [
        "the run has 2 faults:",
        "  train.clip: must be above 0, found -1",
        "  train.sede: unknown key 'sede'; did you mean 'seed'?",
    ]
    assert caught.value.faults == tuple(line.strip() for line in str(caught.value).splitlines()[1:])


def test_python_callers_may_override(folder: Path) -> None:
    run = parse_run({"model": "a/b", "data": {"train": ["rows.jsonl"]}}, overrides=["train.seed=3"])
    assert run.config.train.seed == 3


def test_examine_returns_what_load_raises(folder: Path) -> None:
    Path("run.yaml").write_text("model: a/b\ndata: {train: rows.jsonl}\nzzz: 1\n")
    run, faults = examine("run.yaml")
    assert run is None and [(fault.key, fault.where.line) for fault in faults] == [("zzz", 3)]
    run, faults = examine("nope.yaml")
    assert run is None and [str(fault) for fault in faults] == ["nope.yaml: no such file"]


def test_a_good_file_has_its_values(load: Callable[..., LoadedRun]) -> None:
    config = load("train: {learning_rate: 2e-4, tokens: 1.5B}\nobjective: {kind: sft, z_loss: 1e-4}").config
    assert (config.train.learning_rate, config.train.tokens) == (2e-4, 1_500_000_000)
    assert config.objective.model_dump()["z_loss"] == 1e-4


def test_what_is_found_out_later_has_its_line_too(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "run.yaml"
    file.write_text("model: a/b\ndata:\n  train: rows.jsonl\nparallel:\n  tensor: 3\n")
    loaded = load_run(file)
    with pytest.raises(ConfigError, match=r"run\.yaml:5, field 'parallel\.tensor': too many") as caught, loaded.located():
        raise ConfigError("too many", where=Where(field="parallel.tensor"))
    assert caught.value.where is not None and caught.value.where.line == 5
    with pytest.raises(ConfigError, match=r"^nowhere$"), loaded.located():
        raise ConfigError("nowhere")
    with pytest.raises(ConfigError, match=r"^row 7, field 'text'"), load_run(file).located():
        raise ConfigError("of a row", where=Where(row=7, field="text"))
