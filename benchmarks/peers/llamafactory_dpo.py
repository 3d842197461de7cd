"""LlamaFactory's side of benchmarks/preference.py: its own DPO stage, from the entry point that `llamafactory-cli train` calls.

stock: its defaults (padded to a multiple of 8, activation checkpointing on).
best: no checkpointing. (It packs no pairs.)
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.hugging_face import Measured, measured
from benchmarks.peers.job import Job, StepLog, read_job
from benchmarks.peers.llamafactory_sft import common, run_exp


def main() -> None:
    from llamafactory.train.dpo import trainer  # after llamafactory_sft, which stands in for torchaudio

    job = read_job()
    log = StepLog(job)
    watch = Measured(log)
    trainer.CustomDPOTrainer = measured(trainer.CustomDPOTrainer, watch, count)
    run_exp(settings(job), callbacks=[watch])
    log.end("llamafactory", "transformers", "peft", "accelerate", "trl")


def count(inputs: dict[str, Any]) -> tuple[int, int]:
    return int((inputs["attention_mask"] != 0).sum()), int((inputs["labels"][:, 1:] != -100).sum())


def settings(job: Job) -> dict[str, Any]:
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    same = common(job, "dpo", {"ranking": True, "formatting": "sharegpt", "columns": columns})
    same |= {"pref_beta": 0.1, "pref_loss": "sigmoid"}
    return same | {"disable_gradient_checkpointing": True} if job.best else same


if __name__ == "__main__":
    main()
