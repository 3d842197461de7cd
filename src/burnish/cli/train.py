"""`burnish train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from burnish.config.load import load_run
from burnish.core.log import console


def main(file: Path, overrides: Sequence[str]) -> None:
    """Trains as the run file says."""
    loaded = load_run(file, overrides)
    # Only now the heavy imports: a mistake in the run file is answered at once.
    with console.status("starting"):
        from burnish.run import Run

    Run(loaded.config, base=file.resolve().parent).train()
