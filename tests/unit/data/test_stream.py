from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config.sections import Data
from burnish.core.errors import CheckpointError, DataError, RowError
from burnish.data.stream import StreamLoader
from burnish.data.types import Batch

from .fakes import Letters

ROWS = 23


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose first letter is their name; some repeat, some are too long, one is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("burnish.data.pipeline.CHUNK_ROWS", 4)
    write([{"prompt": chr(65 + n), "completion": "x" * (n % 7 + 1)} for n in range(ROWS)])


def write(rows: list[Any]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def loader(*, buffer: int = 6, rank: int = 0, world_size: int = 1, **options: Any) -> StreamLoader:
    sizes = {key: options.pop(key) for key in ("batch_size", "batch_tokens") if key in options} or {"batch_size": 5}
    data = Data.model_validate({"train": "rows.jsonl", "streaming": True, "workers": 1, "max_length": 12} | options)
    return StreamLoader(data, Letters(), micro_batch_tokens=20, seed=3, rank=rank, world_size=world_size, buffer=buffer, **sizes)


def names(batches: list[Batch]) -> str:
    """The first letters of the examples of a step, sorted."""
    letters = [chr(batch.input_ids[start]) for batch in batches if batch.examples for start in (0, *batch.doc_ends[:-1])]
    return "".join(sorted(letters))


EVERYTHING = "".join(chr(65 + n) for n in range(ROWS))


def epoch(source: StreamLoader) -> list[str]:
    steps: list[str] = []
    while sum(map(len, steps)) < ROWS:
        steps.append(names(source.next()))
    return steps


def test_a_pass_holds_every_example_once_and_ends_with_a_partial_step() -> None:
    source = loader()
    steps = epoch(source)
    assert [len(step) for step in steps] == [5, 5, 5, 5, 3]
    assert "".join(sorted("".join(steps))) == EVERYTHING
    assert epoch(source) != steps
    assert source.epoch == 1.0


def test_without_shuffling_the_order_is_that_of_the_rows() -> None:
    assert "".join(epoch(loader(shuffle=False))) == EVERYTHING


def test_shuffling_mixes_within_the_buffer() -> None:
    steps = epoch(loader(buffer=100))
    assert "".join(steps) != EVERYTHING
    assert "".join(sorted("".join(steps))) == EVERYTHING


def test_steps_of_tokens_take_what_fits() -> None:
    source = loader(batch_tokens=20)
    seen = ""
    while len(seen) < ROWS:
        batches = source.next()
        assert sum(len(batch.input_ids) for batch in batches) <= 20
        seen += names(batches)
    assert "".join(sorted(seen)) == EVERYTHING


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_the_same_examples_meet_on_any_number_of_ranks(world_size: int, packing: str) -> None:
    alone = loader()
    ranks = [loader(rank=rank, world_size=world_size, packing=packing) for rank in range(world_size)]
    for _ in range(12):
        expected = alone.next()
        parts = [rank.next() for rank in ranks]
        assert "".join(sorted("".join(map(names, parts)))) == names(expected)
        assert len({len(part) for part in parts}) == 1
        assert {batch.step_weight for part in parts for batch in part} == {expected[0].step_weight}


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_tokens": 21}, {"batch_size": 5, "overlong": "split", "max_length": 4}])
@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("done", [0, 1, 3, 6, 8])
def test_a_restored_stream_goes_on_exactly(options: dict[str, Any], deduplicate: bool, done: int) -> None:
    rows = [{"prompt": chr(65 + n % 19), "completion": "x" * (n % 19 % 7 + 1)} for n in range(ROWS)]
    write([*rows, {"prompt": "", "completion": ""}, {"prompt": 1, "completion": 2}, rows[3]])
    options = {"deduplicate": deduplicate, "malformed": "skip", **options}
    source = loader(**options)
    for _ in range(done):
        source.next()
    state = json.loads(json.dumps(source.state()))
    fresh = loader(**options)
    fresh.restore(state)
    for _ in range(12):
        expected, found = source.next(), fresh.next()
        assert len(expected) == len(found)
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(expected, found, strict=True))
        assert all(torch.equal(a.token_weights, b.token_weights) for a, b in zip(expected, found, strict=True))
    assert fresh.state() == source.state()


def test_a_state_of_another_seed_or_other_rows_is_refused() -> None:
    source = loader()
    source.next()
    with pytest.raises(CheckpointError, match="seed was 9"):
        loader().restore({**source.state(), "seed": 9})
    with pytest.raises(CheckpointError, match="buffer"):
        loader(buffer=7).restore(source.state())
    state = source.state()
    write([{"prompt": "A", "completion": "x"}])
    with pytest.raises(CheckpointError, match="other data"):
        loader().restore(state)


def test_the_account_grows_and_counts_a_row_once() -> None:
    source = loader()
    assert source.account.rows.read == 0
    source.next()
    assert 0 < source.account.rows.read < ROWS
    for _ in range(10):
        source.next()
    assert source.account.rows.read == source.account.rows.kept == ROWS
    assert source.account.rows.balanced
    assert source.account.tokens.balanced


def test_the_log_can_tell_what_a_step_held() -> None:
    source = loader()
    batches = source.next()
    assert source.last_step.examples == 5
    assert source.last_step.tokens == sum(len(batch.input_ids) for batch in batches)
    assert source.last_step.trained == sum(len(batch.targets) for batch in batches)
    assert source.last_step.weight == batches[0].step_weight


def test_its_length_is_unknown_but_not_its_step() -> None:
    assert loader().steps_per_epoch > 10**15
    assert loader(batch_tokens=20).tokens_per_step == 20
    assert 2 < loader().tokens_per_step / 5 < 9


def test_workers_give_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    fakes: Any = __import__("fakes")
    data = Data.model_validate({"train": "rows.jsonl", "streaming": True, "workers": 2, "max_length": 12})
    source = StreamLoader(data, fakes.Letters(), batch_size=5, micro_batch_tokens=20, seed=3, buffer=6)
    alone = loader()
    assert [names(source.next()) for _ in range(3)] == [names(alone.next()) for _ in range(3)]
    source.close()


def test_a_stream_without_a_usable_row_is_an_error_and_no_endless_loop() -> None:
    write([{"prompt": "abcdefghijklmnop", "completion": "x"}] * 3)
    with pytest.raises(DataError, match=r"3 are cut at data.max_length = 12"):
        loader().next()


def test_a_malformed_row_stops_when_it_is_reached() -> None:
    write([{"prompt": "A", "completion": "x"}] * 20 + [{"prompt": "A"}])
    source = loader(shuffle=False)
    source.next()
    with pytest.raises(RowError, match=r"row 21"):
        for _ in range(5):
            source.next()
