"""`burnish train`: in this process, or in one for each device of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from burnish.config.load import load_run
from burnish.core.garbage import paused
from burnish.core.log import console, info
from burnish.engine import launcher


def main(file: Path, overrides: Sequence[str]) -> None:
    """Trains as the run file says, or tells where the model is, if that is done already."""
    launcher.follow_launcher()
    launcher.adopt_slurm()
    loaded = load_run(file, overrides)
    config = loaded.config
    if not launcher.is_launched() and (count := launcher.processes(config.parallel)) > 1:
        arguments = ["train", str(file), *overrides]
        sys.exit(launcher.launch(arguments, count, folder=Path(config.output), restarts=config.parallel.restarts))
    # Only now the heavy imports: a mistake in the run file is answered at once.
    with console.status("starting"), paused(keep=True):
        from burnish.run import Run

    run = Run(config, base=file.resolve().parent)
    with launcher.cause_first():
        if model := run.finished:
            info(f"already finished after {run.total_steps:,} steps: {model}  report: {run.folder / 'report.html'}")
            info("to go on, ask for more epochs or steps; to begin anew, choose another output folder")
            return
        run.train()
