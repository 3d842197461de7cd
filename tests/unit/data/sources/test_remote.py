from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from burnish.config.sections import Source
from burnish.core.errors import DependencyError
from burnish.data.sources import open_source
from burnish.data.sources.remote import remote_fault

from .reading import Read, fields, refusal

LINE = b'{"text": "far away"}\n'


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "rows.jsonl").write_bytes(LINE * 3)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def test_a_file_a_folder_and_a_pattern(read: Read, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/data/train-0.jsonl": LINE, "/data/train-1.jsonl": LINE * 2, "/data/val.jsonl": LINE * 4, "/data/readme.md": b"x"})
    assert len(fields(read("memory://data/train-1.jsonl"))) == 2
    assert len(fields(read("memory://data"))) == 3
    assert len(fields(read("memory://data", split="validation[:3]"))) == 3
    assert len(fields(read("memory://data/*.jsonl"))) == 7
    assert read("memory://data", split="val")[0].file.endswith("/data/val.jsonl")


def test_parquet_and_gzip(read: Read, memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    memory.pipe({"/x.parquet": (tmp_path / "x.parquet").read_bytes(), "/x.jsonl.gz": gzip.compress(LINE, mtime=0)})
    assert fields(read("memory://x.parquet")) == [{"text": "a"}, {"text": "b"}]
    assert fields(read("memory://x.jsonl.gz")) == [{"text": "far away"}]


def test_the_fingerprint_follows_the_content(memory: fsspec.AbstractFileSystem) -> None:
    source = open_source(Source(path="memory://a.jsonl"), seed=0)
    prints: list[str] = []
    for content in (LINE, LINE * 2, LINE):
        memory.pipe("/a.jsonl", content)
        prints.append(source.fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_over_http(read: Read, server: str) -> None:
    rows = read(f"http://{server}/rows.jsonl?download=true")
    assert len(fields(rows)) == 3
    assert rows[0].file == f"http://{server}/rows.jsonl"


def test_nothing_there(read: Read, server: str, memory: fsspec.AbstractFileSystem) -> None:
    secret = f"http://{server}/gone.jsonl?signature=secret"
    assert refusal(read, secret) == f"http://{server}/gone.jsonl: there is no such file or folder"
    assert refusal(read, "memory://gone.jsonl") == "memory://gone.jsonl: there is no such file or folder"
    assert refusal(read, "memory://gone").startswith("memory://gone: there is no data file here (")


def test_no_server(read: Read) -> None:
    message = refusal(read, "http://127.0.0.1:9/rows.jsonl?signature=secret")
    assert message.startswith("http://127.0.0.1:9/rows.jsonl: cannot be read: ")
    assert "secret" not in message


def test_an_unknown_kind_of_address(read: Read) -> None:
    assert refusal(read, "quantum://a.jsonl").startswith("quantum://a.jsonl: addresses of this kind are unknown: ")


def test_a_package_that_is_not_installed() -> None:
    fault = remote_fault(ImportError("Install s3fs to access S3"), "s3://bucket/a.jsonl")
    assert isinstance(fault, DependencyError)
    assert str(fault) == "s3://bucket/a.jsonl: this address needs a package that is not installed (Install s3fs to access S3)"
    assert fault.hint == "pip install 'burnish[cloud]' brings s3:// and gs://."
