from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.core.errors import SourceError
from burnish.data.sources import json_rows, streams
from burnish.data.sources.file import File
from burnish.data.sources.json_rows import read_json

from .reading import Read, fields, places, refusal

ROWS: list[dict[str, Any]] = [{"n": number, "text": f'é\n"{number}"'} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.rstrip("\n"),
        LINES.replace("\n", "\r\n"),
        "\ufeff" + LINES,
        "\n \n" + LINES.replace("\n", "\n\n"),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff\n" + json.dumps(ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1", "rows": ROWS, "licence": None}, indent=1),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        " ".join(json.dumps(row, indent=2) for row in ROWS),
        json.dumps({"n": [row["n"] for row in ROWS], "text": [row["text"] for row in ROWS]}),
        json.dumps({key: {str(index): row[key] for index, row in enumerate(ROWS)} for key in ("n", "text")}),
    ],
    ids=["lines", "no-last-break", "crlf", "bom", "blank-lines", "array", "indented", "bom-array", "wrapper", "named-wrapper", "objects",
         "objects-in-a-line", "columns", "pandas"],
)  # fmt: skip
def test_what_the_content_is_decides_not_the_suffix(read: Read, name: str, text: str) -> None:
    rows = read(name, text)
    assert fields(rows) == ROWS
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert all(row.file == name for row in rows)


def test_lines_are_exact(read: Read) -> None:
    assert places(read("a.jsonl", '{"a":1}\n\n{"a":2}\n')) == [(1, 1), (2, 3)]
    assert places(read("a.json", '[\n{"a":1},{"a":2},\n\n{"a":\n3}]')) == [(1, 2), (2, 2), (3, 4)]
    assert places(read("b.json", '{"a":1}\n{"a":2}\n')) == [(1, 1), (2, 2)]
    assert places(read("c.json", '{"a":\n1}\n{"a":2}\n')) == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"messages": [{"role": "user", "content": "a"}], "tags": ["x"]},
        {},
        {"id": 7, "data": ["a question", "an answer"]},
    ],
)
def test_a_single_object_is_a_row(read: Read, row: dict[str, Any]) -> None:
    assert fields(read("a.json", json.dumps(row))) == [row]
    assert fields(read("a.jsonl", json.dumps(row) + "\n" + json.dumps(row))) == [row, row]


def test_a_row_of_any_size(read: Read) -> None:
    rows = [{"text": "x" * 3_000_000}, {"text": "y"}, {"text": "\\" * 200_000}]
    assert fields(read("a.json", json.dumps(rows))) == rows
    assert fields(read("a.jsonl", "\n".join(map(json.dumps, rows)))) == rows
    assert fields(read("b.json", "\n".join(map(json.dumps, rows)))) == rows


def test_nan_is_read_as_such(read: Read) -> None:
    (row,) = read("a.json", '[{"text": NaN}]')
    assert math.isnan(row.fields["text"])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3),
    max_leaves=8,
)
documents = st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), values, max_size=4), min_size=1, max_size=6)


def read_in_pieces(text: str, size: int, folder: Path) -> list[tuple[int, int | None, dict[str, Any]]]:
    """The rows, with the window fed `size` bytes at a time."""
    (folder / "rows.json").write_text(text, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", size)
        return [(row.number, row.line, dict(row.fields)) for row in read_json(File.at(str(folder / "rows.json")))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=documents, size=st.integers(1, 40), indent=st.none() | st.integers(0, 2), ascii_only=st.booleans())
def test_an_array_read_in_pieces_is_what_json_reads(
    tmp_path: Path, rows: list[dict[str, Any]], size: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    assert [row for _, _, row in read_in_pieces(text, size, tmp_path)] == rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=documents, size=st.integers(1, 40), cut=st.integers(1, 200))
def test_an_array_cut_short_is_refused_with_its_line(tmp_path: Path, rows: list[dict[str, Any]], size: int, cut: int) -> None:
    text = json.dumps(rows, indent=1)
    short = text[: max(1, len(text) - cut)]
    with pytest.raises(SourceError) as caught:
        read_in_pieces(short, size, tmp_path)
    where = caught.value.where
    assert where is not None
    assert where.line is not None
    assert 1 <= where.line <= short.count("\n") + 1


def test_numbers_are_not_cut_at_the_edge_of_the_window(tmp_path: Path) -> None:
    text = '[{"a": 1234567, "b": -1.5e10, "c": true, "d": null}]'
    expected = json.loads(text)
    for size in range(1, len(text)):
        assert [row for _, _, row in read_in_pieces(text, size, tmp_path)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": "one"},\n {"a": "tw', "rows.json:2, row 2: the JSON breaks off within row 2, which begins on line 2"),
        ('[{"a": "one"},\n {"a": "two"}', "rows.json:2, row 2: the JSON breaks off on line 2: expected ',', found the end of the file"),
        ('[{"a": "one"},', "rows.json:1, row 2: the JSON breaks off within row 2, which begins on line 1"),
        ("[", "rows.json:1, row 1: the JSON breaks off within row 1, which begins on line 1"),
        ('{"data": [{"a": 1},', "rows.json:1, row 2: the JSON breaks off within row 2, which begins on line 1"),
        ('{"a": ', "rows.json:1: the JSON breaks off within the value that begins on line 1"),
        ('[{"a": 1},\n {"a": oops}]', "rows.json:2, row 2: invalid JSON at column 8: expecting value"),
        ('[{"a": 1}\n {"a": 2}]', "rows.json:2, row 1: invalid JSON at column 2: expected ',', found '{'"),
        ('[{"a": 1},\n]', "rows.json:2, row 2: invalid JSON at column 1: expecting value"),
        ("[{'a': 1}]", "rows.json:1, row 1: invalid JSON at column 3: expecting property name enclosed in double quotes"),
        ('[{"a": "x\ny"}]', "rows.json:1, row 1: invalid JSON at column 10: a line break or control character inside a string"),
        ('[{"a": 1}] [{"a": 2}]', "rows.json:1, row 1: invalid JSON at column 12: there is more text after the end of the array"),
        ('{"data": [{"a": 1}]} 7', "rows.json:1, row 1: invalid JSON at column 22: there is more text after the end of the object"),
        ("hello", "rows.json:1: invalid JSON at column 1: expected '[' or '{' at the start of the rows, found 'h'"),
        ('{"a": ["x", "y"], "b": ["z"]}', "rows.json: the columns differ in length: a has 2, b has 1"),
        ('{1: 2}\n', "rows.json:1: invalid JSON at column 2: expected a key in double quotes"),
        ("[" + '{"a":' * 100_000, "rows.json:1, row 1: invalid JSON at column 2: nested too deeply"),
        ('[{"a": %s}]' % ("1" * 5000), "rows.json:1, row 1: invalid JSON at column 2: Exceeds the limit"),
        ("[]", "rows.json: is empty: there is not a single row in it"),
        ("", "rows.json: is empty: there is not a single row in it"),
        (" \n", "rows.json: is empty: there is not a single row in it"),
    ],
)  # fmt: skip
def test_broken_documents(read: Read, text: str, message: str) -> None:
    assert refusal(read, "rows.json", text).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": oops}', "rows.jsonl:3, row 2: invalid JSON at column 7: expecting value"),
        (b'{"a": "cut', "rows.jsonl:3, row 2: the JSON breaks off within the line"),
        (b"[1, 2]", "rows.jsonl:3, row 2: expected an object with the row's fields, found a list"),
        (b"null", "rows.jsonl:3, row 2: expected an object with the row's fields, found null"),
        (b'{"a": "\xff"}', "rows.jsonl:3, row 2: the text is not UTF-8: byte 0xff at offset 17 of the file"),
        (b'{"a":' * 100_000, "rows.jsonl:3, row 2: invalid JSON: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "rows.jsonl:3, row 2: invalid JSON: Exceeds the limit (4300 digits)"),
        (b'{"a": "\0"}', "rows.jsonl:3, row 2: a NUL byte at offset 17 of the file"),
    ],
)
def test_a_broken_line_harms_its_own_row_only(read: Read, line: bytes, message: str) -> None:
    rows = read("rows.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 3}\n')
    assert places(rows) == [(1, 1), (2, 3), (3, 4)]
    assert [row.fault is None for row in rows] == [True, False, True]
    assert str(rows[1].fault).startswith(message)
    assert dict(rows[2].fields) == {"a": 3}


def test_a_broken_first_line_is_still_lines(read: Read) -> None:
    rows = read("rows.jsonl", '{"a": 1\n{"a": 2}\n')
    assert str(rows[0].fault).startswith("rows.jsonl:1, row 1: the JSON breaks off within the line")
    assert rows[1].fault is None


def test_an_element_that_is_no_object(read: Read) -> None:
    rows = read("rows.json", '[{"a": 1}, "text", {"a": 2}]')
    assert str(rows[1].fault) == "rows.json:1, row 2: expected an object with the row's fields, found a string"


def test_an_array_is_read_lazily(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_text("[" + ",".join(json.dumps({"n": n}) for n in range(100_000)) + "]")
    seen = 0
    decoded = streams.decoded

    def counted(*args: Any) -> Any:
        nonlocal seen
        for piece in decoded(*args):
            seen += len(piece)
            yield piece

    monkeypatch.setattr(json_rows.streams, "decoded", counted)
    rows = read_json(File.at("rows.json"))
    assert next(rows).fields == {"n": 0}
    assert seen <= 2 * streams.CHUNK
