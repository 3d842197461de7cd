from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import numpy as np
import pytest

from burnish.core.errors import DataError
from burnish.data import cache as module
from burnish.data.cache import Cache, EntryWriter, ExampleBlock, Examples, run_lengths
from burnish.data.pipeline import Chunk, _block
from burnish.data.tree import grow
from burnish.data.types import Example

from .listed import numbered
from .test_pipeline import pair, pipeline, tasks

ACCOUNT = {"rows": {"read": 3}}


def add(writer: EntryWriter, chunk: Chunk, *, turn: int = 0, file: str = "rows.jsonl") -> None:
    count = len(chunk.fates)
    writer.add(
        chunk.block,
        files=[file] * count,
        numbers=np.arange(1, count + 1),
        sources=np.zeros(count, np.int32),
        turns=np.arange(turn, turn + count),
        identities=np.arange(count).astype(np.uint64),
    )


def some_chunk() -> Chunk:
    return pipeline(overlong="split", max_length=4).run(tasks(pair("a", "bc"), pair("", ""), pair("abcdef", "ghijkl")))


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, warnings: list[str]) -> Cache:
    return Cache(tmp_path / "cache", warnings.append)


def filled(cache: Cache, key: str = "key") -> Path:
    with cache.lock(key, on_wait=lambda: None), cache.write(key) as writer:
        add(writer, some_chunk())
        writer.finish(ACCOUNT)
    return cache.folder / key


def test_what_is_written_is_read_back(cache: Cache) -> None:
    assert cache.open("key") is None
    filled(cache)
    entry = cache.open("key")
    assert entry is not None
    assert entry.account == ACCOUNT
    examples = Examples(entry.store)
    assert ["".join(map(chr, example.input_ids)) for example in examples] == ["abc", "efgh", "ijkl"]
    assert [example.weights.tolist() for example in examples] == [[0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert [examples.origin(i) for i in range(3)] == [("rows.jsonl", 1), ("rows.jsonl", 3), ("rows.jsonl", 3)]
    assert examples.lengths.tolist() == [3, 4, 4]
    assert examples.trained.tolist() == [2, 2, 3]
    assert examples.weights.tolist() == [2.0, 2.0, 3.0]
    assert examples.turns.tolist() == [0, 2, 2]
    assert (examples.lengths.dtype, examples[0].input_ids.dtype, examples[0].weights.dtype) == (np.int32, np.int32, np.float32)


def test_a_view_holds_some_of_the_examples(cache: Cache) -> None:
    filled(cache)
    entry = cache.open("key")
    assert entry is not None
    view = Examples(entry.store, np.array([2, 0]))
    assert len(view) == 2
    assert view[0].input_ids.tolist() == [ord(letter) for letter in "ijkl"]
    assert view.lengths.tolist() == [4, 3]
    assert view.origin(1) == ("rows.jsonl", 1)


def test_many_record_batches_read_as_one(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_TOKENS", 10)
    with cache.write("key") as writer:
        for turn in range(5):
            add(writer, some_chunk(), turn=3 * turn, file=f"{turn}.jsonl")
        writer.finish(ACCOUNT)
    entry = cache.open("key")
    assert entry is not None
    examples = Examples(entry.store)
    assert ["".join(map(chr, example.input_ids)) for example in examples] == ["abc", "efgh", "ijkl"] * 5
    assert [examples.origin(i)[0] for i in range(0, 15, 3)] == [f"{turn}.jsonl" for turn in range(5)]


def test_an_entry_without_examples_is_an_entry(cache: Cache) -> None:
    with cache.write("key") as writer:
        writer.finish(ACCOUNT)
    entry = cache.open("key")
    assert entry is not None
    assert len(Examples(entry.store)) == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "bad manifest", "no data"])
def test_a_broken_entry_is_noticed_and_can_be_made_again(cache: Cache, warnings: list[str], damage: str) -> None:
    place = filled(cache)
    data, manifest = place / "examples.arrow", place / "manifest.json"
    content = bytearray(data.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "cut":
        data.write_bytes(content[:-7])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text(json.dumps([]))
    else:
        data.unlink()
    assert cache.open("key") is None
    assert "is damaged" in warnings[0]
    filled(cache)
    assert cache.open("key") is not None
    assert len(warnings) == 1


def test_an_entry_that_fails_half_way_leaves_nothing(cache: Cache) -> None:
    with pytest.raises(ZeroDivisionError), cache.write("key") as writer:
        add(writer, some_chunk())
        raise ZeroDivisionError
    assert cache.open("key") is None
    assert list(cache.folder.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_away(cache: Cache) -> None:
    leftover = cache.folder / "key.tmp-1"
    leftover.mkdir()
    (leftover / "examples.arrow").write_bytes(b"half")
    filled(cache)
    assert not leftover.exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to"):
        Cache(tmp_path / "file" / "cache", warnings.append)


def test_of_several_writers_one_writes(tmp_path: Path) -> None:
    made: list[int] = []
    waited: list[int] = []

    def write_alone(number: int) -> bool:
        cache = Cache(tmp_path / "cache", lambda text: None)
        with cache.lock("key", on_wait=lambda: waited.append(number)):
            if cache.open("key") is None:
                made.append(number)
                sleep(0.2)  # long enough for the others to find the lock taken
                with cache.write("key") as writer:
                    add(writer, some_chunk())
                    writer.finish(ACCOUNT)
        return cache.open("key") is not None

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(write_alone, range(3))) == [True] * 3
    assert len(made) == 1
    assert len(waited) == 2


def test_run_lengths() -> None:
    lengths, values = run_lengths(np.array([0, 0, 1, 0.5, 0.5], np.float32))
    assert (lengths.tolist(), values.tolist()) == ([2, 1, 2], [0.0, 1.0, 0.5])


def test_a_block_keeps_what_is_selected() -> None:
    block: ExampleBlock = some_chunk().block
    kept = block.select(np.array([True, False, True]))
    assert kept.lengths.tolist() == [3, 4]
    assert "".join(map(chr, kept.input_ids)) == "abcijkl"
    assert np.repeat(kept.run_weights, kept.run_lengths).tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert block.select(np.ones(3, bool)) is block


def test_examples_have_what_the_loader_needs(cache: Cache) -> None:
    filled(cache)
    entry = cache.open("key")
    assert entry is not None
    assert isinstance(Examples(entry.store)[0], Example)
    assert {name for name in ("lengths", "trained", "weights") if not hasattr(Examples(entry.store), name)} == set()
    assert hasattr(numbered(1), "weights")


def trees() -> list[Example]:
    prompt, answers = [1, 2, 3], ([4, 5], [6, 7, 8])
    sides = [Example(np.array(prompt + answer, np.int32), np.array([0.0] * 3 + [1.0] * len(answer), np.float32)) for answer in answers]
    plain = Example(np.array([9, 9, 9], np.int32), np.array([0, 0.5, 1], np.float32))
    return [grow(sides, values=(0.25,), weight=2.0), plain, grow(sides[1:], values=(1.0,), weight=1.0)]


def same(one: Example, other: Example) -> None:
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.weights.tolist() == other.weights.tolist()
    assert (one.ends, one.parents, one.values, one.weight) == (other.ends, other.parents, other.values, other.weight)


def test_trees_come_back_as_they_were(cache: Cache) -> None:
    block = _block(list(enumerate(trees())))
    for made, expected in zip(block.examples(), trees(), strict=True):
        same(made, expected)
    for made, expected in zip(block.select(np.array([False, True, True])).examples(), trees()[1:], strict=True):
        same(made, expected)
    with cache.lock("key", on_wait=lambda: None), cache.write("key") as writer:
        for turn in range(2):
            writer.add(
                block,
                files=["rows.jsonl"] * 3,
                numbers=np.arange(1, 4),
                sources=np.zeros(3, np.int32),
                turns=np.arange(3 * turn, 3 * turn + 3),
                identities=np.arange(3).astype(np.uint64),
            )
        writer.finish(ACCOUNT)
    entry = cache.open("key")
    assert entry is not None
    examples = Examples(entry.store)
    for made, expected in zip(examples, trees() * 2, strict=True):
        same(made, expected)
    assert examples.weights.tolist() == [2.0, 1.5, 1.0] * 2
    assert examples.leading.tolist() == [2.0, 1.5, 3.0] * 2
    assert examples.trained.tolist() == [5, 2, 3] * 2
