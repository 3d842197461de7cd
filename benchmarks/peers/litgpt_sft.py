"""LitGPT's side of benchmarks/sft.py: `litgpt finetune_lora`, through the function behind it.

stock: mixed precision in bf16. best: `bf16-true`, which keeps the adapter in bf16 too. It neither packs nor checkpoints on one device.
What its command line has no setting for is replaced here: rows in order, a constant learning rate, no model saved at the end. Its
gradients are not clipped.

With `--prepare` in place of a job it converts a Hugging Face folder, once, before anything is measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON, get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.prompts import ChatML

from benchmarks.peers.job import Job, StepLog, read_job


class InOrder(JSON):
    """Rows in the order in which they stand."""

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        collate = get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=self.ignore_index)
        return torch.utils.data.DataLoader(self.train_dataset, self.batch_size, num_workers=self.num_workers, collate_fn=collate)


def main() -> None:
    if sys.argv[1] == "--prepare":
        prepare(*sys.argv[2:])
        return
    job = read_job()
    log = StepLog(job)
    measure(log)
    stored = "bf16-true" if job.best else "bf16-mixed"
    lora.setup(
        checkpoint_dir=Path(job.litgpt),
        out_dir=Path(job.folder, "litgpt"),
        precision=stored if job.bf16 else "32-true",
        lora_r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        data=InOrder(write_rows(job), mask_prompt=True, prompt_style=ChatML(job.system)),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job.batch_size,
            micro_batch_size=job.batch_size,
            lr_warmup_steps=0,
            epochs=1_000_000,
            max_steps=job.steps,
            max_seq_length=job.max_length,
        ),
        eval=EvalArgs(interval=1_000_000, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": job.learning_rate, "weight_decay": 0.0, "betas": [0.9, 0.999]}},
        seed=job.seed,
    )
    log.end("litgpt", "lightning")


def measure(log: StepLog) -> None:
    """Puts the clock and the counters where LitGPT's loop can be seen from outside."""
    batches: list[dict[str, Any]] = []
    losses: list[torch.Tensor] = []
    cross_entropy, iterator = lora.chunked_cross_entropy, lora.CycleIterator

    class Batches(iterator):
        def __next__(self) -> dict[str, Any]:
            log.begin()
            batch = super().__next__()
            batches.append(batch)
            return batch

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        losses.append(cross_entropy(*args, **kwargs))
        return losses[-1]

    class Constant(torch.optim.lr_scheduler.LambdaLR):
        """The scheduler steps right after the optimiser: the step's end."""

        def step(self, *args: Any) -> None:
            super().step(*args)
            if not batches:  # construction steps once
                return
            tokens = int(batches[-1]["token_counts"]["raw_plus_prompt_template"].sum())
            trained = int((batches[-1]["labels"][:, 1:] != -100).sum())
            log.step(tokens, trained, float(losses[-1].detach()))
            batches.clear()
            losses.clear()

    lora.CycleIterator = Batches
    lora.chunked_cross_entropy = recorded
    lora.get_lr_scheduler = lambda optimizer, **kwargs: Constant(optimizer, lambda step: 1.0)
    for ending in ("save_lora_checkpoint", "merge_lora", "copy_config_files", "save_hyperparameters", "save_prompt_style"):
        setattr(lora, ending, lambda *args, **kwargs: None)


def write_rows(job: Job) -> Path:
    """A folder with train.json and the val.json that LitGPT insists on."""
    folder = Path(job.folder, "litgpt-rows")
    folder.mkdir(parents=True, exist_ok=True)
    rows = job.read_rows()
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps(rows[: job.batch_size]))
    return folder


def prepare(source: str, target: str) -> None:
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    shutil.copytree(source, target)
    convert_hf_checkpoint(Path(target), model_name="SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
