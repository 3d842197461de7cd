from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.config.sections import Source
from burnish.core.errors import SourceError
from burnish.data import sources
from burnish.data.sources import RowSource, open_source
from burnish.data.sources.hub import HubSplit

Open = Callable[..., RowSource]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(100)))

    def opened(path: str = "rows.jsonl", seed: int = 0, streaming: bool = False, prefer: tuple[str, ...] = ("train",), **options: Any):
        return open_source(Source(path=path, **options), seed=seed, streaming=streaming, prefer=prefer)

    return opened


def numbers(source: RowSource) -> list[int]:
    return [row.fields["n"] for row in source.rows()]


def test_every_reading_begins_anew(opened: Open) -> None:
    source = opened()
    assert numbers(source) == numbers(source) == list(range(100))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(start=st.none() | st.integers(-120, 120), stop=st.none() | st.integers(-120, 120), limit=st.none() | st.integers(1, 120))
def test_slices_and_limits_of_local_files(opened: Open, start: int | None, stop: int | None, limit: int | None) -> None:
    written = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    expected = list(range(100))[start:stop][:limit]
    source = opened(split=written, limit=limit)
    if expected:
        assert numbers(source) == expected
    else:
        with pytest.raises(SourceError, match="chooses no row"):
            numbers(source)


def test_rows_keep_their_numbers_in_a_slice(opened: Open) -> None:
    assert [(row.number, row.line) for row in opened(split="train[98%:]").rows()] == [(99, 99), (100, 100)]


def test_a_sample_is_seeded_and_in_order(opened: Open) -> None:
    chosen = numbers(opened(limit=10, sample=True, seed=1))
    assert chosen == numbers(opened(limit=10, sample=True, seed=1)) == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen != numbers(opened(limit=10, sample=True, seed=2))
    assert chosen != list(range(10))


def test_a_sample_of_more_than_there_is(opened: Open) -> None:
    assert numbers(opened(limit=500, sample=True)) == list(range(100))
    assert set(numbers(opened(limit=5, sample=True, split="train[50:60]"))) <= set(range(50, 60))


def test_the_fingerprint_tells_what_is_chosen_from_what(opened: Open, tmp_path: Path) -> None:
    prints = {
        opened().fingerprint(),
        opened(split="train[:10]").fingerprint(),
        opened(limit=10).fingerprint(),
        opened(limit=10, sample=True).fingerprint(),
        opened(limit=10, sample=True, seed=1).fingerprint(),
    }
    assert len(prints) == 5
    assert opened().fingerprint() in prints
    assert opened(seed=1).fingerprint() in prints  # the seed matters only for samples
    with open(tmp_path / "rows.jsonl", "a") as stream:
        stream.write("\n")
    assert opened().fingerprint() not in prints


def test_a_source_can_be_sent_to_a_worker(opened: Open) -> None:
    source = opened(split="train[10%:12%]")
    assert numbers(pickle.loads(pickle.dumps(source))) == [10, 11]


def test_which_split_is_meant(opened: Open, tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_text(f'{{"n": "{name}"}}\n')
    assert numbers(opened("set")) == ["train"]
    assert numbers(opened("set", prefer=("validation", "test"))) == ["val"]
    assert numbers(opened("set", split="dev")) == ["val"]
    assert numbers(opened("set/test.jsonl")) == ["test"]
    assert numbers(opened("set/test.jsonl", split="train[:5]")) == ["test"]
    assert len(numbers(opened("rows.jsonl", prefer=("validation", "test")))) == 100


def test_no_split_is_meant_by_itself(opened: Open, tmp_path: Path) -> None:
    for name in ("val", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(SourceError, match="several splits are there") as caught:
        opened("set")
    assert caught.value.hint in ("Write 'split: validation'.", "Write 'split: test'.")


def test_a_subset_of_a_local_copy_is_a_folder(opened: Open, tmp_path: Path) -> None:
    for name in ("en", "de"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "train.jsonl").write_text(f'{{"n": "{name}"}}\n')
    assert numbers(opened("set", name="de")) == ["de"]
    assert numbers(opened("set")) == ["de", "en"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "de"}, "rows.jsonl, field 'name': 'de' is the subset of a hub data set, but this is a local one"),
        ({"revision": "main"}, "rows.jsonl, field 'revision': 'main' is the revision of a hub data set, but this is a local one"),
        ({"split": "validation"}, "rows.jsonl, field 'split': there is no split 'validation': known: train"),
        ({"split": "trian[:5]"}, "rows.jsonl, field 'split': there is no split 'trian': did you mean 'train'?"),
        ({"split": "train[:5"}, "rows.jsonl, field 'split': 'train[:5' is no split expression"),
    ],
)
def test_refusals(opened: Open, options: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        opened(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("options", [{"split": "train[:10%]"}, {"split": "train[-5:]"}, {"limit": 5, "sample": True}])
def test_streaming_knows_no_total(opened: Open, options: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="needs the number of rows, which is unknown while streaming"):
        numbers(opened(streaming=True, **options))
    assert numbers(opened(streaming=True, split="train[3:]", limit=2)) == [3, 4]


def test_hub_data_sets_go_through_datasets(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def splits(path: str, subset: str | None, revision: str | None, *, streaming: bool) -> dict[str, HubSplit]:
        asked.append((path, subset, revision, streaming))
        return {name: HubSplit(path, subset, revision, name, streaming) for name in ("train_sft", "test_sft")}

    monkeypatch.setattr(sources, "hub_splits", splits)
    source = opened("owner/set", name="en", revision="abc", split="test_sft[:5]", streaming=True)
    assert asked == [("owner/set", "en", "abc", True)]
    assert source.describe() == "owner/set:en, split test_sft[:5]"
    with pytest.raises(SourceError, match=r"several splits are there \(train_sft, test_sft\)") as caught:
        opened("owner/set")
    assert caught.value.where is not None
    assert caught.value.where.field == "split"


def test_describe(opened: Open, tmp_path: Path) -> None:
    assert opened().describe() == "rows.jsonl"
    assert opened(split="train[:5]", limit=3).describe() == "rows.jsonl, split train[:5], the first 3 rows"
    assert opened(limit=3, sample=True).describe() == "rows.jsonl, a sample of 3 rows"
    (tmp_path / "set").mkdir()
    for name in ("train-0", "train-1", "val", "extra"):
        (tmp_path / "set" / f"{name}.jsonl").write_text('{"n": 1}\n')
    assert opened("set").describe() == "set, split train, 2 files; left out, since no split: set/extra.jsonl"


def test_secrets_of_a_url_are_not_in_the_name(opened: Open) -> None:
    source = opened("https://user:secret@host/rows.jsonl?signature=secret")
    assert "secret" not in source.name + source.describe()
