"""LlamaFactory's side of benchmarks/preference.py: its own DPO stage, from the entry point that `llamafactory-cli train` calls.

stock: its defaults (padded to a multiple of 8, activation checkpointing on).
best: no checkpointing. (It packs no pairs.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.peers.hugging_face import Measured, measured
from benchmarks.peers.job import Job, StepLog, read_job

# As in llamafactory_sft.py.
sys.modules["torchaudio"] = ModuleType("torchaudio")
from llamafactory.train.dpo import trainer  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

del sys.modules["torchaudio"]

import torch  # noqa: E402


def main() -> None:
    job = read_job()
    log = StepLog(job)
    watch = Measured(log)
    trainer.CustomDPOTrainer = measured(trainer.CustomDPOTrainer, watch, count)
    run_exp(settings(job), callbacks=[watch])
    log.end("llamafactory", "transformers", "peft", "accelerate", "trl")


def count(inputs: dict[str, Any]) -> tuple[int, int]:
    return int((inputs["attention_mask"] != 0).sum()), int((inputs["labels"][:, 1:] != -100).sum())


def settings(job: Job) -> dict[str, Any]:
    folder = Path(job.folder, "llamafactory")
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": str(Path(job.rows).resolve()), "ranking": True, "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    same = {
        "stage": "dpo",
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
        "do_train": True,
        "model_name_or_path": job.model,
        "finetuning_type": "lora",
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "template": "smollm2",
        "default_system": job.system,
        "dataset": "rows",
        "dataset_dir": str(folder),
        "cutoff_len": job.max_length,
        "output_dir": str(folder / "out"),
        "overwrite_cache": True,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "bf16": job.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job.seed,
        "disable_tqdm": True,
        "disable_shuffling": True,
    }
    return same | {"disable_gradient_checkpointing": True} if job.best else same


if __name__ == "__main__":
    main()
