from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from burnish.config.sections import Adapter, Model
from burnish.core.errors import StorageError
from burnish.models import adapters
from burnish.models import save as module
from burnish.models.load import load_model
from burnish.models.save import save_model
from burnish.models.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 9, 100, 17, 33]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def config(tiny_model: Path) -> Model:
    return Model(path=str(tiny_model))


@pytest.fixture
def model(config: Model) -> Any:
    return load_model(config, compute_dtype=torch.float32)


def test_whole_model_is_an_ordinary_folder(model: Any, config: Model, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config)
    target = save_model(model, tokenizer, tmp_path / "out" / "model")
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {file.name for file in target.iterdir()} == expected
    again = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    text = "the user asks <|im_end|>"
    assert AutoTokenizer.from_pretrained(target)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(target).chat_template == tokenizer.chat_template
    assert [file.name for file in target.parent.iterdir()] == ["model"]


def test_adapter_is_a_peft_folder(model: Any, config: Model, tmp_path: Path) -> None:
    adapted = adapters.attach(model, Adapter(rank=4))
    target = save_model(SimpleNamespace(model=adapted), load_tokenizer(config), tmp_path / "model")
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in target.iterdir()} == expected
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.path), str(target))
    assert torch.equal(logits(again), logits(adapted))


def test_merged_adapter_is_a_whole_model(model: Any, config: Model, tmp_path: Path) -> None:
    adapted = adapters.attach(model, Adapter(rank=4, save_modules=["lm_head"]), new_token_ids=())
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.01 if parameter.requires_grad else 0)
    merged = adapters.merge(adapted)
    save_model(merged, load_tokenizer(config), tmp_path / "model")
    assert torch.equal(logits(load_model(Model(path=str(tmp_path / "model")), compute_dtype=torch.float32)), logits(merged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_type_on_disk(model: Any, config: Model, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(model, load_tokenizer(config), tmp_path / "model", dtype=dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_generation_settings_that_contradict_themselves_are_saved(model: Any, config: Model, tmp_path: Path) -> None:
    model.generation_config.temperature = 0.6
    save_model(model, load_tokenizer(config), tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.6, True)


def test_tokenizer_loads_in_every_version_of_transformers(model: Any, config: Model, tmp_path: Path) -> None:
    save_model(model, load_tokenizer(config), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_older_folder_is_replaced_whole(model: Any, config: Model, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    save_model(model, load_tokenizer(config), tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("bug")])
def test_failure_leaves_the_older_folder_and_no_litter(
    model: Any, config: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(tokenizer: Any, folder: Path) -> None:
        raise error

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("kept")
    monkeypatch.setattr(module, "_save_tokenizer", fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else RuntimeError):
        save_model(model, load_tokenizer(config), tmp_path / "model")
    assert (tmp_path / "model" / "old").read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_place_that_cannot_be_written(model: Any, config: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the model cannot be written"):
        save_model(model, load_tokenizer(config), tmp_path / "file" / "model")
