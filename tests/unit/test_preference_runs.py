"""Whole runs of the preference objectives on a tiny model: every way to the same numbers leads to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import burnish
from burnish.core.errors import ConfigError, DataError, Interrupted, ModelError
from burnish.engine.events import Callback, State
from burnish.engine.step import StepResult
from burnish.run import Run

ROWS = Path(__file__).parents[2] / "recipes" / "data" / "preferences.jsonl"
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return {
        "model": str(tiny_model),
        "adapter": LORA,
        "data": {"train": {"path": str(ROWS), "limit": 24}, "eval": 0.25, "max_length": 256, "cache": str(tmp_path / "cache")},
        "objective": {"kind": "dpo"},
        "train": {"steps": 6, "batch_size": 6, "learning_rate": 0.01, "precision": "float32"},
        "evaluation": {"every": "3st"},
        "save": {"every": None},
    }


def changed(settings: dict[str, Any], **sections: Any) -> dict[str, Any]:
    made = dict(settings)
    for name, value in sections.items():
        made[name] = {**made[name], **value} if isinstance(value, dict) and isinstance(made.get(name), dict) else value
    return made


def train(settings: dict[str, Any], name: str, **sections: Any) -> list[dict[str, Any]]:
    """The lines of a run's metrics and evaluations."""
    Run.from_config(changed(settings, output=f"runs/{name}", **sections)).train()
    return [json.loads(line) for file in ("metrics", "eval") for line in Path(f"runs/{name}/{file}.jsonl").read_text().splitlines()]


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float = 2e-4) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"seconds", "tokens_per_second", "eval_seconds", "tokens"}:
            assert mine[key] == pytest.approx(theirs[key], rel=rel, abs=2e-5), key


def test_every_reference_gives_the_same_run(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = train(settings, "auto")
    assert "reference: log-probabilities computed once and kept on disk (each example is looked at" in capsys.readouterr().err
    for kind in ("adapter_off", "copy", "precomputed"):
        assert_same(train(settings, kind, objective={"kind": "dpo", "reference": kind}), chosen)
    assert capsys.readouterr().err.count("the log-probabilities of data.train are reused from") == 1  # by `precomputed`
    assert chosen[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and chosen[5]["reward_margin"] > 0.05


def test_one_pass_needs_no_precomputing(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train(settings, "one", train={"steps": 3}, evaluation={"every": None}, data={"eval": None})
    assert "the model without its adapter, in the same batches (each example is looked at once)" in capsys.readouterr().err


def test_full_fine_tuning_keeps_no_second_model(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    whole = changed(settings, adapter=None, train={"learning_rate": 0.001})
    chosen = train(whole, "auto")
    assert "computed once and kept on disk (no second model in memory)" in capsys.readouterr().err
    assert_same(train(whole, "copy", objective={"kind": "dpo", "reference": "copy"}), chosen)


def test_a_longer_run_computes_only_what_is_new(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = {"objective": {"kind": "dpo", "reference": "precomputed"}, "data": {"eval": None, "shuffle": False}}
    train(settings, "short", train={"steps": 2}, **options)
    (kept,) = (Path(settings["data"]["cache"])).glob("*.reference.npy")
    import numpy as np

    values = np.load(kept)
    known = int(np.isfinite(values).sum())
    assert 0 < known < len(values)
    train(settings, "long", train={"steps": 4}, **options)
    after = np.load(kept)
    assert np.isfinite(after).all() and np.array_equal(after[np.isfinite(values)], values[np.isfinite(values)])
    kept.write_bytes(b"torn")
    capsys.readouterr()
    train(settings, "again", train={"steps": 4}, **options)
    assert "are damaged" in capsys.readouterr().err and np.allclose(np.load(kept), after, atol=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "simpo", "cpo", "orpo", "reward", "kto"])
def test_packing_and_shared_prompts_change_nothing(settings: dict[str, Any], objective: str) -> None:
    chosen = train(settings, "auto", objective={"kind": objective})
    assert_same(train(settings, "alone", objective={"kind": objective}, data={"packing": "off"}), chosen)
    small = {"micro_batch_tokens": 300}
    separate = {"share_prompts": "off"} if objective != "kto" else {}
    assert_same(train(settings, "separate", objective={"kind": objective}, data=separate, train=small), chosen)


class StopAt(Callback):
    """A signal in the middle of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: State, result: StepResult) -> None:
        if state.step == self.step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "objective",
    [{"kind": "kto"}, {"kind": "reward"}, {"kind": "dpo", "sync": {"every": "2st", "mix": 1.0}}, {"kind": "dpo", "loss": ["aot", "sft"]}],
)
def test_resumed_equals_uninterrupted(settings: dict[str, Any], objective: dict[str, Any]) -> None:
    whole = train(settings, "whole", objective=objective)
    stopped = changed(settings, objective=objective, output="runs/stopped")
    with pytest.raises(Interrupted):
        Run.from_config(stopped, callbacks=[StopAt(3)]).train()
    assert_same(train(settings, "stopped", objective=objective), whole, rel=0)


def test_a_reference_that_follows_makes_another_run(settings: dict[str, Any]) -> None:
    fixed = train(settings, "fixed", adapter=None, train={"learning_rate": 0.001})
    moving = train(
        settings, "moving", adapter=None, train={"learning_rate": 0.001}, objective={"kind": "dpo", "sync": {"every": "2st", "mix": 0.5}}
    )
    assert [line["loss"] for line in moving[:2]] == pytest.approx([line["loss"] for line in fixed[:2]], rel=1e-5)
    assert abs(moving[3]["loss"] - fixed[3]["loss"]) > 1e-3
    assert moving[3]["kl"] < fixed[3]["kl"]


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_streamed_rows(settings: dict[str, Any], objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = train(settings, "stream", objective={"kind": objective}, data={"streaming": True, "eval": None}, evaluation={"every": None})
    assert len(lines) == 6 and lines[-1]["loss"] < lines[0]["loss"]
    if objective == "dpo":
        assert "the model without its adapter, in the same batches (the rows are streamed)" in capsys.readouterr().err


def test_an_evaluation_at_the_start_alone_has_a_reference_too(settings: dict[str, Any]) -> None:
    whole = {"adapter": None, "train": {"steps": 2, "learning_rate": 0.001}}
    lines = train(settings, "start", evaluation={"every": None, "at_start": True}, **whole)
    assert lines[-1]["step"] == 0 and lines[-1]["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)


MOVING = {"kind": "dpo", "sync": {"every": "1st", "mix": 1.0}}


@pytest.mark.parametrize("objective", ["dpo", "kto", {"kind": "dpo", "loss": "aot_unpaired"}, MOVING])
def test_a_loop_of_ones_own_is_the_same_run(settings: dict[str, Any], objective: Any) -> None:
    kind = {"kind": objective} if isinstance(objective, str) else objective
    whole = train(settings, "whole", objective=kind, data={"eval": None}, evaluation={"every": None}, train={"micro_batch_tokens": 400})
    run = Run.from_config(
        changed(
            settings,
            objective=kind,
            data={"eval": None},
            train={"micro_batch_tokens": 400},
            output="runs/own",
            evaluation={"every": None},
        )
    )
    losses = [result.loss for batch in run.batches() if (result := run.step(run.loss(batch))) is not None]
    assert losses == pytest.approx([line["loss"] for line in whole], rel=1e-6)


def test_a_process_reward_model(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"What is {n} + 1?", "completions": [f"It is one more than {n}.", f"So {n + 1 + n % 2}."], "labels": [True, n % 2 == 0]}
        for n in range(24)
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = train(settings, "steps", objective={"kind": "process_reward"}, data={"train": str(tmp_path / "steps.jsonl")})
    assert lines[5]["loss"] < lines[0]["loss"] and 0 <= lines[-1]["eval_accuracy"] <= 1
    assert json.loads(Path("runs/steps/model/adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"


def test_distillation_from_a_teacher(settings: dict[str, Any]) -> None:
    data = {"train": {"path": str(ROWS.with_name("service_desk.jsonl")), "limit": 24}}
    whole = {"data": data, "adapter": None, "train": {"steps": 20}}
    train(settings, "teacher", objective={"kind": "sft"}, **whole)
    lines = train(settings, "student", objective={"kind": "distill", "teacher": "runs/teacher/model"}, **whole)
    first, last = lines[0], lines[19]
    assert last["divergence"] < 0.8 * first["divergence"] and last["nll"] < first["nll"]
    assert lines[-1]["eval_perplexity"] > 1 and 0 <= lines[-1]["eval_agreement"] <= 1


def test_a_teacher_with_other_tokens_is_refused(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    data = {"train": {"path": str(ROWS.with_name("service_desk.jsonl")), "limit": 24}}
    with pytest.raises(ModelError, match=r"has another tokenizer: the token .* is not the same in both"):
        train(settings, "distilled", objective={"kind": "distill", "teacher": str(other)}, data=data)


def test_rows_and_settings_that_do_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"they fit messages"):
        train(settings, "sft-rows", data={"train": str(ROWS.with_name("service_desk.jsonl"))})
    with pytest.raises(DataError, match="the rows are preference pairs"):
        train(settings, "pairs", objective={"kind": "sft"})
    with pytest.raises(ConfigError, match=r"compares answers, so data\.train_on: all means nothing to it"):
        train(settings, "all", data={"train_on": "all"})
    with pytest.raises(ConfigError, match="split cuts answers that dpo compares whole"):
        train(settings, "split", data={"overlong": "split"})
    with pytest.raises(ConfigError, match="it belongs to simpo, known here: kind, beta, loss"):
        train(settings, "gamma", objective={"kind": "dpo", "gamma": 1.0})
    with pytest.raises(ConfigError, match=r"objective\.loss_weights\.0: must be at least 0, found -1"):
        train(settings, "negative", objective={"kind": "dpo", "loss_weights": [-1.0]})
    Path("half.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    with pytest.raises(DataError, match="the rows have 'chosen' but no 'rejected'"):
        train(settings, "half", data={"train": "half.jsonl"})
    Path("unclear.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "label": "perhaps"}) + "\n")
    with pytest.raises(DataError, match="expected true or false, 1 or 0, or good or bad, found the text 'perhaps'"):
        train(settings, "unclear", objective={"kind": "kto"}, data={"train": "unclear.jsonl", "eval": None})
    assert not Path("runs").exists()


def test_doubtful_pairs_are_counted_and_said(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def turns(asked: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    rows = [(turns("Snow?", "White."), turns("Snow?", answer)) for answer in ("Black.", "White.", "Grey.")]
    rows.append((turns("Snow?", "White."), turns("Coal?", "Black.")))
    Path("rows.jsonl").write_text("".join(json.dumps({"chosen": one, "rejected": other}) + "\n" for one, other in rows))
    train(settings, "pairs", data={"train": "rows.jsonl", "eval": None, "max_length": 70}, evaluation={"every": None}, train={"steps": 1})
    said = capsys.readouterr().err
    assert "1 pair with equal answers; 1 pair with different prompts" in said
    account = json.loads(Path("runs/pairs/data.json").read_text())
    assert account["packing"]["fullness"] <= 1


def test_the_rate_follows_the_objective(settings: dict[str, Any]) -> None:
    plain = {key: value for key, value in settings.items() if key != "train"}
    rates = {kind: Run.from_config(plain | {"objective": {"kind": kind}}).config.train.learning_rate for kind in ("sft", "dpo", "reward")}
    assert rates == {"sft": 2e-4, "dpo": 5e-6, "reward": 1e-4}
    assert burnish.Run.from_config(settings).config.train.learning_rate == 0.01


def test_an_objective_of_ones_own_says_what_it_compares(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from burnish.objectives.base import branch_sums\n"
        "def margin(policy, batch):\n"
        "    sums = branch_sums(policy.token_stats(batch).logprobs, batch)\n"
        "    return -(0.01 * (sums[0::2] - sums[1::2])).sigmoid().sum()\n"
        "margin.batch_kind = 'pairs'\n"
    )
    lines = train(settings, "own", objective={"kind": "./mine.py:margin"})
    assert lines[5]["loss"] < lines[0]["loss"]
    (tmp_path / "wrong.py").write_text("def f(policy, batch):\n    return 0\nf.batch_kind = 'pair'\n")
    with pytest.raises(ConfigError, match="batch_kind is 'pair'; did you mean 'pairs'"):
        train(settings, "wrong", objective={"kind": "./wrong.py:f"})
