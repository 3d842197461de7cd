from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from burnish.core import plugins
from burnish.core.errors import ConfigError


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text("import math as m\nfrom os import path\n\nclass Loss:\n    hidden = 1\n\nalpha, (beta, *rest) = 1, (2, 3)\n")
    return file


def test_an_object_is_loaded_from_a_file(mine: Path) -> None:
    made = plugins.load_object("./mine.py:Loss", mine.parent)
    assert made.hidden == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert plugins.load_object(f"{mine}:Loss", Path("/")) is made
    assert pickle.loads(pickle.dumps(made)) is made


def test_the_working_directory_comes_before_the_base(mine: Path) -> None:
    base = mine.parent / "base"
    base.mkdir()
    (base / "mine.py").write_text("class Loss: hidden = 2\n")
    (base / "other.py").write_text("class Loss: hidden = 3\n")
    assert plugins.load_object("mine.py:Loss", base).hidden == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert plugins.load_object("other.py:Loss", base).hidden == 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["Loss", "alpha", "beta", "rest", "m", "path"])
def test_a_check_finds_every_way_of_naming(mine: Path, name: str) -> None:
    assert plugins.check_object(f"mine.py:{name}", mine.parent) == f"{mine}:{name}"


def test_a_check_runs_nothing(mine: Path) -> None:
    mine.write_text("raise SystemExit\nclass Loss: pass\n")
    assert plugins.check_object("mine.py:Loss", mine.parent)


def test_what_only_running_could_tell_is_allowed(mine: Path) -> None:
    mine.write_text("from somewhere import *\n")
    assert plugins.check_object("mine.py:Anything", mine.parent)


@pytest.mark.parametrize(
    ("text", "reference", "words"),
    [
        ("class Loss: pass\n", "mine.py:Los", "mine.py: defines no 'Los'; did you mean 'Loss'?"),
        ("class Loss: pass\n", "mine.py:hidden", "known: Loss"),
        ("", "mine.py:Loss", "it is empty"),
        ("class Loss(:\n", "mine.py:Loss", "mine.py:1: is not valid Python"),
        ("x = '\x00'\n", "mine.py:Loss", "is not valid Python"),
        ("", "none.py:Loss", "no Python file at"),
        ("", "mine.txt:Loss", "expected './file.py:Name'"),
        ("", "mine.py:", "expected './file.py:Name'"),
    ],
)
def test_bad_references(mine: Path, text: str, reference: str, words: str) -> None:
    mine.write_text(text)
    with pytest.raises(ConfigError) as checked:
        plugins.check_object(reference, mine.parent)
    with pytest.raises(ConfigError) as loaded:
        plugins.load_object(reference, mine.parent)
    assert words in str(checked.value) and words in str(loaded.value)


def test_an_error_in_the_file_names_its_line(mine: Path) -> None:
    mine.write_text("x = 1\n\ndef f():\n    return 1 / 0\n\nf()\n")
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=r"mine\.py:4: cannot be imported: ZeroDivisionError: division by zero"):
        plugins.load_object("mine.py:f", mine.parent)
    assert set(sys.modules) == before


def test_built_in_kinds_are_files() -> None:
    assert "sections" in plugins.names("config") and "base" not in plugins.names("config") and "__init__" not in plugins.names("config")
    assert plugins.built_in("config", "sections").__name__ == "burnish.config.sections"
    assert "chatml" in plugins.names("data.templates", ".jinja")
    with pytest.raises(ConfigError, match="unknown kind 'sectoins' of config; did you mean 'sections'"):
        plugins.built_in("config", "sectoins")


def test_installed_packages_offer_parts(monkeypatch: pytest.MonkeyPatch, mine: Path) -> None:
    entry = SimpleNamespace(name="theirs", load=lambda: "loaded")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == "burnish.config" else [])
    assert plugins.load("config", "theirs", mine.parent) == "loaded"
    assert plugins.load("config", "sections", mine.parent) is plugins.built_in("config", "sections")
    assert plugins.load("config", "mine.py:alpha", mine.parent) == 1
    with pytest.raises(ConfigError, match="unknown kind 'thiers'"):
        plugins.load("config", "thiers", mine.parent)
