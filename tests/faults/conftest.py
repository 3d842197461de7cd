"""Where the short fault suite makes its tries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.faults.suite.processes import Server
from tests.faults.suite.tries import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One server and one set of uninterrupted runs for all tests of a worker."""
    server = Server()
    try:
        yield Lab(tmp_path_factory.mktemp("faults"), 0, server)
    finally:
        server.close()
