from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.cli.data import main
from burnish.core.errors import BurnishError, DataError


@pytest.fixture(autouse=True)
def run_file(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": f"Answer {n}"}]} for n in range(30)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_model}\ndata: {{train: rows.jsonl, cache: cache, workers: 1}}\n")
    return file


def run(file: Path, *overrides: str, **options: Any) -> None:
    main(file, overrides, **{"row": None, "html": None, "as_json": False, **options})


def test_the_account_as_json(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_file, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["rows"]["read"] == document["rows"]["kept"] == 30
    assert document["tokens"]["trained"] < document["tokens"]["total"]
    assert document["tokens"]["truncated"] == 0


def test_a_row_as_json(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_file, row="3", as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["ids", "trained", "tokens"]
    assert "".join(t for t, flag in zip(document["tokens"], document["trained"], strict=True) if flag) == "Answer 2<|im_end|>"


def test_the_account_and_some_rows_on_screen(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_file)
    captured = capsys.readouterr()
    assert "rows read" in captured.out
    assert "length in tokens" in captured.out
    assert captured.out.count("Answer") == 3
    assert "messages" in captured.err


def test_one_row_on_screen(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_file, row="30")
    out = capsys.readouterr().out
    assert "row 30:" in out
    assert "Answer 29<|im_end|>" in out
    assert "rows read" not in out


def test_a_page(run_file: Path) -> None:
    run(run_file, html=Path("out.html"))
    assert Path("out.html").read_text().count("<pre>") == 25
    run(run_file, html=Path("row.html"), row="1")
    assert Path("row.html").read_text().count("<pre>") == 1


def test_a_page_that_cannot_be_written(run_file: Path) -> None:
    with pytest.raises(BurnishError, match=r"absent/out.html"):
        run(run_file, html=Path("absent/out.html"), row="1")


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_row_is_never_cut(columns: str, run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = " ".join(f"the user asks {n}" for n in range(40))
    Path("rows.jsonl").write_text(json.dumps({"prompt": "the user asks", "completion": f"{words} in full sentences"}) + "\n")
    run(run_file, row="1")
    out = capsys.readouterr().out
    assert f"{words} in full sentences" in out and out.rstrip().endswith("⟧")


def test_a_row_that_is_not_there(run_file: Path) -> None:
    with pytest.raises(DataError, match="no row 31"):
        run(run_file, row="31")


def test_a_stream_is_looked_at_from_its_beginning(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.cli.data.GLANCE", 10)
    run(run_file, "data.streaming=true", "train.steps=5", as_json=True)
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["rows"]["read"] == 10
    assert sum(bar[2] for bar in document["lengths"]["histogram"]) == 10
    assert "its first 10 rows" in captured.err


def test_without_colour_trained_tokens_stand_in_brackets(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_file, row="3")
    out = capsys.readouterr().out
    assert "trained tokens stand between ⟦ and ⟧" in out
    assert "⟦Answer 2<|im_end|>⟧" in out and out.count("⟦") == 2  # once in the legend
    assert "\x1b" not in out


def test_in_colour_there_are_no_brackets(run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run(run_file, row="3")
    out = capsys.readouterr().out
    assert "⟦" not in out and "\x1b[32m" in out
    assert "trained tokens are" in out


def test_a_row_by_file_and_number(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.jsonl").write_text(json.dumps({"prompt": "p ", "completion": "the other file"}) + "\n")
    both = "data.train=[rows.jsonl, more.jsonl]"
    run(run_file, both, row="more.jsonl:1")
    out = capsys.readouterr().out
    assert "more.jsonl, row 1: " in out and "the other file" in out and "in turn" not in out
    run(run_file, both, row="31")
    assert "number 31 through all files in turn" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no file 'mor.jsonl'.*did you mean 'more.jsonl'"):
        run(run_file, both, row="mor.jsonl:1")
    with pytest.raises(DataError, match=r"more.jsonl: there is no row 2"):
        run(run_file, both, row="more.jsonl:2")


@pytest.mark.parametrize("row", ["three", "0", "-1", "rows.jsonl:", ""])
def test_a_row_that_is_no_number(run_file: Path, row: str) -> None:
    with pytest.raises(BurnishError, match="FILE:NUMBER"):
        run(run_file, row=row)
