"""TRL's side of benchmarks/preference.py: DPOTrainer with a PEFT LoRA, whose switched-off adapter is the reference.

stock: the defaults of DPOConfig (padded batches, activation checkpointing on).
best: no checkpointing, frozen weights in the compute type, Liger's kernels where there is a GPU.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from benchmarks.peers.hugging_face import Measured, measured
from benchmarks.peers.job import StepLog, read_job
from benchmarks.peers.trl_sft import common

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def main() -> None:
    job = read_job()
    log = StepLog(job)
    watch = Measured(log)
    trainer = measured(DPOTrainer, watch, count)(
        model=job.model,
        args=DPOConfig(**common(job), beta=0.1),
        train_dataset=Dataset.from_list([as_conversation(row) for row in job.read_rows()]),
        peft_config=LoraConfig(r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[watch],
    )
    trainer.train()
    log.end("trl", "transformers", "peft", "accelerate")


def count(inputs: dict[str, Any]) -> tuple[int, int]:
    return int((inputs["attention_mask"] != 0).sum()), int(inputs["completion_mask"].sum())


def as_conversation(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    def turns(*entries: dict[str, str]) -> list[dict[str, str]]:
        return [{"role": _ROLES[entry["from"]], "content": entry["value"]} for entry in entries]

    return {"prompt": turns(*row["conversations"]), "chosen": turns(row["chosen"]), "rejected": turns(row["rejected"])}


if __name__ == "__main__":
    main()
