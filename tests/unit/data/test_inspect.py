from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

from burnish.config.sections import Data
from burnish.core.errors import DataError, RowError
from burnish.data.account import Account, Lengths, Malformed, Rows, SourceAccount
from burnish.data.inspect import coloured, histogram, page, row_number, show, token_texts, trained_flags, view
from burnish.data.render import Renderer
from burnish.data.types import Example


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def example(tokenizer: Any, masked: str, trained: str) -> Example:
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (masked, trained))
    return Example(np.array(before + after, np.int32), np.array([0.0] * len(before) + [1.0] * len(after), np.float32))


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40))
def test_joined_the_tokens_are_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = token_texts(ids, tokenizer)
    assert len(tokens) == len(ids)
    assert "".join(tokens) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", ["naïve 😀 日本語", "a\ufffdb", "  spaces  ", "<|im_start|>user\nHi<|im_end|>\n", ""])
def test_characters_over_several_tokens_come_out_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(token_texts(ids, tokenizer)) == text


def test_a_text_cut_within_a_character_shows_the_broken_end(tokenizer: Any) -> None:
    ids = tokenizer.encode("ok 😀", add_special_tokens=False)[:-2]
    tokens = token_texts(ids, tokenizer)
    assert len(tokens) == len(ids)
    assert "".join(tokens).startswith("ok ")


def test_the_first_token_is_never_trained() -> None:
    assert trained_flags(Example(np.array([1, 2, 3], np.int32), np.array([1, 0, 0.5], np.float32))) == [0, 0, 1]
    assert trained_flags(Example(np.zeros(0, np.int32), np.zeros(0, np.float32))) == []


def test_trained_tokens_are_green_and_special_ones_bold(tokenizer: Any) -> None:
    shown = show([example(tokenizer, "<|im_start|>", "yes<|im_end|>")], tokenizer, ("f.json", 3))
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="standard").print(coloured(shown))
    text = stream.getvalue()
    assert "\x1b[1;2m<|im_start|>" in text  # bold and dim
    assert "\x1b[32my" in text  # green
    assert "\x1b[1;32m<|im_end|>" in text
    assert shown.title == "f.json, row 3: 5 tokens, 4 trained (80.0%)"


def test_no_control_character_reaches_the_terminal(tokenizer: Any) -> None:
    shown = show([example(tokenizer, "\x1b[2J\x07", "\x1b]0;title\x07")], tokenizer, ("f\x1b[31m.json", 1))
    account = Account([SourceAccount("a\x1b[2J", "text", Rows(read=1, malformed=1))], [Malformed("f", 1, "bad \x1b[2J")])
    stream = io.StringIO()
    Console(file=stream, color_system=None, width=200).print(view(account, [shown]))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", stream.getvalue())


def test_the_page_escapes_everything(tokenizer: Any) -> None:
    evil = "<script>alert('x')</script>&\"<img src=x onerror=y>"
    shown = show([example(tokenizer, evil, evil)], tokenizer, (evil, 1), evil)
    account = Account([SourceAccount(evil, evil, Rows(read=1, malformed=1))], [Malformed(evil, 1, evil)], lengths=Lengths.of([3, 9]))
    document = page(evil, account, [shown])
    body = document.split("</head>")[1]
    assert "<script" not in document
    assert "<img" not in document
    assert not re.search(r"<[^>]*onerror", body)
    assert html.unescape("".join(re.findall(r'<span class="[tm][^>]*>(.*?)</span>', body.split("<pre>")[1], re.S))) == evil * 2
    assert "default-src 'none'" in document


def test_the_page_marks_trained_tokens(tokenizer: Any) -> None:
    document = page("t", None, [show([example(tokenizer, "no", "yes<|im_end|>")], tokenizer, ("f", 1))])
    assert re.search(r'<span class="m" title="token 1, id \d+">n</span>', document)
    assert re.search(r'<span class="t s" title="token 6, id 2">&lt;\|im_end\|&gt;</span>', document)


def test_the_bars_are_as_long_as_the_counts() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print(histogram(Lengths.of([1] * 8 + [2] * 4 + [3])))
    bars = [line.count("█") for line in stream.getvalue().splitlines()[1:]]
    assert bars == [40, 20, 5]


def test_the_bars_begin_with_the_shortest_example() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print(histogram(Lengths.of([12, 14, 14])))
    assert [line.split()[:2] for line in stream.getvalue().splitlines()[1:]] == [["12", "1"], ["13", "0"], ["14", "2"]]
    Console(file=stream, width=100).print(histogram(Lengths.of([12, 20])))
    assert "11 to 12" in stream.getvalue() and "9 to 10" not in stream.getvalue()


def test_the_bars_of_nothing() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print(histogram(Lengths()))
    assert "length in tokens" in stream.getvalue()


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"q{n} ", "completion": f"a{n}"} for n in range(1, 5)]
    lines += [{"prompt": "", "completion": ""}, {"prompt": 1, "completion": 2}, {"prompt": "p" * 30, "completion": "late"}]
    Path("a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("b.jsonl").write_text(json.dumps({"prompt": "other ", "completion": "source"}) + "\n")


def row(tokenizer: Any, number: int, train: Any = "a.jsonl", **options: Any) -> Any:
    return row_number(Data.model_validate({"train": train, **options}), Renderer(tokenizer), tokenizer, number, seed=1)


@pytest.mark.usefixtures("rows")
class TestRow:
    def test_shows_what_is_trained(self, tokenizer: Any) -> None:
        shown = row(tokenizer, 2)
        assert (shown.file, shown.row) == ("a.jsonl", 2)
        document = shown.to_json()
        assert list(document) == ["ids", "trained", "tokens"]
        assert len(document["ids"]) == len(document["trained"]) == len(document["tokens"])
        trained = [token for token, flag in zip(document["tokens"], document["trained"], strict=True) if flag]
        assert "".join(trained) == "a2<|im_end|>"
        assert json.loads(json.dumps(document)) == document

    def test_counts_through_several_sources(self, tokenizer: Any) -> None:
        shown = row(tokenizer, 8, ["a.jsonl", "b.jsonl"])
        assert (shown.file, shown.row) == ("b.jsonl", 1)
        assert "number 8 through all files in turn" in shown.title

    def test_tells_how_often_a_mix_takes_the_row(self, tokenizer: Any) -> None:
        both = {"train": ["a.jsonl", "b.jsonl"]}
        assert re.search(r"\d times in an epoch by data.mix: oversample", row(tokenizer, 8, **both, mix="oversample").title)
        assert "not used: data.mix: undersample ends before it" in row(tokenizer, 7, **both, mix="undersample").title
        assert "data.mix" not in row(tokenizer, 8, **both, mix="round_robin").title

    def test_goes_by_the_number_in_the_file_where_a_split_cuts_it(self, tokenizer: Any) -> None:
        assert "".join(row(tokenizer, 3, {"path": "a.jsonl", "split": "train[1:]"}).tokens).startswith("q3")

    def test_an_empty_row_has_no_tokens(self, tokenizer: Any) -> None:
        shown = row(tokenizer, 5)
        assert shown.to_json() == {"ids": [], "trained": [], "tokens": []}
        assert "empty" in shown.title

    def test_a_malformed_row_is_an_error_with_its_place(self, tokenizer: Any) -> None:
        with pytest.raises(RowError, match=r"a.jsonl:6, row 6"):
            row(tokenizer, 6)

    def test_a_row_that_is_not_there(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match="there is no row 9: 7 rows were read"):
            row(tokenizer, 9)

    @pytest.mark.parametrize(
        ("overlong", "count", "remark"),
        [("truncate", 10, "tokens cut off, fully masked, left out"), ("drop", 0, "dropped"), ("split", 35, "split into 4 pieces")],
    )
    def test_an_overlong_row_is_shown_as_it_is_trained(self, tokenizer: Any, overlong: str, count: int, remark: str) -> None:
        shown = row(tokenizer, 7, overlong=overlong, max_length=10)
        assert len(shown.ids) == count
        assert remark in shown.title

    def test_an_overlong_row_can_be_an_error(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match=r"a.jsonl:7, row 7: the example has 35 tokens"):
            row(tokenizer, 7, overlong="error", max_length=10)
