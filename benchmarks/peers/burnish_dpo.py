"""burnish's side of benchmarks/preference.py: what `burnish train` does, with a callback that measures. Both forms are its defaults."""

from __future__ import annotations

from benchmarks.peers.burnish_sft import Measured, settings
from benchmarks.peers.job import Job, StepLog, read_job
from burnish.core.garbage import paused

with paused(keep=True):  # as the command does
    from burnish.run import Run


def main() -> None:
    job = read_job()
    log = StepLog(job)
    Run.from_config(preference(job), callbacks=[Measured(log)]).train()
    log.end("burnish", "transformers", "peft")


def preference(job: Job) -> dict[str, object]:
    same = settings(job)
    train = {key: value for key, value in dict(same["train"]).items() if key != "batch_tokens"}  # pyright: ignore
    return same | {"objective": {"kind": "dpo", "beta": 0.1}, "train": train | {"batch_size": job.batch_size}}


if __name__ == "__main__":
    main()
