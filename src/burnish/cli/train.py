"""`burnish train`: in this process, or in one for each device of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from burnish.config.load import load_run
from burnish.config.run import RunConfig
from burnish.core.garbage import paused
from burnish.core.log import console, counted, info
from burnish.core.signals import Interruptible
from burnish.engine import launcher
from burnish.engine.lock import RunLock


def main(file: Path, overrides: Sequence[str]) -> None:
    """Trains as the run file says, or tells where the model is, if that is done already."""
    launcher.follow_launcher()
    launcher.adopt_slurm()
    with Interruptible():
        loaded = load_run(file, overrides)
        config = loaded.config
        launcher.tell_ignored(config.parallel)
        with loaded.located():
            RunLock(Path(config.output), active=not launcher.is_launched()).look()
            count = 1 if launcher.is_launched() else launcher.processes(config.parallel)
            if count == 1:
                _train(config, file.resolve().parent)
                return
        sys.exit(launcher.launch(["train", str(file), *overrides], count, folder=Path(config.output), restarts=config.parallel.restarts))


def _train(config: RunConfig, base: Path) -> None:
    # Only now the heavy imports: a mistake in the run file is answered at once.
    with console.status("starting"), paused(keep=True):
        from burnish.run import Run

    run = Run(config, base=base)
    with launcher.cause_first():
        if model := run.finished:
            info(f"already finished after {counted(run.total_steps, 'step')}: {model}  report: {run.folder / 'report.html'}")
            info("to go on, ask for more epochs or steps; to begin anew, choose another output folder")
            return
        run.train()
