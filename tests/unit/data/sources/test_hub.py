from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.core.errors import SourceError
from burnish.data.sources.hub import hub_splits

CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: de
  data_files: de/*.jsonl
---
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set as it lies on the hub; `datasets` takes a local copy through the same code."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("en/train", 5), ("en/test", 2), ("de/train", 3)):
        file = tmp_path / "set" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{name} {number}", "calls": [{"x": 1}, {"y": 2}]} for number in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "set" / "README.md").write_text(CARD)
    return str(tmp_path / "set")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_split(repository: str, streaming: bool) -> None:
    splits = hub_splits(repository, "en", None, streaming=streaming)
    assert set(splits) == {"train", "test"}
    for _ in range(2):
        rows = list(splits["test"].rows())
        assert [(row.number, row.fields["text"]) for row in rows] == [(1, "en/test 0"), (2, "en/test 1")]
    assert rows[0].fields["calls"] == [{"x": 1}, {"y": 2}]
    assert rows[0].file == f"{repository}:en[test]"


def test_fingerprints_tell_splits_apart(repository: str) -> None:
    splits = hub_splits(repository, "en", None, streaming=False)
    assert splits["train"].fingerprint() == splits["train"].fingerprint()
    assert splits["train"].fingerprint() != splits["test"].fingerprint()


def test_a_subset_must_be_chosen(repository: str) -> None:
    with pytest.raises(SourceError, match=r"field 'name': the data set has several subsets and none by default \(") as caught:
        hub_splits(repository, None, None, streaming=False)
    assert str(caught.value.hint).startswith("Write for instance 'name: ")
    with pytest.raises(SourceError, match="there is no subset 'eng': did you mean 'en'"):
        hub_splits(repository, "eng", None, streaming=False)


def test_what_neither_the_disk_nor_the_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="nobody/nothing: is neither a file here nor a data set that the hub hands out") as caught:
        hub_splits("nobody/nothing", None, None, streaming=False)
    assert "local copy" in str(caught.value.hint)
