"""TRL's side of the comparison: runs inside .peers/trl, reads the job that sft.py wrote, trains, writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Record(TrainerCallback):
    """Keeps the loss and gradient norm that the trainer logs at every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.steps.append({"step": state.global_step, "loss": logs["loss"], "grad_norm": logs["grad_norm"]})


class InOrder(SFTTrainer):
    """SFTTrainer that takes the rows in the order in which they stand."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    record = Record()
    trainer = InOrder(
        model=model,
        args=SFTConfig(
            output_dir=job["output"] + ".trl",
            max_steps=job["steps"],
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=job["batch_size"] // job["micro_batch"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            optim="adamw_torch",
            max_length=job["max_length"],
            completion_only_loss=True,
            bf16=False,
            fp16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            seed=job["seed"],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[record],
    )
    trainer.train()
    examples = [{"ids": list(example["input_ids"]), "labels": _labels(example)} for example in trainer.train_dataset]
    Path(job["output"]).write_text(json.dumps({"steps": record.steps, "examples": examples}))


def _labels(example) -> list[int]:
    if "labels" in example:
        return list(example["labels"])
    return [token if trained else -100 for token, trained in zip(example["input_ids"], example["completion_mask"], strict=True)]


if __name__ == "__main__":
    main(sys.argv[1])
