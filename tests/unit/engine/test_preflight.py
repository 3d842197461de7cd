from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from burnish.core.errors import ConfigError
from burnish.engine import preflight
from burnish.engine.backend import Backend
from burnish.engine.grid import Grid
from burnish.engine.parts import Part
from burnish.kernels import native


class Trained:
    """As much of a policy as the announcement looks at."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}


def test_a_step_must_fit_where_weights_are_updated_within_the_backward_pass() -> None:
    preflight.refuse_cut_steps(64.0, 64)
    with pytest.raises(ConfigError, match=r"a step of about 1,200 tokens must be one micro-batch, but train.micro_batch_tokens is 64"):
        preflight.refuse_cut_steps(1200.4, 64)


def test_a_stream_may_bring_anything_up_to_the_longest() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    table = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(ConfigError, match=r"data\.max_length': examples have up to 17 tokens, but the model has 16 positions only"):
        preflight.look_at_lengths(table, (), 17)
    preflight.look_at_lengths(table, (), 16)
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    preflight.look_at_lengths(LlamaForCausalLM(LlamaConfig(max_position_embeddings=16, **sizes)), (), 17)


def test_the_announcement_counts_trained_and_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(100, 10, bias=False), nn.Linear(10, 100, bias=False))
    model[0].requires_grad_(False)
    said = preflight.announcement(Trained(model), Backend(precision="float32"), 1500)  # pyright: ignore[reportArgumentType]
    assert said == "training 1k of 2k parameters (50.00%) for 1,500 steps on cpu, in float32"


def test_the_announcement_says_who_shares_tokens() -> None:
    backend = Backend(precision="float32")
    backend.world_size, backend.strategy, backend.grid = 8, "ddp", Grid(0, 8, context=4)
    said = preflight.announcement(Trained(nn.Linear(10, 10)), backend, 1)  # pyright: ignore[reportArgumentType]
    assert said.endswith("on 8 x cpu, in float32, ddp, every 4 share the tokens of a micro-batch")


def test_the_announcement_counts_whole_layers_that_are_shared() -> None:
    backend = Backend(precision="float32")
    backend.world_size, backend.strategy, backend.grid = 4, "ddp", Grid(0, 4, tensor=2)
    backend.held = SimpleNamespace(layout={"0.weight": Part((200, 10), 0, 100)})  # pyright: ignore[reportAttributeAccessIssue]
    model = nn.Sequential(nn.Linear(10, 100, bias=False), nn.Linear(100, 10, bias=False))
    model[0].requires_grad_(False)
    said = preflight.announcement(Trained(model), backend, 1)  # pyright: ignore[reportArgumentType]
    assert said.startswith("training 1k of 3k parameters (33.33%)")
    assert said.endswith("on 4 x cpu, in float32, ddp, every 2 share the weights of each layer")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantised_weights_count_as_what_they_stand_for() -> None:
    from bitsandbytes.nn import Linear4bit

    model = nn.Sequential(Linear4bit(128, 64, bias=False, quant_type="nf4"), nn.Linear(64, 64, bias=False)).to("cpu")
    model[0](torch.zeros(1, 128))
    assert model[0].weight.numel() == 128 * 64 // 2
    said = preflight.announcement(Trained(model), Backend(precision="float32"), 1)  # pyright: ignore[reportArgumentType]
    assert "training 4.1k of 12.3k parameters" in said


def test_a_run_on_a_cpu_without_c_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler found (cc, gcc or clang)")
    said = preflight.without_c(torch.device("cpu"))
    assert said == "C kernels: none, the fast modules compute in plain torch, exact but slower: no C compiler found (cc, gcc or clang)"
    assert preflight.without_c(torch.device("meta")) == ""
    monkeypatch.setattr(native, "why_not", lambda: None)
    assert preflight.without_c(torch.device("cpu")) == ""


@pytest.mark.parametrize(
    ("examples", "batch_size", "said"),
    [(9, 4, "the last step of an epoch holds one answer"), (8, 1, "every step holds one answer"), (8, 4, ""), (1, 4, ""), (9, None, "")],
)
def test_a_step_of_one_judged_answer_is_said(examples: int, batch_size: int | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    preflight.tell_lone_answer(examples, batch_size)
    assert said in capsys.readouterr().err if said else capsys.readouterr().err == ""
