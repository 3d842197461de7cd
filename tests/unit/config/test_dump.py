from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from burnish.config.dump import resolved
from burnish.config.load import LoadedRun, dump_run, load_run, parse_run

Load = Callable[..., LoadedRun]


def reload(config: Any, name: str = "resolved.yaml") -> Any:
    Path(name).write_text(dump_run(config))
    return load_run(name).config


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["adapter=lora", "model.quantize=nf4", "train.optimizer={kind: adamw, betas: [0.9, 0.95]}"],
        ["evaluation.every=null", "save.every=10Mtok", "train.clip=null", "train.tokens=1.5B"],
        ["data.eval=[rows.jsonl]", "data.train={path: rows.jsonl, columns: {prompt: 'a: b'}, system: 'on', roles: {bot: assistant}}"],
        ["data.eval=0.1", "train.schedule={kind: wsd, warmup: 0.1ep}", "train.rates=[{match: 'lora_B|x', learning_rate: 0}]"],
        ["adapter={path: org/saved}", "model.new_tokens=['<a>', '- b', '#c']", "train.checkpoint_activations=on", "data.packing=off"],
        ["data.train.system=first\nsecond: ' third '"],
    ],
)
def test_the_resolved_file_reproduces_the_run(load: Load, overrides: list[str]) -> None:
    config = load("", *overrides).config
    again = reload(config)
    assert again == config
    assert dump_run(again) == dump_run(config)


def test_it_does_so_from_another_folder(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("", "output=out").config
    text = dump_run(config)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    Path("resolved.yaml").write_text(text)
    assert load_run("resolved.yaml").config == config


def test_defaults_are_spelled_out(load: Load) -> None:
    plain = YAML(typ="safe", pure=True).load(dump_run(load().config))
    assert plain["train"]["learning_rate"] == 2e-4 and plain["save"] == {"every": "1ep", "keep": 2, "background": True, "best": True}
    assert "adapter" not in plain and "epochs" not in plain["train"]


def test_what_is_null_on_purpose_stays_null(load: Load) -> None:
    plain = resolved(load("", "train.clip=null", "save.every=null").config)
    assert plain["train"]["clip"] is None and plain["save"]["every"] is None  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType, reportOptionalSubscript]


def test_values_of_the_environment_are_not_saved(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_SECRET", "https://user:hunter2@host")
    monkeypatch.setenv("BURNISH_HOME", str(folder))
    config = load("", "data.train=[rows.jsonl, '${BURNISH_SECRET}/rows.json']", "output=${BURNISH_HOME}/out").config
    assert config.data.train[1].path == "https://user:hunter2@host/rows.json"
    text = dump_run(config)
    assert "hunter2" not in text and "${BURNISH_SECRET}/rows.json" in text and "output: ${BURNISH_HOME}/out" in text
    assert reload(config) == config


def test_secrets_in_urls_are_not_saved(load: Load) -> None:
    config = load("", "data.train=https://u:hunter2@host/rows.json?token=hunter3").config
    assert "hunter" not in dump_run(config) and "REDACTED@host" in dump_run(config)


def test_a_config_changed_after_loading_is_saved_as_it_is(load: Load, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("BURNISH_HOME", str(folder))
    config = load("", "output=${BURNISH_HOME}/out").config.model_copy(update={"output": "/other"})
    assert resolved(config)["output"] == "/other"


def test_plug_ins_keep_their_own_keys(load: Load, folder: Path) -> None:
    (folder / "mine.py").write_text("class Loss: pass")
    config = load("objective: {kind: './mine.py:Loss', beta: 0.1, nested: {a: [1]}}").config
    assert reload(config) == config
    assert config.objective.options == {"beta": 0.1, "nested": {"a": [1]}}  # pyright: ignore[reportAttributeAccessIssue]


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    system=words,
    columns=st.dictionaries(words, words, max_size=2),
    rate=st.floats(0, 1),
    every=st.one_of(st.none(), st.integers(1, 10**6), st.sampled_from(["0.5ep", "3st", "1.5Btok"])),
    targets=st.one_of(st.sampled_from(["all", "mlp"]), st.lists(words, min_size=1, max_size=3)),
)
def test_any_run_survives_being_saved(folder: Path, system: str, columns: dict[str, str], rate: float, every: Any, targets: Any) -> None:
    config = parse_run(
        {
            "model": "org/model",
            "adapter": {"targets": targets},
            "data": {"train": {"path": "rows.jsonl", "system": system, "columns": columns}},
            "train": {"learning_rate": rate},
            "save": {"every": every},
        }
    ).config
    assert reload(config) == config
