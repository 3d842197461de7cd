from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.document import from_python
from burnish.config.layers import ROOT
from burnish.config.objectives import SFT, Plugin
from burnish.config.run import RunConfig
from burnish.config.shape import ANYTHING, Shape, fields_of, keys_below


def at(*path: str | int) -> Shape:
    shape: Shape | None = ROOT
    for part in path:
        assert shape
        shape = shape.field(part)
    assert shape
    return shape


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("train", "seed"), "a whole number"),
        (("train", "epochs"), "a number or null"),
        (("data", "shuffle"), "true or false"),
        (("data", "workers"), "'auto' or a whole number"),
        (("data", "train"), "a path or a list of paths"),
        (("data", "train", 0, "columns"), "a mapping of names to texts"),
        (("model",), "a section with keys like path, revision, dtype or its path alone"),
        (("train", "optimizer", "betas"), "a list of numbers or null"),
        (("train", "rates"), "a list of sections"),
        (("save", "every"), "a duration like '2ep', '500st' or '1.5Btok' or null"),
    ],
)
def test_what_is_expected_in_words(path: tuple[str | int, ...], words: str) -> None:
    assert at(*path).words() == words


def test_every_key_can_say_what_it_expects() -> None:
    def walk(shape: Shape) -> int:
        assert shape.words()
        return 1 + sum(walk(field) for _, section in shape.sections for field in fields_of(section).values())

    assert walk(ROOT) > 80


def test_the_section_of_a_tagged_union() -> None:
    shape = at("objective")
    assert shape.section() is SFT
    assert shape.section(from_python({"kind": "sft"}, Path()).value) is SFT
    mine = from_python({"kind": "./x.py:Y"}, Path()).value
    assert shape.section(mine) is Plugin and shape.field("beta", mine) is ANYTHING and shape.field("beta") is None


def test_all_keys() -> None:
    keys = set(keys_below(RunConfig))
    assert {
        "model",
        "model.path",
        "data.train.weight",
        "data.eval.weight",
        "train.optimizer.betas",
        "objective.z_loss",
        "train.rates.match",
    } <= keys
    assert at("data", "eval").field("x") is None and at("train", "seed").field("x") is None
