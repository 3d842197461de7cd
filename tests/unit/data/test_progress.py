from __future__ import annotations

import gzip
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from burnish.config.sections import Source
from burnish.data.progress import bar, expected_rows
from burnish.data.sources import open_source

ROWS = [{"prompt": f"question {number:04}", "completion": "naïve answer"} for number in range(500)]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    Path("rows.jsonl").write_text(lines)
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    pq.write_table(pa.Table.from_pylist(ROWS), "rows.parquet")


def expected(*settings: dict[str, Any]) -> int | None:
    sources = [open_source(Source.model_validate(one), seed=1) for one in settings]
    return expected_rows(sources, [list(islice(source.rows(), 100)) for source in sources])


@pytest.mark.parametrize("path", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_the_number_of_rows_is_judged_by_the_size_of_the_file(path: str) -> None:
    assert expected({"path": path}) == pytest.approx(500, rel=0.2)


def test_several_sources_add_up() -> None:
    assert expected({"path": "rows.parquet"}, {"path": "rows.parquet", "limit": 20}) == 520


def test_what_cannot_be_judged_is_unknown_or_the_limit() -> None:
    assert expected({"path": "rows.jsonl.gz"}) is None
    assert expected({"path": "rows.jsonl.gz", "limit": 30}) == 30
    assert expected({"path": "rows.parquet", "split": "train[:10%]"}) is None
    assert expected({"path": "rows.jsonl"}, {"path": "rows.jsonl.gz"}) is None


def test_the_bar_shows_rows_rate_and_time_left() -> None:
    stream = io.StringIO()
    with bar(Console(file=stream, force_terminal=True, width=120), shown=True) as display:
        work = display.add_task("tokenising", total=100)
        display.update(work, advance=30)
        display.refresh()
        display.update(work, advance=30)
        display.refresh()
    assert "tokenising" in stream.getvalue()
    assert "60/100" in stream.getvalue()
    assert "rows/s" in stream.getvalue()


def test_there_is_no_bar_where_nobody_looks() -> None:
    stream = io.StringIO()
    with bar(Console(file=stream), shown=True) as display:
        display.update(display.add_task("tokenising", total=3), advance=3)
    assert stream.getvalue() == ""
