"""TRL's side of the comparison: runs inside .peers/trl, reads the job of preference.py, trains every variant, writes what it saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_sft import Record  # beside this file, which is run as a script

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, "pairs"),
    "cpo": (CPOTrainer, CPOConfig, "begun"),
    "orpo": (ORPOTrainer, ORPOConfig, "short"),
    "kto": (KTOTrainer, KTOConfig, "judged"),
    "reward": (RewardTrainer, RewardConfig, "pairs"),
}


def train(job: dict, variant: dict) -> list[dict[str, float]]:
    trainer_class, config_class, rows = TRAINERS[variant["trainer"]]
    folder, is_reward = Path(job["folder"]), variant["trainer"] == "reward"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if is_reward:
        tokenizer.pad_token = "<|endoftext|>"  # padding with the end token would hide the last one
        base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
        base.config.pad_token_id = tokenizer.pad_token_id
    else:
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / ("scorer" if is_reward else "adapter"), is_trainable=True)
    record = Record()
    settings = {"beta": 0.1} if not is_reward else {}
    settings |= {"max_length": 512}
    if variant["trainer"] in ("dpo", "kto", "reward"):
        settings |= {"disable_dropout": True}

    class InOrder(trainer_class):
        """The trainer, taking the rows in the order in which they stand."""

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    content = [json.loads(line) for line in (folder / f"{rows}.jsonl").read_text().splitlines()]
    trainer = InOrder(
        model=model,
        args=config_class(
            output_dir=str(folder / "theirs"),
            max_steps=job["steps"],
            per_device_train_batch_size=job["batch_size"],
            gradient_accumulation_steps=1,
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=False,
            fp16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            seed=0,
            disable_tqdm=True,
            **(settings | variant["settings"]),
        ),
        train_dataset=Dataset.from_list(content),
        processing_class=tokenizer,
        callbacks=[record],
    )
    trainer.train()
    return record.steps


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    found = {}
    for variant in job["variants"]:
        found[variant["name"]] = train(job, variant)
        print(variant["name"], found[variant["name"]][-1], file=sys.stderr, flush=True)
    Path(job["folder"], "theirs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
