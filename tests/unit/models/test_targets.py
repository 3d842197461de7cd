from __future__ import annotations

import pytest

from burnish.core.errors import AdapterError
from burnish.models.targets import find_targets, find_whole_modules

from .conftest import build

LLAMA_ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", LLAMA_ALL),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", ["down_proj", "gate_proj", "up_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        (["self_attn.q_proj"], ["q_proj"]),
        (r".*\.[qk]_proj", ["k_proj", "q_proj"]),
        (["lm_head"], ["lm_head"]),
        (["embed_tokens"], ["embed_tokens"]),
        (r"model\.layers\.1\..*down_proj", ["model.layers.1.mlp.down_proj"]),
        (["layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_names_groups_and_patterns(targets: str | list[str], expected: list[str]) -> None:
    assert find_targets(build("llama"), targets).modules == expected


def test_gates_with_one_output_are_meant_by_name_only(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("qwen2-moe")
    for group in ("all", "mlp"):
        found = find_targets(model, group)
        assert not any("shared_expert_gate" in name for name in found.modules)
        assert found.smallest > 1
        assert "layers with a single output get none (shared_expert_gate)" in capsys.readouterr().err
    assert find_targets(model, ["shared_expert_gate"]).smallest == 1


@pytest.mark.parametrize("family", ["phi3", "gpt2", "olmo2", "gemma3"])
def test_all_is_attention_and_mlp_and_never_the_head(family: str) -> None:
    model = build(family)
    groups = [set(find_targets(model, group).modules) for group in ("all", "attention", "mlp")]
    if family == "gpt2":  # c_proj stands in both groups, so those keep full names
        assert groups[0] == {"c_attn", "c_proj", "c_fc"}
        assert find_targets(model, "all").transposed
    else:
        assert groups[0] == groups[1] | groups[2]
    assert "lm_head" not in groups[0]


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_are_part_of_all_and_mlp(family: str) -> None:
    model = build(family)
    assert find_targets(model, "all").parameters == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert find_targets(model, "mlp").modules == []
    assert find_targets(model, "attention").parameters == []


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"no linear layer 'q_prj', did you mean 'q_proj'\?"),
        (["q_proj", "W_pack"], "no linear layer 'W_pack', known: "),
        ("atention", "no linear layer 'atention', known: "),
        (r".*\.[xy]_proj", r"matches no linear layer, known: .*down_proj"),
        ("(", "is not a regular expression"),
        ([], "matches no linear layer"),
    ],
)
def test_what_matches_nothing_is_an_error(targets: str | list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        find_targets(build("llama"), targets)


def test_smallest_side_limits_the_rank() -> None:
    found = find_targets(build("llama"), "all")
    assert (found.smallest, found.smallest_name) == (32, "model.layers.0.self_attn.k_proj")


def test_whole_modules_must_exist() -> None:
    model = build("llama")
    assert find_whole_modules(model, ["lm_head", "model.norm"]) == ["lm_head", "model.norm"]
    with pytest.raises(AdapterError, match=r"adapter\.save_modules: no module 'lm_hed', did you mean 'lm_head'\?"):
        find_whole_modules(model, ["lm_hed"])
