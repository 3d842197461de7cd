"""`burnish launch`: the file with which Slurm, Ray or SkyPilot starts a run on several machines. Thin, and meant to be read and changed.

Nothing but text is made here, so none of the three needs to be installed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from burnish.cli.output import write_new
from burnish.cli.parts import needed_by
from burnish.config.load import load_run
from burnish.core.errors import BurnishError, did_you_mean
from burnish.core.log import info, warn

_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be started, and on what."""

    file: Path
    overrides: Sequence[str]
    nodes: int
    gpus: int  # of each machine; 0: CPUs
    gpu: str
    time: str
    name: str
    processes: int  # of each machine
    restarts: int
    folder: str  # the run folder
    extras: tuple[str, ...] = ()  # of burnish, that the run needs

    @property
    def command(self) -> str:
        """`burnish train ...` as a shell reads it, without the program's name."""
        return shlex.join(["train", str(self.file), *self.overrides])


def main(
    kind: str, file: Path, overrides: Sequence[str], *, nodes: int, gpus: int, gpu: str, time: str, output: Path | None = None
) -> None:
    """Prints the file, or writes it.

    Raises:
        ConfigError: the run file is wrong; it is looked at as `burnish check` does.
        BurnishError: the kind is unknown, or the file to write exists.
    """
    if kind not in KINDS:
        raise BurnishError(f"unknown kind '{kind}'; {did_you_mean(kind, KINDS)}")
    if not _TIME.fullmatch(time):
        raise BurnishError(
            f"--time: expected minutes, hours:minutes:seconds or days-hours:minutes:seconds as Slurm reads them, found '{time}'"
        )
    if not _NAME.fullmatch(gpu):
        raise BurnishError(f"--gpu: expected a name like H100 or A100-80GB, found '{gpu}'")
    config = load_run(file, overrides).config
    asked = config.parallel.processes
    processes = gpus or (1 if asked == "auto" else asked)
    if nodes * processes > 1:  # what has to go with so many processes is looked at, too
        load_run(file, [*overrides, f"parallel.processes={nodes * processes}"])
    if gpus and asked not in ("auto", gpus):
        warn(f"parallel.processes: {asked} is not followed: there are {gpus} on each machine, one for each GPU")
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(config.output).name).strip("-") or "run"
    extras = tuple(part.extra for part in needed_by(config))
    job = Job(file, overrides, nodes, gpus, gpu, time, name, processes, config.parallel.restarts, config.output, extras)
    write, start = KINDS[kind]
    text = write(job)
    if output is None:
        print(text, end="")
        return
    write_new(output, text)
    info(f"{output} is written; start it with: {start} {output}")


def slurm(job: Job) -> str:
    """A batch script. Each task is a rank, so signals and exit codes pass through `srun` as they are."""
    gpus = f"#SBATCH --gpus-per-node={job.gpus}\n" if job.gpus else ""
    restarts = "\n# parallel.restarts is not followed here: when a rank has died, `scontrol requeue` or sbatch starts it again."
    restarts = restarts if job.restarts else ""
    return f"""#!/bin/bash
# {job.nodes} x {job.processes} processes. Lines that your cluster wants (--partition, --account, --cpus-per-task) go here.{restarts}
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node={job.processes}
{gpus}#SBATCH --time={job.time}
#SBATCH --output={job.name}-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is over every process gets SIGUSR1: it saves a checkpoint and ends with exit code 3.
#SBATCH --signal=USR1@120

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# --wait: when the first process has ended, the others have this many seconds.
srun --kill-on-bad-exit=0 --wait=300 burnish {job.command}
code=$?

# Exit code 3: stopped with a checkpoint. The job goes back into the queue, and the same command goes on.
if [ "$code" -eq 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def ray(job: Job) -> str:
    """A script for Ray Train. Ray's workers find each other; burnish sees what torchrun would have set."""
    # Workers have a working directory of Ray's own.
    overrides = [*(text for text in job.overrides if not text.startswith("output=")), f"output={job.folder}"]
    arguments = ", ".join(repr(text) for text in [str(job.file.resolve()), *overrides])
    resources = "use_gpu=True" if job.gpus else "use_gpu=False"
    return f'''"""Trains {job.file.name} with Ray Train: python THIS_FILE, or ray job submit -- python THIS_FILE.

All machines must see the run file, its data and its run folder under the same paths.
"""

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train() -> None:
    """In each worker."""
    import burnish

    burnish.train({arguments})


if __name__ == "__main__":
    TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers={job.nodes * job.processes}, {resources}),
        run_config=RunConfig(name={job.name!r}, failure_config=FailureConfig(max_failures={job.restarts})),  # goes on from the checkpoint
    ).fit()
'''


def sky(job: Job) -> str:
    """A task for SkyPilot.

    Raises:
        BurnishError: the run file is not below the working directory, which is what SkyPilot copies.
    """
    here = Path.cwd().resolve()
    if not job.file.resolve().is_relative_to(here):
        raise BurnishError(
            f"{job.file} is not below {here}, which is what SkyPilot copies to the machines", hint="change to a folder above it"
        )
    command = shlex.join(["train", str(job.file.resolve().relative_to(here)), *job.overrides])
    resources = f"accelerators: {{{job.gpu}: {job.gpus}}}" if job.gpus else "cpus: 8+"
    package = f"'burnish[{','.join(job.extras)}]'" if job.extras else "burnish"
    shared = f"\n# All machines must see {job.folder}, data and model under the same paths: mount a bucket." if job.nodes > 1 else ""
    if shared and Path(job.folder).is_relative_to(here):
        place = Path(job.folder).relative_to(here)
        own = f"the run folder {place} would be another one on each machine, in its copy of this folder"
        warn(f"{own}: mount a bucket, and name a place in it with output=/mounted/{place}")
        shared = (
            f"\n# All machines must see one run folder, and {place} is in each one's own copy of this folder: mount a bucket, set output."
        )
    return f"""# {job.nodes} x {job.processes} processes. On spot machines (sky jobs launch) the run folder belongs on a bucket.{shared}
name: burnish-{job.name.lower()}
num_nodes: {job.nodes}
resources:
  {resources}
workdir: .
setup: pip install {package}
run: |
  torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" --nproc-per-node={job.processes} \\
    --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port=29500 \\
    -m burnish {command}
"""


KINDS: dict[str, tuple[Callable[[Job], str], str]] = {"slurm": (slurm, "sbatch"), "ray": (ray, "python"), "sky": (sky, "sky launch")}
"""Kind -> who writes its file, and the command that starts it."""
