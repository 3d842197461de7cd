"""Saves what was trained as a folder that any tool of the field reads: an adapter as PEFT, a whole model as transformers has it.

The folder appears complete or not at all: it is written beside its place and renamed.
"""

# transformers, PEFT and NumPy are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from burnish.core.errors import StorageError, Where
from burnish.core.storage import error_number, flush
from burnish.models import adapters
from burnish.models.quiet import quiet
from burnish.models.score import as_classifier, judged_by, padding_of


def save_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path | str, *, dtype: torch.dtype | None = None) -> Path:
    """Writes the adapter, or the whole model, with its tokenizer and chat template. An older folder of that name is replaced.

    Args:
        model: The model, with or without an adapter, or a Policy around it.
        tokenizer: What it was trained with.
        folder: Where to.
        dtype: Type of a whole model's weights on disk. Left out, they are written exactly as they are.

    Returns:
        The folder.

    Raises:
        StorageError: when the folder cannot be written.
    """
    inner: Any = model if isinstance(model, PreTrainedModel) or adapters.is_adapted(model) else model.model
    target = Path(folder)
    with quiet(), _replacing(target) as fresh:
        judges = judged_by(inner)
        if adapters.is_adapted(inner):
            adapters.save(inner, fresh)
        elif judges is None:
            _save_whole(inner, fresh, dtype)
        else:
            _save_whole(as_classifier(inner, judges, tokenizer), fresh, dtype)
        _save_tokenizer(tokenizer, fresh)
        if judges is not None and (padding := padding_of(tokenizer)) is not None:
            _edit(fresh / "tokenizer_config.json", pad_token=str(tokenizer.convert_ids_to_tokens(padding)))  # what the config says, too
    return target


def _save_whole(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    if model.can_generate():
        _make_consistent(model.generation_config)
    state = model.state_dict() if dtype is None else {name: _cast(value, dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    if dtype is not None:
        _edit(folder / "config.json", dtype=str(dtype).removeprefix("torch."))


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _make_consistent(generation: GenerationConfig) -> None:
    """Many published models set a temperature without asking for sampling, which transformers refuses to write."""
    sampling = (generation.temperature, generation.top_p, generation.top_k, generation.min_p, generation.typical_p)
    if not generation.do_sample and any(value is not None for value in sampling):
        generation.do_sample = True


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") == "TokenizersBackend":
        _edit(file, tokenizer_class="PreTrainedTokenizerFast")  # the name that transformers before 5 knows too


def _edit(file: Path, **changes: str) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _replacing(folder: Path) -> Generator[Path]:
    """A fresh folder that takes the place of `folder` when all went well and is on the disk, and vanishes otherwise."""
    fresh, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    try:
        if old.exists() and not folder.exists():  # a process was killed between the two renames
            old.rename(folder)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            flush(path)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        flush(folder.parent)
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and error_number(error) is None:
            raise
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise StorageError(
            f"the model cannot be written: {error}",
            where=Where(file=str(folder)),
            hint="free some space and run the command again; an older model of that name is as it was",
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
