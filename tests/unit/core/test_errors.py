from __future__ import annotations

import pickle

import pytest

from burnish.core import errors
from burnish.core.errors import BurnishError, ConfigError, Where


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (Where(), ""),
        (Where("a.yaml"), "a.yaml"),
        (Where("a.yaml", 3), "a.yaml:3"),
        (Where(line=3), "line 3"),
        (Where("a.jsonl", row=2, field="role"), "a.jsonl, row 2, field 'role'"),
    ],
)
def test_places(where: Where, text: str) -> None:
    assert str(where) == text


def test_a_message_begins_with_its_place() -> None:
    assert str(BurnishError("is wrong", where=Where("a", 1))) == "a:1: is wrong"
    assert str(BurnishError("is wrong")) == "is wrong"


def test_all_faults_are_in_the_text() -> None:
    assert str(ConfigError("run.yaml has 2 faults:", faults=["a", "b"])) == "run.yaml has 2 faults:\n  a\n  b"
    assert str(ConfigError("a", faults=["a"])) == "a"


def test_errors_cross_process_boundaries_whole() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BurnishError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("m", where=Where("f", 1), hint="h")))
        assert (type(error), str(error), error.hint, error.exit_code) == (kind, "f:1: m", "h", kind.exit_code)
    assert pickle.loads(pickle.dumps(ConfigError("m", faults=["a", "b"]))).faults == ("a", "b")


def test_exit_codes() -> None:
    assert (BurnishError.exit_code, errors.Interrupted.exit_code) == (2, 3)


def test_nearest_names() -> None:
    assert errors.nearest("Learning_Rat", ["learning_rate", "seed"]) == "learning_rate"
    assert errors.nearest("zzz", ["learning_rate"]) is None
    assert errors.did_you_mean("sede", ["seed"]) == "did you mean 'seed'?"
    assert errors.did_you_mean("zzz", ["b", "a"]) == "known: a, b"
