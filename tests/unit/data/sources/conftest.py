from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.config.sections import Source
from burnish.data.sources import Row, open_source

from .reading import Read


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    monkeypatch.chdir(tmp_path)

    def read(path: str, data: bytes | str | None = None, **settings: Any) -> list[Row]:
        if data is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(data.encode() if isinstance(data, str) else data)
        return list(open_source(Source(path=path, **settings), seed=0).rows())

    return read
