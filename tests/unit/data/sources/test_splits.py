from __future__ import annotations

import pytest
from datasets.arrow_reader import ReadInstruction
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import SourceError
from burnish.data.sources.splits import Slice, canonical, parse_split, split_of

bounds = st.none() | st.integers(-150, 150)
percents = st.none() | st.integers(-100, 100)


def written(start: int | None, stop: int | None, unit: str = "") -> str:
    return f"[{'' if start is None else f'{start}{unit}'}:{'' if stop is None else f'{stop}{unit}'}]"


@given(total=st.integers(0, 120), start=bounds, stop=bounds)
def test_slices_are_those_of_python(total: int, start: int | None, stop: int | None) -> None:
    (part,) = parse_split("train" + written(start, stop), "file")
    first, after = part.range(total)
    rows = list(range(total))
    assert rows[first:after] == rows[start:stop]


@given(total=st.integers(1, 5000), start=percents, stop=percents)
def test_percentages_are_those_of_datasets(total: int, start: int | None, stop: int | None) -> None:
    text = "train" + written(start, stop, "%")
    (part,) = parse_split(text, "file")
    (theirs,) = ReadInstruction.from_spec(text).to_absolute({"train": total})
    assert list(range(*part.range(total))) == list(range(theirs.from_ or 0, total if theirs.to is None else theirs.to))


@given(start=st.none() | st.integers(0, 100), stop=st.none() | st.integers(0, 100))
def test_the_total_is_needed_only_for_percentages_and_the_end(start: int | None, stop: int | None) -> None:
    (part,) = parse_split(written(start, stop), "file")
    assert not part.needs_total
    rows = list(range(80))
    first, after = part.range(None)
    assert rows[first:after] == rows[start:stop]


@pytest.mark.parametrize("text", ["train[-3:]", "train[:10%]", "train[:-1]"])
def test_the_total_is_needed(text: str) -> None:
    assert parse_split(text, "file")[0].needs_total


def test_terms_are_joined() -> None:
    parts = parse_split("train[:10] + test [5:]", "file")
    assert [part.name for part in parts] == ["train", "test"]
    assert parts[0].range(100) == (0, 10)


def test_no_expression_is_everything() -> None:
    assert parse_split(None, "file") == [Slice()]
    assert Slice().range(7) == (0, 7)


def test_underscores_and_fractions_of_a_percent() -> None:
    assert parse_split("train[:1_000]", "f")[0].range(5000) == (0, 1000)
    assert parse_split("train[:0.5%]", "f")[0].range(5000) == (0, 25)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train[:10", "no split expression"),
        ("train[10]", "no split expression"),
        ("train[a:b]", "no split expression"),
        ("", "no split expression"),
        ("train+", "no split expression"),
        ("train[:150%]", "150% is more than 100%"),
        ("train[:1.5]", "1.5 is no whole number of rows"),
    ],
)
def test_bad_expressions(text: str, words: str) -> None:
    with pytest.raises(SourceError, match=words) as caught:
        parse_split(text, "data.jsonl")
    assert str(caught.value).startswith("data.jsonl, field 'split': ")
    assert "train[10%:20%]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("alpaca.val.jsonl", "validation"),
        ("dev", "validation"),
        ("test_sft.json", "test"),
        ("training", "train"),
        ("contest.json", None),
        ("development.json", None),
        ("alpaca.json", None),
    ],
)
def test_names_announce_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_canonical_names() -> None:
    assert [canonical(name) for name in ("val", "Dev", "eval", "testing", "train_sft")] == ["validation"] * 3 + ["test", "train_sft"]
