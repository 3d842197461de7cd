"""Whether a checkpoint belongs to a run."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from burnish.config.run import RunConfig
from burnish.core.errors import ModelError
from burnish.engine.identity import ROWS, difference, identity_of, marks_of, versions
from burnish.models import locate


def config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": {"train": ["a.json"]}, **changes})


def test_what_decides_the_result_is_part_of_the_identity():
    assert identity_of(config()) == identity_of(config())
    for change in (
        {"model": "other"},
        {"data": {"train": ["b.json"]}},
        {"data": {"train": ["a.json"], "max_length": 7}},
        {"objective": {"kind": "sft", "z_loss": 0.1}},
        {"adapter": {"kind": "lora"}},
        {"train": {"seed": 1}},
        {"train": {"optimizer": "lion"}},
        {"train": {"precision": "float32"}},
    ):
        assert identity_of(config(**change)) != identity_of(config()), change


def test_what_does_not_may_change():
    for change in (
        {"output": "elsewhere"},
        {"save": {"every": "1st", "keep": 5}},
        {"evaluation": {"every": "1st"}},
        {"track": ["tensorboard"]},
        {"train": {"steps": 9, "micro_batch_tokens": 512, "checkpoint_activations": "on"}},
        {"data": {"train": ["a.json"], "workers": 3}},
    ):
        assert identity_of(config(**change)) == identity_of(config()), change


def test_null_is_the_same_as_left_out():
    assert identity_of(config(model={"path": "m", "revision": None})) == identity_of(config())


def test_only_plain_values():
    assert identity_of(config())["train.schedule.kind"] == "cosine"


def recorded(identity: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"identity": identity, "versions": versions(), **others}


def test_every_change_is_listed():
    then = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
    found = difference(recorded(then), then | {"a": 9, "b": 9, "d": 9, "e": 9})
    assert found is not None and found.what == "settings"
    assert found.lines == ("a was 1, now 9", "b was 2, now 9", "d was 4, now 9", "e was 5, now 9")
    assert str(found) == "".join(f"\n  {line}" for line in found.lines)
    assert difference(recorded(then), dict(then)) is None


def test_a_section_that_is_new_or_gone_is_one_line():
    without, with_it = identity_of(config()), identity_of(config(adapter={"kind": "lora", "rank": 8}))
    added, removed = difference(recorded(without), with_it), difference(recorded(with_it), without)
    assert added is not None and removed is not None
    assert len(added.lines) == len(removed.lines) == 1
    assert added.lines[0].startswith("adapter was null, now {") and "rank: 8" in added.lines[0]
    assert removed.lines[0].startswith("adapter was {") and removed.lines[0].endswith(", now null")


def test_rows_are_compared_once_they_are_known():
    then = {"a": 1, ROWS: "old"}
    assert difference(recorded(then), {"a": 1}) is None
    found = difference(recorded(then), {"a": 1, ROWS: "new"})
    assert found is not None and found.what == "data" and "the rows have changed" in str(found)


def test_what_an_earlier_version_has_not_noted_cannot_be_compared():
    now = {"a": 1, ROWS: "new", "model.weights": "x"}
    assert difference(recorded({"a": 1, "data.fingerprint": "code and rows"}), now) is None
    assert difference(recorded({"a": 1, "b": 2}, versions={"burnish": "0.0.1"}), now) is None
    assert difference(recorded({"a": 1, "b": 2}), now) is not None


def test_a_share_of_the_rows_that_is_held_out_is_named_before_there_are_rows():
    def asked(held_out: Any) -> dict[str, Any]:
        return identity_of(config(data={"train": ["a.json"], "eval": held_out}))

    for then, now in ((0.2, 0.4), (None, 0.2), (0.2, ["b.json"])):
        found = difference(recorded(asked(then)), asked(now))
        assert found is not None and found.what == "data" and len(found.lines) == 1
        assert found.lines[0].startswith("data.eval was "), found
    assert difference(recorded(asked(["b.json"])), asked(["c.json"])) is None  # trained on the same rows
    noted_nothing = {key: value for key, value in asked(0.2).items() if key != "data.eval"}
    assert difference(recorded(noted_nothing), asked(0.2)) is None


def test_what_frozen_weights_are_is_not_said_of_an_adapter_that_is_gone():
    then = identity_of(config(adapter={"kind": "lora"})) | {"model.weights": "x"}
    found = difference(recorded(then), identity_of(config()))
    assert found is not None and len(found.lines) == 1 and found.lines[0].startswith("adapter was {")


def test_the_place_of_weights_does_not_matter_while_they_are_the_same():
    then = {"model.path": "/a", "model.weights": "x"}
    assert difference(recorded(then), {"model.path": "/b", "model.weights": "x"}) is None
    found = difference(recorded(then), {"model.path": "/b", "model.weights": "y"})
    assert found is not None and len(found.lines) == 2 and found.what == "settings"
    assert difference(recorded({"model.path": "/a"}), {"model.path": "/b"}) is not None  # trained whole: nothing tells that it is a copy


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def test_other_weights_under_an_adapter_are_noticed_and_copies_are_not(base: Path, tmp_path: Path):
    def marks(path: Path, **changes: Any) -> dict[str, Any]:
        return marks_of(config(model=str(path), **changes))

    adapted = {"adapter": {"kind": "lora"}}
    before = marks(base, **adapted)
    os.utime(base / "model.safetensors", (time.time(), 0))
    assert marks(base, **adapted) == marks(Path(shutil.copytree(base, tmp_path / "copy")), **adapted) == before
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    found = difference(recorded(before), marks(base, **adapted))
    assert found is not None and found.what == "weights" and "the weights of the base model have changed" in str(found)
    assert marks(base) == {}  # trained whole: the checkpoint has them


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locate, "_WHOLE", 1000)
    monkeypatch.setattr(locate, "_SAMPLE", 10)
    monkeypatch.setattr(locate, "_SAMPLES", 5)
    file = tmp_path / "m.safetensors"
    file.write_bytes(bytes(2000))
    before = locate.fingerprint(str(file), None)
    for place, differs in ((0, True), (1999, True), (500, True), (300, False)):
        content = bytearray(2000)
        content[place] = 1
        file.write_bytes(content)
        assert (locate.fingerprint(str(file), None) != before) == differs, place


def test_weights_that_a_reference_is_computed_from_are_noticed(base: Path, tmp_path: Path):
    def keys(**changes: Any) -> set[str]:
        return {*marks_of(config(model=str(base), **changes))}

    assert keys(objective="dpo") == keys(objective={"kind": "kto", "reference": "precomputed"}) == {"model.weights"}
    assert keys(objective={"kind": "dpo", "reference": "copy"}) == set()  # the checkpoint has them
    assert keys(objective={"kind": "dpo", "sync": {"every": "1st"}}) == keys(objective="simpo") == set()
    (tmp_path / "start").mkdir()
    started = {"adapter": {"kind": "lora", "path": str(tmp_path / "start")}}
    assert keys(objective="dpo", **started) == {"model.weights", "reference.adapter"}
    assert keys(**started) == {"model.weights"}


def test_a_place_without_a_model_is_an_error():
    with pytest.raises(ModelError, match="no model at '/nowhere/here'"):
        locate.fingerprint("/nowhere/here", None)
