"""The nearest key to an unknown one: by spelling, by section, or because another tool calls it so."""

from __future__ import annotations

from burnish.config.base import Strict
from burnish.config.shape import fields_of, keys_below
from burnish.core.errors import nearest

ELSEWHERE: dict[str, str] = {
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "flash_attn": "model.attention",
    "load_in_4bit": "model.quantize: nf4",
    "load_in_8bit": "model.quantize: int8",
    "quantization_bit": "model.quantize",
    "template": "model.chat_template",
    "finetuning_type": "adapter",
    "peft": "adapter",
    "lora": "adapter",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "lora_target_linear": "adapter.targets: all",
    "target_modules": "adapter.targets",
    "modules_to_save": "adapter.save_modules",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "val_size": "data.eval",
    "val_set_size": "data.eval",
    "eval_dataset": "data.eval",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "train_on_inputs": "data.train_on_prompt",
    "dataset_num_proc": "data.workers",
    "preprocessing_num_workers": "data.workers",
    "stage": "objective",
    "loss": "objective",
    "neftune_noise_alpha": "objective.neftune_alpha",
    "label_smoothing_factor": "objective.label_smoothing",
    "lr": "train.learning_rate",
    "max_lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_tokens": "train.tokens",
    "global_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size (over all devices and accumulation steps)",
    "micro_batch_size": "train.batch_size (over all devices and accumulation steps)",
    "gradient_accumulation_steps": "train.batch_size (over all devices and accumulation steps)",
    "optim": "train.optimizer",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "scheduler": "train.schedule",
    "warmup_ratio": "train.schedule.warmup",
    "warmup_steps": "train.schedule.warmup",
    "min_lr_ratio": "train.schedule.floor",
    "adam_beta1": "train.optimizer.betas",
    "adam_beta2": "train.optimizer.betas",
    "adam_epsilon": "train.optimizer.eps",
    "max_grad_norm": "train.clip",
    "gradient_clipping": "train.clip",
    "loraplus_lr_ratio": "train.lora_plus_ratio",
    "bf16": "train.precision: bfloat16",
    "fp16": "train.precision: float16",
    "gradient_checkpointing": "train.checkpoint_activations",
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation.every",
    "early_stopping_patience": "evaluation.patience",
    "save_steps": "save.every",
    "save_strategy": "save.every",
    "save_total_limit": "save.keep",
    "report_to": "track",
    "logger": "track",
    "output_dir": "output",
    "out_dir": "output",
    "overwrite_output_dir": "resume: never",
    "resume_from_checkpoint": "resume",
    "parallelism": "parallel",
}
"""What other tools call a thing -> where it stands here."""


def nearest_key(name: str, section: type[Strict] | None, root: type[Strict]) -> str | None:
    """The key that an unknown one was probably meant to be: one of its own section, or a dotted key from the root, or None.

    Args:
        name: The key as written.
        section: The section in which it stands, or None where no keys are possible.
        root: The root of the run file.
    """
    last = {key.rpartition(".")[2]: key for key in reversed(list(keys_below(root)))}
    known = last.get(name) or ELSEWHERE.get(name) or (nearest(name, section.model_fields) if section else None)
    if known is None and (match := nearest(name, last)):
        known = last[match]
    return known


def unknown_key(name: str, section: type[Strict] | None, root: type[Strict], inside: str = "", *, dotted: bool = False) -> str:
    """The message about a key that does not exist.

    Args:
        name: The key as written.
        section: The section in which it stands, or None where no keys are possible.
        root: The root of the run file.
        inside: The dotted key of that section.
        dotted: Name a key of the same section by its dotted key, as an override needs it.
    """
    suggestion = nearest_key(name, section, root)
    if inside and suggestion == f"{inside}.{name}":  # of another kind of this section
        kinds = (
            [kind for kind, other in fields_of(root)[inside].sections if name in other.model_fields] if inside in fields_of(root) else []
        )
        return f"unknown key '{name}'; it belongs to {' and '.join(kinds) or 'another kind'}, known here: {', '.join(known_keys(section))}"
    if suggestion == name and not dotted:  # an override's form, in the file
        above, _, key = name.rpartition(".")
        return f"unknown key '{name}'; in a file sections are nested: '{above}: {{{key}: ...}}'"
    if suggestion:
        if dotted and inside and section and suggestion in section.model_fields:
            suggestion = f"{inside}.{suggestion}"
        return f"unknown key '{name}'; did you mean '{suggestion}'?"
    if section is None:
        return f"unknown key '{name}'; {inside or 'this'} has no keys of its own"
    return f"unknown key '{name}'; known here: {', '.join(section.model_fields)}"


def known_keys(section: type[Strict] | None) -> list[str]:
    """The keys of a section; none where it has none."""
    return list(section.model_fields) if section else []
