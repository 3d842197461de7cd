"""`burnish train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from burnish.config.load import load_run
from burnish.core.garbage import paused
from burnish.core.log import console, counted, info
from burnish.core.signals import Interruptible


def main(file: Path, overrides: Sequence[str]) -> None:
    """Trains as the run file says, or tells where the model is, if that is done already."""
    with Interruptible():
        loaded = load_run(file, overrides)
        # Only now the heavy imports: a mistake in the run file is answered at once.
        with console.status("starting"), paused(keep=True):
            from burnish.run import Run

        run = Run(loaded.config, base=file.resolve().parent)
        if model := run.finished:
            info(f"already finished after {counted(run.total_steps, 'step')}: {model}  report: {run.folder / 'report.html'}")
            info("to go on, ask for more epochs or steps; to begin anew, choose another output folder")
            return
        run.train()
