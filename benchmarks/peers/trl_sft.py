"""TRL's side of benchmarks/sft.py: SFTTrainer with a PEFT LoRA, on conversational prompt-completion rows.

stock: the defaults of SFTConfig (padded batches, activation checkpointing on).
best: best-fit packing and so no padding, no checkpointing, frozen weights in the compute type, Liger's kernels where there is a GPU.
"""

from __future__ import annotations

import importlib.util

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.hugging_face import Measured, count_inputs, measured
from benchmarks.peers.job import Job, StepLog, read_job


def main() -> None:
    job = read_job()
    log = StepLog(job)
    watch = Measured(log)
    trainer = measured(SFTTrainer, watch, count_inputs)(
        model=job.model,
        args=SFTConfig(**settings(job)),
        train_dataset=Dataset.from_list([as_conversation(row) for row in job.read_rows()]),
        peft_config=LoraConfig(r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[watch],
    )
    trainer.train()
    log.end("trl", "transformers", "peft", "accelerate")


def settings(job: Job) -> dict[str, object]:
    return common(job) | {"completion_only_loss": True} | ({"packing": True} if job.best else {})


def common(job: Job) -> dict[str, object]:
    """What every trainer of this comparison is run with, in both forms."""
    gpu = torch.cuda.is_available()
    same = {
        "output_dir": f"{job.folder}/trl",
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_length": job.max_length,
        "bf16": job.bf16,
        "use_cpu": not gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job.seed,
        "disable_tqdm": True,
    }
    if not job.best:
        return same
    return same | {
        "gradient_checkpointing": False,
        "use_liger_kernel": gpu and importlib.util.find_spec("liger_kernel") is not None,
        "model_init_kwargs": {"dtype": job.precision},
    }


def as_conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["instruction"]}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


if __name__ == "__main__":
    main()
