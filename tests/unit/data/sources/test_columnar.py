from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from datasets import Dataset

from .reading import Read, fields, places, refusal

ROWS: list[dict[str, Any]] = [{"prompt": f"é{number}", "score": number} for number in range(1200)]


def write(name: str, table: pa.Table) -> None:
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, name, row_group_size=500)
    elif name.endswith(".feather"):
        pyarrow.feather.write_feather(table, name)
    else:
        kind = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
        with kind(name, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "file.arrow", "stream.arrow"])
def test_all_rows_in_order(read: Read, name: str) -> None:
    write(name, pa.Table.from_pylist(ROWS))
    rows = read(name)
    assert fields(rows) == ROWS
    assert places(rows) == [(number, None) for number in range(1, 1201)]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow"])
def test_a_null_inside_an_object_is_an_absent_key(read: Read, name: str) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [{"z": "1"}, {"w": "2"}]}}]
    write(name, pa.Table.from_pylist([{"calls": calls, "note": None}, {"calls": [], "note": "n"}]))
    assert fields(read(name)) == [{"calls": calls, "note": None}, {"calls": [], "note": "n"}]


def test_a_folder_that_datasets_saved(read: Read, tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert fields(read("saved")) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", b"PAR1 no", "a.parquet: this is no whole Parquet file: "),
        ("a.parquet", b"", "a.parquet: is empty: there is not a single row in it"),
        ("a.arrow", b"ARROW1\0\0 no", "a.arrow: this is no whole Arrow file: "),
        ("a.arrow", b"hello, I am text", "a.arrow: this is no whole Arrow file: "),
    ],
)
def test_broken_files(read: Read, name: str, data: bytes, message: str) -> None:
    assert refusal(read, name, data).startswith(message)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_a_file_cut_short(read: Read, name: str) -> None:
    write(name, pa.Table.from_pylist(ROWS))
    whole = Path(name).read_bytes()
    assert refusal(read, name, whole[: len(whole) // 2]).startswith(f"{name}: this is no whole ")


def test_bad_utf8_is_named_with_its_row(read: Read) -> None:
    texts = pa.array([b"fine"] * 600 + [b"\xff"]).cast(pa.binary()).view(pa.string())
    write("file.arrow", pa.table({"text": texts}))
    assert refusal(read, "file.arrow") == "file.arrow, row 601: a text is not UTF-8: byte 0xff"
