"""LlamaFactory's side of benchmarks/sft.py: its own SFT stage, from the entry point that `llamafactory-cli train` calls.

stock: its defaults (padded to a multiple of 8, activation checkpointing on).
best: neat packing, no checkpointing.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.peers.hugging_face import Measured, measured
from benchmarks.peers.job import Job, StepLog, read_job

# Its data module imports torchaudio, of which there is no build without CUDA, and calls it for audio rows only.
sys.modules["torchaudio"] = ModuleType("torchaudio")
from llamafactory.train.sft import workflow  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

del sys.modules["torchaudio"]

_counts: deque[tuple[int, int]] = deque()  # of the batches that are collated but not yet trained on: the loader runs one ahead


class Counting(workflow.SFTDataCollatorWith4DAttentionMask):
    """Counts before the mask is made four-dimensional. Zero in a feature's mask is padding, other numbers are packed rows."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = sum(sum(place != 0 for place in feature["attention_mask"]) for feature in features)
        trained = sum(sum(label != -100 for label in feature["labels"][1:]) for feature in features)
        _counts.append((tokens, trained))
        return super().__call__(features)


def main() -> None:
    job = read_job()
    log = StepLog(job)
    watch = Measured(log)
    workflow.SFTDataCollatorWith4DAttentionMask = Counting
    workflow.CustomSeq2SeqTrainer = measured(workflow.CustomSeq2SeqTrainer, watch, lambda inputs: _counts.popleft())
    run_exp(settings(job), callbacks=[watch])
    log.end("llamafactory", "transformers", "peft", "accelerate")


def settings(job: Job) -> dict[str, Any]:
    same = common(job, "sft", {})
    if not job.best:
        return same
    return same | {"neat_packing": True, "packing": True, "disable_gradient_checkpointing": True}


def common(job: Job, stage: str, columns: dict[str, Any]) -> dict[str, Any]:
    """What every stage of this comparison is run with; `columns` says how its rows are written."""
    folder = Path(job.folder, "llamafactory")
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"file_name": str(Path(job.rows).resolve())} | columns
    (folder / "dataset_info.json").write_text(json.dumps({"rows": rows}))
    return {
        "stage": stage,
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


if __name__ == "__main__":
    main()
