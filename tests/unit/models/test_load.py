"""Loading whole models: complete or not at all, safely, in the right types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.config.sections import Model
from burnish.core.errors import ConfigError, DependencyError, ModelError
from burnish.models import load as module
from burnish.models.load import describe, fit_vocabulary, load_model
from burnish.models.tokenizer import load_tokenizer

from .conftest import FAMILIES, build

IDS = torch.tensor([[5, 9, 100, 17, 33]])


def load(path: Path, **options: Any) -> Any:
    return load_model(Model(path=str(path), **options), compute_dtype=torch.float32)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_to_the_same_logits(family: str, tmp_path: Path) -> None:
    original = build(family)
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, original(input_ids=IDS).logits, atol=1e-6, rtol=1e-5)
    assert not loaded.training
    assert loaded.name_or_path == str(tmp_path)


@pytest.mark.parametrize(
    ("compute", "stored", "trainable", "expected"),
    [
        ("float32", "auto", False, "float32"),
        ("bfloat16", "auto", False, "bfloat16"),
        ("bfloat16", "float32", False, "float32"),
        ("float32", "bfloat16", False, "bfloat16"),
        ("bfloat16", "auto", True, "float32"),
        ("bfloat16", "bfloat16", True, "float32"),
    ],
)
def test_frozen_weights_in_the_compute_type_trained_ones_in_float32(
    tiny_model: Path, compute: str, stored: Any, trainable: bool, expected: str
) -> None:
    config = Model(path=str(tiny_model), dtype=stored)
    loaded = load_model(config, compute_dtype=getattr(torch, compute), trainable=trainable)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, expected)}


def test_the_padding_tokens_embedding_can_be_trained(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    assert loaded.config.pad_token_id == loaded.config.eos_token_id == 2
    loaded(input_ids=torch.tensor([[5, 2, 7]])).logits[0, 2].sum().backward()
    assert loaded.model.embed_tokens.weight.grad[2].abs().sum() > 0


def test_attention_by_name_and_by_default(tmp_path: Path, tiny_model: Path) -> None:
    build("gemma2").save_pretrained(tmp_path)
    assert load(tmp_path).config._attn_implementation == "eager"
    assert load(tiny_model).config._attn_implementation == "sdpa"
    eager = load_model(Model(path=str(tiny_model)), compute_dtype=torch.float32, attention="eager")
    assert eager.config._attn_implementation == "eager"


def test_attention_named_in_the_model_folder_is_not_followed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    names = {"_attn_implementation_internal": "kernels-community/evil", "attn_implementation": "kernels-community/evil"}
    (folder / "config.json").write_text(json.dumps(config | names))
    assert load(folder).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lost", r"it lacks model\.layers\.1\.mlp\.up_proj\.weight$"),
        ("extra", r"it has no place for model\.layers\.1\.mlp\.more\.weight$"),
        ("shape", r"model\.layers\.1\.mlp\.up_proj\.weight|size|shape"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(folder: Path, change: str, message: str) -> None:
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    state = load_file(file)
    if change == "lost":
        del state[name]
    elif change == "extra":
        state["model.layers.1.mlp.more.weight"] = torch.zeros(2)
    else:
        state[name] = torch.zeros(3, 3)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_many_missing_weights_are_counted(folder: Path) -> None:
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if "layers.0" not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0.* and 4 more$"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights, expected \*\.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/it-ran'\ntR.")
    with pytest.raises(ModelError, match=r"'pytorch_model\.bin', a pickle file that can run code"):
        load(folder)


def test_torn_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"model\.safetensors: the weights are torn"):
        load(folder)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such"}', '{"model_type": "t5"}', "[]"])
def test_configurations_that_are_no_causal_model(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot load the model"):
        load(folder)


def test_code_that_came_with_the_model_does_not_run(folder: Path) -> None:
    evidence = folder / "it-ran"
    (folder / "evil.py").write_text(f"open({str(evidence)!r}, 'w')\n")
    automatic = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "evil", "auto_map": automatic}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "model.trust_remote_code: true" in (caught.value.hint or "")
    assert not evidence.exists()


def test_hub_model_that_is_not_here() -> None:
    with pytest.raises(ModelError, match="no folder 'org/none-such' here"):
        load(Path("org/none-such"))


class TestVocabulary:
    @pytest.mark.parametrize("family", ["llama", "llama-tied"])
    def test_new_tokens_start_as_the_mean(self, family: str, tiny_model: Path) -> None:
        tokenizer = load_tokenizer(Model(path=str(tiny_model), new_tokens=["<a>", "<b>"]))
        rows = len(tokenizer) - 2
        model = build(family, vocab_size=rows)
        before = [model.get_input_embeddings().weight.clone(), model.lm_head.weight.clone()]
        fit_vocabulary(model, tokenizer, ["<a>", "<b>"])
        for table, old in zip((model.get_input_embeddings().weight, model.lm_head.weight), before, strict=True):
            assert table.shape[0] == rows + 2
            assert torch.equal(table[:rows], old)
            torch.testing.assert_close(table[rows:], old.mean(dim=0).expand(2, -1))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "llama-tied")
        assert model.config.vocab_size == rows + 2

    def test_spare_rows_are_used_before_the_model_grows(self, tiny_model: Path) -> None:
        tokenizer = load_tokenizer(Model(path=str(tiny_model), new_tokens=["<a>"]))
        model = build("llama", vocab_size=len(tokenizer) + 10)
        fit_vocabulary(model, tokenizer, ["<a>"])
        table = model.get_input_embeddings().weight
        assert table.shape[0] == len(tokenizer) + 10
        torch.testing.assert_close(table[len(tokenizer) - 1], table[: len(tokenizer) - 1].mean(dim=0))

    def test_tokenizer_of_another_model_is_an_error(self, tiny_model: Path) -> None:
        tokenizer = load_tokenizer(Model(path=str(tiny_model)))
        with pytest.raises(ModelError, match=r"the tokenizer has \d+ tokens, the model has embeddings for 100 only"):
            fit_vocabulary(build("llama", vocab_size=100), tokenizer)

    def test_without_new_tokens_nothing_changes(self, tiny_model: Path) -> None:
        config = Model(path=str(tiny_model))
        plain = load_model(config, compute_dtype=torch.float32)
        fitted = load_model(config, compute_dtype=torch.float32, tokenizer=load_tokenizer(config))
        assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in plain.state_dict().items())


class TestQuantised:
    @pytest.mark.parametrize(("quantize", "stored"), [("nf4", torch.uint8), ("int8", torch.int8)])
    def test_linear_layers_are_quantised_and_nothing_else(self, quantize: Any, stored: torch.dtype, tiny_model: Path) -> None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        loaded = load(tiny_model, quantize=quantize)
        dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        assert all((dtype == stored) == ("_proj" in name) for name, dtype in dtypes.items())

    @pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
    def test_nf4_is_near_the_original(self, tmp_path: Path, compute: torch.dtype) -> None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        original = build("llama")
        original.save_pretrained(tmp_path)
        loaded = load_model(Model(path=str(tmp_path), quantize="nf4"), compute_dtype=compute)
        with torch.no_grad():
            expected, found = original(input_ids=IDS).logits.flatten(), loaded(input_ids=IDS).logits.float().flatten()
        assert torch.nn.functional.cosine_similarity(expected, found, dim=0) > 0.97

    def test_needs_an_adapter(self, tiny_model: Path) -> None:
        with pytest.raises(ConfigError, match="nf4 needs an adapter"):
            load_model(Model(path=str(tiny_model), quantize="nf4"), compute_dtype=torch.float32, trainable=True)

    def test_needs_the_package(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DependencyError, match="needs the package 'bitsandbytes'") as caught:
            load(tiny_model, quantize="int8")
        assert caught.value.hint == "pip install 'burnish[quant]'"


def test_heads_that_devices_cannot_share_are_refused_by_the_configuration_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from burnish.build import settle_strategy
    from burnish.config.load import parse_run
    from burnish.engine.backend import Backend
    from burnish.engine.grid import Grid

    assert describe(Model(path=str(tiny_model))).config.num_attention_heads == 4
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    run = parse_run({"model": str(tiny_model), "data": {"train": "rows.jsonl"}, "parallel": {"context": 3}}, base=tmp_path).config
    backend = Backend(precision="float32", cpu=True)
    backend.world_size, backend.grid = 6, Grid(0, 6, context=3)
    monkeypatch.setattr(backend, "gather", lambda value: [value] * 6)
    with pytest.raises(ConfigError, match="4 attention heads, which 3 devices cannot share") as caught:
        settle_strategy(run, backend)
    assert caught.value.hint == "take 2"  # which divides 6 processes, as 4 does not
    backend.grid = Grid(0, 6, context=2)
    settle_strategy(run, backend)
