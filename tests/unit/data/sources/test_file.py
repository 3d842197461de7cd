from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import SourceError
from burnish.data.sources.file import File, suffixes
from burnish.data.sources.remote import shown_name

from .reading import Read, fields, refusal

TEXT = b'{"n": 1}\n{"n": 2}\n'
ROWS = [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(TEXT, mtime=0)),
        ("a.jsonl.gz", gzip.compress(TEXT[:9], mtime=0) + gzip.compress(TEXT[9:], mtime=0)),
        ("a.jsonl.zst", zstandard.compress(TEXT)),
        ("a.jsonl.zst", zstandard.compress(TEXT[:9]) + zstandard.compress(TEXT[9:])),
        ("a.json.gz", gzip.compress(b'[{"n": 1}, {"n": 2}]', mtime=0)),
        ("a.JSON.GZ", gzip.compress(b'[{"n": 1}, {"n": 2}]', mtime=0)),
        ("a.csv.zst", zstandard.compress(b"n\n1\n2\n")),
        ("a.txt.gz", gzip.compress(b"1\n<|endoftext|>\n2\n", mtime=0)),
    ],
)
def test_compressed_files(read: Read, name: str, data: bytes) -> None:
    assert [str(next(iter(row.values()))) for row in fields(read(name, data))] == ["1", "2"]


def test_large_zstd_frames_are_read_whole(read: Read) -> None:
    text = os.urandom(300_000).hex().encode()
    assert fields(read("a.txt.zst", zstandard.compress(text)))[0]["text"] == text.decode()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("cut", [1, 5])
def test_compressed_data_cut_short(read: Read, name: str, cut: int) -> None:
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    message = refusal(read, name, compress(TEXT * 1000)[:-cut])
    assert message.startswith(f"{name}: the compressed data is damaged or cut short (")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst"])
def test_a_suffix_that_promises_compression(read: Read, name: str) -> None:
    assert refusal(read, name, TEXT).startswith(f"{name}: the compressed data is damaged or cut short (")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", gzip.compress(TEXT, mtime=0), "a.json: this is gzip data; give the file the suffix .gz"),
        ("a.jsonl", zstandard.compress(TEXT), "a.jsonl: this is zstd data; give the file the suffix .zst"),
        ("a.json", b"PAR1....", "a.json: this is Parquet data; give the file the suffix .parquet"),
        ("a.txt", b"ARROW1\0\0", "a.txt: this is Arrow data; give the file the suffix .arrow"),
        ("a.xyz", b"", "a.xyz: the suffix '.xyz' is unknown; known are .json, .jsonl, "),
        ("data", b"", "data: the suffix '' is unknown; known are .json, .jsonl, "),
    ],
)
def test_a_suffix_that_does_not_fit(read: Read, name: str, data: bytes, message: str) -> None:
    assert refusal(read, name, data).startswith(message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(read: Read, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(TEXT)
    (tmp_path / "a.jsonl").chmod(0)
    assert refusal(read, "a.jsonl") == "a.jsonl: cannot be read: Permission denied"


def test_a_file_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read: No such file or directory"):
        File.at(str(tmp_path / "a.jsonl")).head(1)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_equal_digests_mean_equal_bytes(tmp_path_factory: pytest.TempPathFactory, one: bytes, two: bytes) -> None:
    folders = [tmp_path_factory.mktemp("digest") for _ in range(2)]
    digests: list[bytes] = []
    for folder, data in zip(folders, (one, two), strict=True):
        (folder / "a.json").write_bytes(data)
        digests.append(File.at(str(folder / "a.json")).digest())
    assert (digests[0] == digests[1]) == (one == two)


def test_the_name_is_part_of_the_digest_and_the_folder_is_not(tmp_path: Path) -> None:
    for name in ("x/a.json", "y/a.json", "x/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(TEXT)
    x, y, other = (File.at(str(tmp_path / name)).digest() for name in ("x/a.json", "y/a.json", "x/a.jsonl"))
    assert x == y
    assert x != other


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.json", (".json", "")),
        ("dir.d/a.JSONL.zst", (".jsonl", ".zst")),
        ("a.gz", ("", ".gz")),
        ("https://host/a.jsonl?download=true", (".jsonl", "")),
        ("s3://bucket/a.csv.gz", (".csv", ".gz")),
    ],
)
def test_suffixes(path: str, expected: tuple[str, str]) -> None:
    assert suffixes(path) == expected


def test_secrets_in_a_url_are_not_shown() -> None:
    assert shown_name("https://user:secret@host/a.jsonl?signature=secret") == "https://host/a.jsonl"
    assert shown_name("data/a#1?.json") == "data/a#1?.json"
