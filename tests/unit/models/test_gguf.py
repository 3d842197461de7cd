"""The GGUF header: every value type, and files that are torn or lie."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.core.errors import ModelError
from burnish.models.gguf import GGUFFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int16("a.i16", -300)
    writer.add_uint64("a.u64", 2**40)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_string("a.text", "häß 👍")
    writer.add_array("a.names", ["one", "", "three"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("second", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_equal_the_gguf_package(path: Path) -> None:
    ours = GGUFFile(path)
    theirs = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == theirs
    assert ours.metadata["a.text"] == "häß 👍"
    assert ours.architecture == "llama"


def test_tensors_lie_where_they_should(path: Path) -> None:
    file = GGUFFile(path)
    assert np.array_equal(file.tensor("first"), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert np.array_equal(file.tensor("second"), np.arange(4, dtype=np.float32))
    assert file.tensor("first").flags.writeable


def test_every_cut_of_the_file_is_an_error(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    torn = tmp_path / "torn.gguf"
    for length in range(0, len(whole) - 32, 7):
        torn.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"torn\.gguf: (the GGUF header is torn or malformed|cannot be read)"):
            GGUFFile(torn)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 420), value=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused_never_a_crash(path: Path, position: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] = value
    broken = path.with_name("broken.gguf")
    broken.write_bytes(data)
    try:
        assert GGUFFile(broken).metadata
    except ModelError as error:
        assert "torn or malformed" in error.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + bytes(60), "does not start with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "a count of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "a string of"),
    ],
)
def test_what_is_no_gguf(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        GGUFFile(tmp_path / "none.gguf")


def test_missing_metadata_is_named(path: Path) -> None:
    with pytest.raises(ModelError, match=r"the GGUF metadata has no 'tokenizer\.ggml\.tokens'"):
        GGUFFile(path).require("tokenizer.ggml.tokens")
    assert GGUFFile(path).setting("context_length", 7) == 7
