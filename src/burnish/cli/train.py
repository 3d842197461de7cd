"""`burnish train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from burnish.run import Run


def main(file: Path, overrides: Sequence[str]) -> None:
    """Trains as the run file says."""
    Run.from_file(file, *overrides).train()
