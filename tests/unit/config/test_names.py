from __future__ import annotations

import pytest

from burnish.config.names import ELSEWHERE, nearest_key, unknown_key
from burnish.config.run import RunConfig
from burnish.config.sections import Adapter, Train
from burnish.config.shape import keys_below


@pytest.mark.parametrize(
    ("name", "section", "meant"),
    [
        ("learnig_rate", Train, "learning_rate"),
        ("learning_rate", RunConfig, "train.learning_rate"),
        ("lr", Train, "train.learning_rate"),
        ("rnk", Adapter, "rank"),
        ("max_lenght", RunConfig, "data.max_length"),
        ("qqq", Adapter, None),
    ],
)
def test_the_nearest_key(name: str, section: type, meant: str | None) -> None:
    assert nearest_key(name, section, RunConfig) == meant


def test_without_a_nearest_key_the_known_ones_are_listed() -> None:
    assert unknown_key("qqq", Adapter, RunConfig).startswith("unknown key 'qqq'; known here: kind, rank, alpha")
    assert unknown_key("qqq", None, RunConfig, "train.steps") == "unknown key 'qqq'; train.steps has no keys of its own"


def test_other_tools_names_lead_to_keys_that_exist() -> None:
    known = set(keys_below(RunConfig))
    assert [name for name, key in ELSEWHERE.items() if key.split(":")[0].split(" ")[0] not in known] == []
    assert [name for name in ELSEWHERE if name in known] == []
