from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config.sections import Adapter, Model
from burnish.core.errors import ModelError
from burnish.models import adapters
from burnish.models.inference import load_for_inference
from burnish.models.load import load_model
from burnish.models.save import save_model
from burnish.models.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 9, 100, 17, 33]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def tuned(base: Path, folder: Path, *, new_tokens: list[str] | None = None) -> torch.Tensor:
    """Saves an adapter that does something into `folder`; the tuned logits."""
    config = Model(path=str(base), new_tokens=new_tokens or [])
    tokenizer = load_tokenizer(config)
    model = load_model(config, compute_dtype=torch.float32, tokenizer=tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in config.new_tokens]
    adapted = adapters.attach(model, Adapter(rank=4), new_token_ids=ids)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(adapted, tokenizer, folder)
    return logits(adapted)


def test_run_folder(base: Path, tmp_path: Path) -> None:
    expected = tuned(base, tmp_path / "run" / "model")
    (tmp_path / "run" / "run.yaml").write_text("model: x\n")
    loaded = load_for_inference(str(tmp_path / "run"))
    assert torch.equal(logits(loaded.model), expected)
    assert (loaded.base, loaded.tuned, loaded.model.training) == (str(base), True, False)


def test_run_without_a_model_yet(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: x\n")
    with pytest.raises(ModelError, match="has no trained model yet"):
        load_for_inference(str(tmp_path))


def test_adapter_and_its_base_by_turns(base: Path, tmp_path: Path) -> None:
    expected = tuned(base, tmp_path / "adapter")
    loaded = load_for_inference(str(tmp_path / "adapter"))
    with loaded.as_base():
        assert torch.equal(logits(loaded.model), logits(load_model(Model(path=str(base)), compute_dtype=torch.float32)))
    assert torch.equal(logits(loaded.model), expected)


def test_new_tokens_come_back(base: Path, tmp_path: Path) -> None:
    expected = tuned(base, tmp_path / "adapter", new_tokens=["<call>"])
    loaded = load_for_inference(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.model), expected)
    assert len(loaded.tokenizer) == expected.shape[-1]
    assert loaded.tokenizer.tokenize("a<call>")[-1] == "<call>"


def test_adapter_without_a_tokenizer_takes_the_bases(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("*token*"):
        file.unlink()
    assert load_for_inference(str(tmp_path / "adapter")).tokenizer.eos_token == "<|im_end|>"


def test_base_that_moved(base: Path, tmp_path: Path) -> None:
    expected = tuned(base, tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"the base model of the adapter .* is gone: no model at"):
        load_for_inference(str(tmp_path / "adapter"))
    loaded = load_for_inference(str(tmp_path / "adapter"), base=str(tmp_path / "elsewhere"))
    assert torch.equal(logits(loaded.model), expected)


def test_whole_model_has_no_base_to_compare_with(base: Path) -> None:
    loaded = load_for_inference(str(base), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.tuned
    with pytest.raises(ModelError, match="a whole model without an adapter"), loaded.as_base():
        pass


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at"):
        load_for_inference(str(tmp_path / "none"))
