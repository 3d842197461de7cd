"""Fast layers: the residual stream goes through the norms, and everything else in a layer runs as it did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.models import activations, fused, patch
from burnish.models.families import FAMILIES, Layer
from burnish.models.policy import Policy

from .conftest import build
from .test_patch import assert_same, batch, outcome, policies


class Additions(TorchDispatchMode):
    """Counts additions of two hidden states [1, 26, 64], autograd's own included."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += all(isinstance(part, torch.Tensor) and part.numel() == 26 * 64 for part in args[:2])
        return function(*args, **(kwargs or {}))


def additions(policy):
    with Additions() as forward:
        hidden = policy.hidden(batch())
    with Additions() as backward:
        hidden.sum().backward()
    return forward.count, backward.count


def layers(policy):
    return policy.anatomy.whole.model.layers


def without_layers(policy):
    """All the other slots stay."""
    for layer in layers(policy):
        patch.unpatch(layer)
    return policy


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3"])
def test_one_addition_a_layer_stays(family):
    fast, plain = Policy(build(family)), without_layers(Policy(build(family)))
    assert additions(plain) == (4, 4)
    assert additions(fast) == (2, 0)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_on_the_branches(training):
    both = policies(build("phi3", resid_pdrop=0.4))
    found = []
    for policy in both:
        policy.train(training)
        torch.manual_seed(5)
        found.append(outcome(policy))
    assert both[0].kernels.slots["layer"].replaced == 2
    assert_same(*found, 1e-4)


def test_hooks_on_a_norm_still_run():
    fast, plain = policies(build("llama"))
    seen = []
    for policy in (fast, plain):
        norm = layers(policy)[0].post_attention_layernorm
        norm.register_forward_hook(lambda module, inputs, output: seen.append(1) or output * 2)
    assert_same(outcome(fast), outcome(plain), 1e-5)
    assert seen == [1, 1]


def test_a_norm_with_somebody_elses_forward_still_runs_it():
    model = build("llama")
    fast, plain = policies(model)
    for policy in (fast, plain):
        norm = layers(policy)[0].input_layernorm
        theirs = norm.forward
        norm.forward = lambda x, theirs=theirs: theirs(x) * 2
    assert_same(outcome(fast), outcome(plain), 1e-5)
    assert Policy(model).kernels.slots["layer"].found == 1


def test_a_layer_is_refused_with_its_norms(monkeypatch):
    right = fused.norm_forward
    monkeypatch.setattr(fused, "norm_forward", lambda norm, module, x: right(norm, module, x) * 1.001)
    fast, plain = policies(build("llama"))
    assert fast.kernels.slots["norm"].replaced == 0
    assert fast.kernels.slots["layer"].refused == {"one of its norms is refused": 2}
    assert_same(outcome(fast), outcome(plain), 1e-5)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [("granite", Layer()), ("gemma2", Layer()), ("llama", Layer(("post_attention_layernorm", "input_layernorm")))],
)
def test_a_wrong_row_is_refused(family, wrong, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], layer=wrong))
    fast, plain = policies(build(family, **({"residual_multiplier": 0.3} if family == "granite" else {})))
    slot = fast.kernels.slots["layer"]
    assert (slot.found, slot.replaced) == (2, 0)
    assert_same(outcome(fast), outcome(plain), 1e-5)


def test_another_kind_of_return_is_refused(monkeypatch):
    """As a release of transformers may change it: the caller takes what it gets apart."""
    right = fused.layer_forward
    monkeypatch.setattr(fused, "layer_forward", lambda *given, **options: (right(*given, **options), None))
    fast, _ = policies(build("llama"))
    assert "its number of outputs is off" in next(iter(fast.kernels.slots["layer"].refused))


def test_other_calls_go_to_the_models_own_code(monkeypatch):
    fast, plain = policies(build("llama"))
    layer, own = layers(fast)[0], layers(plain)[0]
    calls = []
    right = fused._layer
    monkeypatch.setattr(fused, "_layer", lambda *given: calls.append(1) or right(*given))
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    turns = fast.anatomy.whole.model.rotary_emb(x, torch.arange(5)[None])
    for options, fast_ones in [({}, 1), ({"output_attentions": True}, 1), ({"use_cache": False, "position_ids": None}, 2)]:
        torch.testing.assert_close(layer(x, position_embeddings=turns, **options), own(x, position_embeddings=turns, **options))
        assert len(calls) == fast_ones
    torch.testing.assert_close(layer(x, None, position_embeddings=turns), own(x, None, position_embeddings=turns))
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_are_fast_layers(reentrant, monkeypatch):
    """By transformers' own switch, as its trainer turns it."""
    fast, plain = (policy.train() for policy in policies(build("llama")))
    stored = outcome(fast)
    calls = []
    right = fused._layer
    monkeypatch.setattr(fused, "_layer", lambda *given: calls.append(torch.is_grad_enabled()) or right(*given))
    for policy in (fast, plain):
        policy.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = outcome(fast)
    assert len(calls) == 4
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    assert_same(again, outcome(plain), 1e-5)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(fast.model(ids, use_cache=True).logits, plain.model(ids, use_cache=True).logits)


def test_layers_recomputed_by_their_call(monkeypatch):
    """Older releases of transformers recompute in `__call__`: the forward that stands there must not do it once more."""
    policy = Policy(build("llama")).train()
    activations.apply(policy.anatomy.whole, "layer")
    monkeypatch.setattr(fused, "_LAYERS_CHECKPOINT_IN_FORWARD", False)
    monkeypatch.setattr(layers(policy)[0], "_gradient_checkpointing_func", None)
    outcome(policy)


def test_hidden_states_of_all_layers_are_the_same():
    fast, plain = policies(build("llama"))
    ids = torch.arange(3, 9)[None]
    mine, theirs = (policy.model(ids, output_hidden_states=True).hidden_states for policy in (fast, plain))
    assert len(mine) == len(theirs) == 3
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_unpatched_layer_is_the_models_own():
    policy = without_layers(Policy(build("llama")))
    assert all("forward" not in vars(layer) for layer in layers(policy))
    assert all("forward" in vars(layer.mlp) for layer in layers(policy))
