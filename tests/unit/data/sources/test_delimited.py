from __future__ import annotations

import csv
import io
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .reading import Read, fields, places, refusal


def test_header_quotes_and_line_breaks(read: Read) -> None:
    rows = read("rows.csv", 'question,answer\n"what,\nwhere","say ""x"""\nwhy,because\n')
    assert fields(rows) == [{"question": "what,\nwhere", "answer": 'say "x"'}, {"question": "why", "answer": "because"}]
    assert places(rows) == [(1, 2), (2, 4)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_header_tells_the_separator(read: Read, separator: str) -> None:
    text = "\ufeff" + separator.join(("prompt", "completion")) + "\r\n" + separator.join(("ü", "b")) + "\r\n"
    assert fields(read("rows.csv", text)) == [{"prompt": "ü", "completion": "b"}]


def test_tsv(read: Read) -> None:
    assert fields(read("rows.tsv", "prompt\tcompletion\n1,5\t2\n")) == [{"prompt": "1,5", "completion": "2"}]


def test_nan_is_a_missing_value_and_other_words_are_text(read: Read) -> None:
    rows = read("rows.csv", "a,b,c,d,e,f\nNaN,nan,None,null,NA,\n")
    assert math.isnan(rows[0].fields["a"])
    assert math.isnan(rows[0].fields["b"])
    assert [rows[0].fields[name] for name in "cdef"] == ["None", "null", "NA", ""]


def test_blank_lines_are_no_rows_and_blank_cells_are(read: Read) -> None:
    rows = read("rows.csv", "a,b\n\n1,2\n,\n")
    assert fields(rows) == [{"a": "1", "b": "2"}, {"a": "", "b": ""}]
    assert places(rows) == [(1, 3), (2, 4)]


def test_the_index_that_pandas_writes_gets_a_name(read: Read) -> None:
    assert fields(read("rows.csv", ",text\n0,a\n")) == [{"column 1": "0", "text": "a"}]


def test_cells_larger_than_the_default_limit_of_the_library(read: Read) -> None:
    assert len(fields(read("rows.csv", "text\n" + "x" * 300_000 + "\n"))[0]["text"]) == 300_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c,d,e", "rows.csv:3, row 2: found 3 cells, expected 2 (prompt, completion)"),
        ("c", "rows.csv:3, row 2: found 1 cell, expected 2 (prompt, completion)"),
    ],
)
def test_a_row_of_another_width_harms_itself_only(read: Read, line: str, message: str) -> None:
    rows = read("rows.csv", f"prompt,completion\na,b\n{line}\ng,h\n")
    assert str(rows[1].fault) == message
    assert rows[1].fault is not None
    assert "double quotes" in str(rows[1].fault.hint)
    assert rows[2].fields == {"prompt": "g", "completion": "h"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('a,b\n1,2\n3,"4\n5,6\n', "rows.csv:3: a quote that is opened in this row is never closed"),
        ('a,b\n1,"2"3\n', "rows.csv:2: the row cannot be split into cells: ',' expected after '\"'"),
        ("a,a\n1,2\n", "rows.csv:1: the column 'a' stands in the header more than once"),
        ("\na,b\n1,2\n", "rows.csv:1: expected the names of the columns, found an empty line"),
        ("a,b\n", "rows.csv: is empty: there is not a single row in it"),
        ("", "rows.csv: is empty: there is not a single row in it"),
        ("prompt\nü\n".encode("latin-1"), "rows.csv:2: the text is not UTF-8: byte 0xfc at offset 7 of the file"),
        ("prompt\nü\n".encode("utf-16"), "rows.csv: this is UTF-16 text; save it as UTF-8"),
        (b"a,b\n1,\0\n", "rows.csv:2: a NUL byte at offset 6 of the file"),
        (b"PK\x03\x04 xlsx", "rows.csv: this is a zip archive or a spreadsheet; unpack it, or save it as CSV"),
    ],
)
def test_broken_files(read: Read, data: bytes | str, message: str) -> None:
    assert refusal(read, "rows.csv", data).startswith(message)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(table=st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_what_the_csv_module_writes_is_read_back(read: Read, table: list[tuple[str, str]]) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("first", "second"), *table])
    rows = read("rows.csv", stream.getvalue())
    expected = [{"first": a, "second": b} for a, b in table]
    assert [row for row in fields(rows) if not {"NaN", "nan"} & set(map(str, row.values()))] == [
        row for row in expected if not {"NaN", "nan"} & set(row.values())
    ]
