"""The whole way from files to examples, with the real sources, formats, templates and a real (tiny) tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from burnish.config.sections import Data
from burnish.core.errors import BurnishError, DataError, FormatError, RowError, SourceError, TemplateError
from burnish.data import prepare as module
from burnish.data import workers
from burnish.data.account import Account
from burnish.data.cache import Examples
from burnish.data.loader import Loader, eval_batches
from burnish.data.prepare import Prepared, prepare, prepare_eval
from burnish.data.render import Renderer
from burnish.data.tally import Tally


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pair(number: int, answer: str | None = None) -> dict[str, str]:
    return {"prompt": f"question {number}?", "completion": f"answer {number}" if answer is None else answer}


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def settings(train: Any = "rows.jsonl", **options: Any) -> Data:
    return Data.model_validate({"train": train, "cache": "cache", "workers": 1, **options})


def run(renderer: Renderer, train: Any = "rows.jsonl", *, seed: int = 1, **options: Any) -> Prepared:
    return prepare(settings(train, **options), renderer, seed=seed, progress=False)


def texts(examples: Examples, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example.input_ids) for example in examples]


def assert_balanced(account: Account, prepared: Prepared) -> None:
    assert account.rows.balanced
    assert account.tokens.balanced
    assert all(source.rows.balanced and source.tokens.balanced for source in account.sources)
    assert account.examples == len(prepared.train)
    assert account.tokens.total == prepared.train.lengths.sum()
    assert account.tokens.trained == prepared.train.trained.sum()


def test_rows_become_examples_in_order(renderer: Renderer, tokenizer: Any) -> None:
    write("rows.jsonl", [pair(number) for number in range(4)])
    prepared = run(renderer)
    assert texts(prepared.train, tokenizer) == [f"question {n}?answer {n}<|im_end|>" for n in range(4)]
    assert prepared.eval is None
    assert [prepared.train.origin(i) for i in range(4)] == [("rows.jsonl", n) for n in range(1, 5)]
    assert_balanced(prepared.account, prepared)
    example = prepared.train[0]
    assert tokenizer.decode(example.input_ids[example.weights > 0]) == "answer 0<|im_end|>"
    assert prepared.account.packing is not None


def test_worker_processes_change_not_a_bit_of_the_cache(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.data.pipeline.CHUNK_ROWS", 4)
    write("rows.jsonl", [pair(number % 9, "x" * number) for number in range(30)] + [{"prompt": "no completion"}])
    options = {"max_length": 24, "overlong": "split", "malformed": "skip", "deduplicate": True}
    files = []
    for count in (1, 2):
        run(renderer, workers=count, cache=f"cache{count}", **options)
        files.append([path.read_bytes() for path in sorted(Path(f"cache{count}").glob("*/*"))])
    assert files[0] == files[1]
    assert len(files[0]) == 2


def test_a_second_run_reuses_the_cache(renderer: Renderer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write("rows.jsonl", [pair(number) for number in range(4)])
    first = run(renderer)
    monkeypatch.setattr(module, "prepared", lambda *args: pytest.fail("prepared again"))
    second = run(renderer)
    assert "4 tokenised examples reused" in capsys.readouterr().err
    assert second.account == first.account
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first.train, second.train, strict=True))


@pytest.mark.parametrize("change", ["file", "max_length", "train_on_prompt", "columns", "code", "own format"])
def test_whatever_decides_the_examples_makes_a_new_cache_entry(
    renderer: Renderer, tokenizer: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("rows.jsonl", [{**pair(number), "other": "o"} for number in range(4)])
    source: Any = {"path": "rows.jsonl", "format": "own.py:convert"} if change == "own format" else {"path": "rows.jsonl"}
    Path("own.py").write_text("def convert(row):\n    return row['prompt']\n")
    run(renderer, [source])
    options: dict[str, Any] = {}
    if change == "file":
        write("rows.jsonl", [{**pair(number), "other": "o"} for number in range(5)])
    elif change == "max_length":
        options["max_length"] = 100
    elif change == "train_on_prompt":
        renderer = Renderer(tokenizer, train_on_prompt=True)
    elif change == "columns":
        source["columns"] = {"completion": "other"}
    elif change == "code":
        monkeypatch.setattr(module, "_code_version", lambda: "another")
    else:
        Path("own.py").write_text("def convert(row):\n    return row['completion']\n")
    run(renderer, [source], **options)
    assert len(list(Path("cache").glob("*/manifest.json"))) == 2


def test_what_does_not_decide_the_examples_keeps_the_cache_entry(renderer: Renderer) -> None:
    write("rows.jsonl", [pair(number) for number in range(20)])
    run(renderer)
    run(renderer, seed=2, eval=0.2, workers=2, packing="off", shuffle=False)
    assert len(list(Path("cache").glob("*/manifest.json"))) == 1


def test_a_broken_cache_is_noticed_and_made_again(renderer: Renderer, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [pair(number) for number in range(4)])
    run(renderer)
    (data,) = Path("cache").glob("*/examples.arrow")
    data.write_bytes(data.read_bytes()[:-9])
    assert len(run(renderer).train) == 4
    assert "damaged" in capsys.readouterr().err
    run(renderer)
    assert "damaged" not in capsys.readouterr().err


def test_every_fate_is_counted(renderer: Renderer) -> None:
    rows = [pair(0), pair(0), pair(1, "y" * 60), {"prompt": "", "completion": " "}, {"prompt": "no completion"}, "{broken", pair(2)]
    write("rows.jsonl", [*rows, {"prompt": "z" * 50, "completion": "late"}])
    prepared = run(renderer, max_length=30, malformed="skip", deduplicate=True)
    rows_ = prepared.account.rows
    assert (rows_.read, rows_.kept, rows_.duplicate, rows_.empty, rows_.malformed) == (8, 3, 1, 1, 2)
    assert (rows_.overlong, rows_.dropped, rows_.fully_masked, rows_.masked_by_truncation) == (2, 0, 1, 1)
    assert [(place.row, place.file) for place in prepared.account.malformed] == [(5, "rows.jsonl"), (6, "rows.jsonl")]
    assert prepared.account.tokens.truncated > 0
    assert_balanced(prepared.account, prepared)


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
@pytest.mark.parametrize("evaluation", [None, 0.3])
@pytest.mark.parametrize("deduplicate", [True, False])
def test_the_account_adds_up(renderer: Renderer, overlong: str, evaluation: float | None, deduplicate: bool) -> None:
    draws = np.random.default_rng(0)
    sizes = draws.integers(0, 40, (40, 2))
    write("rows.jsonl", [{"prompt": "p" * int(p), "completion": "c" * int(c)} for p, c in sizes] + [pair(1)] * 3 + [{"prompt": 1}])
    prepared = run(renderer, max_length=32, overlong=overlong, eval=evaluation, deduplicate=deduplicate, malformed="skip")
    assert_balanced(prepared.account, prepared)
    assert (prepared.account.rows.eval > 0) == (evaluation is not None)
    assert prepared.account.rows.duplicate == (2 if deduplicate else 0)


def test_held_out_rows_are_the_same_every_time_and_follow_the_seed(renderer: Renderer, tokenizer: Any) -> None:
    write("rows.jsonl", [pair(number) for number in range(40)])
    first, again, other = (run(renderer, eval=0.1, seed=seed) for seed in (1, 1, 2))
    held_out = [set(texts(p.eval, tokenizer)) for p in (first, again, other) if p.eval is not None]
    assert [len(rows) for rows in held_out] == [4, 4, 4]
    assert held_out[0] == held_out[1] != held_out[2]
    assert not held_out[0] & set(texts(first.train, tokenizer))
    assert first.account.rows.eval == 4
    assert first.account.rows.kept == 36


def test_the_choice_of_held_out_rows_does_not_depend_on_their_order(renderer: Renderer, tokenizer: Any) -> None:
    rows = [pair(number) for number in range(40)]
    write("rows.jsonl", rows)
    first = run(renderer, eval=0.1)
    write("rows.jsonl", rows[::-1])
    turned = run(renderer, eval=0.1)
    assert first.eval is not None and turned.eval is not None
    assert set(texts(first.eval, tokenizer)) == set(texts(turned.eval, tokenizer))


def test_equal_rows_and_pieces_of_a_row_stay_on_one_side(renderer: Renderer, tokenizer: Any) -> None:
    write("rows.jsonl", [pair(number % 10, "w" * 50) for number in range(60)])
    prepared = run(renderer, eval=0.3, max_length=20, overlong="split")
    assert prepared.eval is not None
    origins = [{examples.origin(i)[1] % 10 for i in range(len(examples))} for examples in (prepared.train, prepared.eval)]
    assert not origins[0] & origins[1]
    assert_balanced(prepared.account, prepared)


@pytest.mark.parametrize(
    ("fraction", "count", "message"),
    [(0.05, 4, "of the 4 rows left after cleaning holds out none"), (0.9, 1, "leaves nothing to train on")],
)
def test_a_fraction_that_empties_one_side_is_an_error(renderer: Renderer, fraction: float, count: int, message: str) -> None:
    write("rows.jsonl", [pair(number) for number in range(count)])
    with pytest.raises(DataError, match=message):
        run(renderer, eval=fraction)


def test_eval_sources_have_an_account_of_their_own(renderer: Renderer) -> None:
    write("rows.jsonl", [pair(number) for number in range(10)])
    write("held.jsonl", [pair(number) for number in range(8, 12)])
    prepared = run(renderer, eval="held.jsonl")
    assert prepared.eval is not None
    assert len(prepared.eval) == 4
    assert prepared.account.rows.kept == 10
    assert prepared.account.evaluation is not None
    assert prepared.account.evaluation.rows.kept == 4
    assert prepared.account.eval_rows_also_in_train == 2
    alone = prepare_eval(settings(eval="held.jsonl"), renderer, seed=1, progress=False)
    assert alone is not None
    assert len(alone[0]) == 4


def test_a_fraction_cannot_be_held_out_of_a_stream(renderer: Renderer) -> None:
    assert prepare_eval(settings(), renderer, seed=1) is None
    with pytest.raises(DataError, match="fraction"):
        prepare_eval(settings(eval=0.1), renderer, seed=1)


def test_several_sources_are_mixed_and_counted_apart(renderer: Renderer) -> None:
    write("a.jsonl", [pair(number) for number in range(6)])
    write("b.jsonl", [{"text": f"text {number}"} for number in range(3)])
    prepared = run(renderer, ["a.jsonl", "b.jsonl"], mix="round_robin")
    assert [(s.name, s.format, s.rows.kept) for s in prepared.account.sources] == [
        ("a.jsonl", "prompt_completion", 6),
        ("b.jsonl", "text", 3),
    ]
    assert [prepared.train.origin(i)[0] for i in range(4)] == ["a.jsonl", "b.jsonl", "a.jsonl", "b.jsonl"]
    assert_balanced(prepared.account, prepared)


def test_an_oversampled_row_is_no_duplicate_of_itself(renderer: Renderer) -> None:
    write("a.jsonl", [pair(number) for number in range(20)])
    write("b.jsonl", [pair(100), pair(100)])
    prepared = run(renderer, ["a.jsonl", "b.jsonl"], mix="oversample", deduplicate=True)
    again = [prepared.train.origin(i) for i in range(len(prepared.train))].count(("b.jsonl", 1))
    assert again > 1
    assert prepared.account.rows.duplicate >= again - 1
    assert_balanced(prepared.account, prepared)


def test_conversations_go_through_the_template(renderer: Renderer, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    write("rows.jsonl", [{"messages": chat}])
    example = run(renderer).train[0]
    assert tokenizer.decode(example.input_ids[example.weights > 0]) == "Hi<|im_end|>"


WRONG = {"prompt": 1, "completion": 2}
REST = {"path": "rows.jsonl", "format": "prompt_completion", "split": "train[1:]"}
Fault = tuple[list[Any], dict[str, Any], type[BurnishError], str]
FAULTS: dict[str, Fault] = {
    "malformed row": ([pair(0), {"prompt": "a"}, pair(1)], {}, RowError, r"rows.jsonl:2, row 2"),
    "wrong type": ([pair(0), {"prompt": "a", "completion": 3}], {}, RowError, r"row 2, field 'completion'"),
    "broken JSON": ([pair(0), '{"prompt": "a", '], {}, RowError, r"rows.jsonl:2, row 2: .*JSON"),
    "null": ([pair(0), {"prompt": "a", "completion": None}], {}, RowError, r"row 2, field 'completion'"),
    "overlong": ([pair(0), pair(1, "x" * 99)], {"max_length": 40, "overlong": "error"}, DataError, r"row 2: .* data.max_length = 40"),
    "all empty": ([{"text": " "}], {}, DataError, r"none of the 1 rows can be used: 1 empty"),
    "cut before the answer": ([pair(0), pair(1)], {"max_length": 5}, DataError, r"2 are cut at data.max_length = 5 before the answer"),
    "all dropped": ([pair(0)], {"max_length": 5, "overlong": "drop"}, DataError, r"1 dropped as longer than data.max_length"),
    "all malformed": ([pair(0), WRONG], {"malformed": "skip", "train": REST}, DataError, r"1 malformed; the first malformed one is row 2"),
    "no rows": ([], {}, SourceError, r"rows.jsonl"),
    "unknown format": ([{"a": "b"}], {}, FormatError, r"no format fits"),
    "missing file": ([pair(0)], {"train": "absent.jsonl"}, SourceError, r"absent.jsonl"),
}


@pytest.mark.parametrize(("rows", "options", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_bad_data_is_one_clear_error_and_leaves_nothing(
    renderer: Renderer, rows: list[Any], options: dict[str, Any], kind: type[BurnishError], message: str
) -> None:
    write("rows.jsonl", rows)
    with pytest.raises(kind, match=message):
        run(renderer, **{"train": "rows.jsonl", **options})
    assert [
        path for path in Path("cache").glob("*") if path.suffix != ".lock" and "missing eval" not in str(path)
    ] == [] or "eval" in options


def test_an_account_that_does_not_add_up_is_never_shown(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    write("rows.jsonl", [pair(0), pair(1)])
    enter = Tally.enter

    def miscount(tally: Tally, *args: Any) -> Any:
        tally.account.sources[0].rows.read += 1
        return enter(tally, *args)

    monkeypatch.setattr(Tally, "enter", miscount)
    with pytest.raises(RuntimeError, match="does not add up"):
        run(renderer)


def test_the_loader_gives_every_token_of_the_account_once(renderer: Renderer) -> None:
    write("rows.jsonl", [pair(number, "w" * (number % 13)) for number in range(50)])
    prepared = run(renderer, eval=0.2, max_length=30, overlong="split")
    assert prepared.eval is not None
    for options in ({"batch_size": 7}, {"batch_tokens": 90}):
        loader = Loader(prepared.train, max_length=30, micro_batch_tokens=64, **options)
        batches = [batch for _ in range(loader.steps_per_epoch) for batch in loader.next()]
        assert sum(len(batch.input_ids) for batch in batches) == prepared.account.tokens.total
        assert sum(len(batch.targets) for batch in batches) == prepared.account.tokens.trained
    assert sum(len(batch.input_ids) for batch in eval_batches(prepared.eval, 64)) == prepared.account.tokens.eval


def test_nothing_trained_explains_itself(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", "train": False}]
    write("rows.jsonl", [{"messages": chat}])
    with pytest.raises(DataError, match=r"no token of the 1 rows is trained: data.train_on = 'assistant'") as caught:
        run(Renderer(tokenizer), train={"path": "rows.jsonl", "format": "messages"})
    assert "--row 1" in (caught.value.hint or "")


def test_a_model_without_template_is_refused_for_conversations(tokenizer: Any, tiny_model: Path) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_model)
    bare.chat_template = None
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    write("rows.jsonl", [{"messages": chat}])
    with pytest.raises(TemplateError, match="no chat template"):
        run(Renderer(bare), malformed="skip")


def test_a_cache_folder_that_cannot_be_written_is_named(renderer: Renderer) -> None:
    write("rows.jsonl", [pair(0)])
    Path("file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to file/cache") as caught:
        run(renderer, cache="file/cache")
    assert "data.cache" in (caught.value.hint or "")


def test_a_worker_that_dies_leaves_nothing_behind(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.data.pipeline.CHUNK_ROWS", 3)
    own = """
import os, signal

def convert(row):
    if row["prompt"] == "question 5?":
        os.kill(os.getpid(), signal.SIGKILL)
    return row
"""
    Path("own.py").write_text(own)
    write("rows.jsonl", [pair(number) for number in range(12)])
    with pytest.raises(DataError, match=r"rows.jsonl, row 6: a tokenising worker died"):
        run(renderer, {"path": "rows.jsonl", "format": "own.py:convert"}, workers=2)
    assert [path for path in Path("cache").iterdir() if path.suffix != ".lock"] == []
    assert workers.cores() >= 1
