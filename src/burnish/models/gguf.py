"""Reads GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): metadata, and tensors dequantised to float32.

The header is parsed here rather than by the `gguf` package's reader, which builds a NumPy view per string and needs ten seconds for a large
vocabulary. Blocks are dequantised by the `gguf` package.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from burnish.core.errors import ModelError, Where

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LARGEST_STRING = 1 << 28
_LARGEST_COUNT = 1 << 28
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file. `shape` is in row-major order, as torch and NumPy count."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """An open GGUF file.

    Args:
        path: The file.

    Raises:
        ModelError: when the file cannot be read, is no GGUF, or is torn.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot be read: {error}", where=Where(file=str(path))) from error
        self.metadata: Mapping[str, Any] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
            raise ModelError(f"the GGUF header is torn or malformed ({error})", where=Where(file=str(path))) from error

    @cached_property
    def architecture(self) -> str:
        """`general.architecture`, e.g. `llama` or `qwen2`."""
        return str(self.require("general.architecture"))

    def require(self, key: str) -> Any:
        """The metadata value of `key`.

        Raises:
            ModelError: when the file has none.
        """
        if key not in self.metadata:
            raise ModelError(f"the GGUF metadata has no '{key}'", where=Where(file=str(self.path)))
        return self.metadata[key]

    def setting(self, name: str, default: Any = None) -> Any:
        """The architecture's own metadata, e.g. `context_length` for `llama.context_length`."""
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def tensor(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor as float32, dequantised, in its row-major shape (a fresh, writable array)."""
        info = self.tensors[name]
        block = np.frombuffer(self._bytes, dtype=np.uint8, count=info.size, offset=info.start)
        try:
            values = gguf.dequantize(_typed(block, info), info.kind)
        except NotImplementedError as error:
            raise ModelError(
                f"tensor '{name}' is stored as {info.kind.name}, which cannot be dequantised", where=Where(file=str(self.path))
            ) from error
        return np.array(values, dtype=np.float32).reshape(info.shape)

    def _read_header(self) -> None:
        if self._bytes[:4] != _MAGIC:
            raise ValueError("it does not start with 'GGUF'")
        cursor = _Cursor(self._bytes, 4)
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3")
        tensor_count, entry_count = cursor.count(), cursor.count()
        self.metadata = {cursor.string(): cursor.value(cursor.scalar("<I")) for _ in range(entry_count)}
        heads = [self._tensor_head(cursor) for _ in range(tensor_count)]
        alignment = int(self.metadata.get("general.alignment", _ALIGNMENT))
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        data = -(-cursor.at // alignment) * alignment
        self.tensors = {name: self._place(name, shape, kind, data + offset) for name, shape, kind, offset in heads}

    @staticmethod
    def _tensor_head(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name = cursor.string()
        dimensions = cursor.scalar("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {dimensions} dimensions")
        shape = tuple(reversed([int(cursor.scalar("<Q")) for _ in range(dimensions)]))
        return name, shape, gguf.GGMLQuantizationType(cursor.scalar("<I")), cursor.scalar("<Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, start: int) -> TensorInfo:
        elements = 1
        for dimension in shape:
            elements *= dimension
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if elements % per_block or (shape and shape[-1] % per_block):
            raise ValueError(f"tensor '{name}' of shape {shape} does not fill whole blocks of {kind.name}")
        size = elements // per_block * block_bytes
        if start + size > len(self._bytes):
            raise ValueError(f"tensor '{name}' ends at byte {start + size}, the file has {len(self._bytes)}")
        return TensorInfo(name, shape, kind, start, size)


def _typed(block: np.ndarray[Any, Any], info: TensorInfo) -> np.ndarray[Any, Any]:
    """The raw bytes in the form that `gguf.dequantize` wants: floats as they are, blocks as rows of bytes."""
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(info.kind)
    if plain is not None:
        return block.view(plain)
    rows = 1
    for dimension in info.shape[:-1]:
        rows *= dimension
    return block.reshape(rows, -1)


class _Cursor:
    """Reads GGUF values one after another; every length is checked against the file before it is believed."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def count(self) -> int:
        value = int(self.scalar("<Q"))
        if value > min(_LARGEST_COUNT, len(self.data)):
            raise ValueError(f"a count of {value}")
        return value

    def string(self) -> str:
        length = int.from_bytes(self.data[self.at : self.at + 8], "little")
        start, end = self.at + 8, self.at + 8 + length
        if length > _LARGEST_STRING or end > len(self.data):
            raise ValueError(f"a string of {length} bytes")
        self.at = end
        return self.data[start:end].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, length = int(self.scalar("<I")), self.count()
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise ValueError(f"an array of type {kind}")
        form = f"<{length}{_SCALARS[kind][1]}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)
