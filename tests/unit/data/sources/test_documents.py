from __future__ import annotations

from pathlib import Path

import pytest

from burnish.data.sources import documents

from .reading import Read, fields, places, refusal


@pytest.mark.parametrize("name", ["book.txt", "page.md"])
def test_a_file_is_a_document(read: Read, name: str) -> None:
    text = "# One\n\nA paragraph.\n\n\nAnother, with trailing space. "
    assert fields(read(name, "\ufeff" + text + "\n")) == [{"text": text}]


def test_a_separator_line_begins_a_new_document(read: Read) -> None:
    rows = read("corpus.txt", "one\n\nstill one\n<|endoftext|>\n\n<|endoftext|>\ntwo\n  <|endoftext|>  \n")
    assert fields(rows) == [{"text": "one\n\nstill one"}, {"text": "two"}]
    assert places(rows) == [(1, 1), (2, 7)]


def test_each_file_of_a_folder_counts_from_one(read: Read, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "texts" / name).write_text(f"in {name}")
    rows = read("texts")
    assert [(row.file, row.number, row.fields) for row in rows] == [
        ("texts/a.txt", 1, {"text": "in a.txt"}),
        ("texts/b.md", 1, {"text": "in b.md"}),
    ]


@pytest.mark.parametrize("line", ["word " * 5 + "\n", "word " * 5 + "\n\n"])
def test_a_giant_document_comes_in_pieces_and_nothing_is_lost(read: Read, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(documents, "LARGEST", 100)
    text = line * 40
    pieces = [row["text"] for row in fields(read("book.txt", text))]
    assert len(pieces) > 3
    assert max(map(len, pieces)) <= 200 + len(line)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"fine\nbad \xe9 byte\n", "a.txt:2: the text is not UTF-8: byte 0xe9 at offset 9 of the file"),
        (b"fine\n\0\n", "a.txt:2: a NUL byte at offset 5 of the file"),
        (b"  \n\n", "a.txt: is empty: there is not a single row in it"),
        (b"", "a.txt: is empty: there is not a single row in it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a.txt: this is a Git LFS pointer instead of the data; run 'git lfs pull'"),
        (b"\n<!DOCTYPE html>", "a.txt: this is an HTML page instead of data; use the address of the file itself"),
    ],
)
def test_broken_files(read: Read, data: bytes, message: str) -> None:
    assert refusal(read, "a.txt", data).startswith(message)
