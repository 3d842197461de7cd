"""Recomputed activations change memory and never a number."""

from __future__ import annotations

import copy

import pytest
import torch

from burnish.models import activations
from burnish.models.activations import Costs, plan
from burnish.models.offload import Mover, storages
from burnish.models.policy import Policy

from .conftest import build
from .test_patch import adapted, batch, outcome

COSTS = Costs(keep=100, mlp=40, layer=10, outside=5, layers=4)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (4050, ["keep"] * 4),
        (4049, ["mlp", "mlp", "keep", "keep"]),  # the first one only wins what it costs: one layer is whole again in the backward pass
        (2900, ["mlp", "mlp", "mlp", "keep"]),
        (2250, ["mlp"] * 4),
        (2249, ["layer", "layer", "mlp", "mlp"]),
        (1400, ["layer"] * 4),
        (1, ["layer"] * 4),
    ],
)
def test_as_little_as_fits(budget, expected):
    assert plan(COSTS, 10, budget) == expected


def test_a_recomputed_layer_is_whole_once_more():
    assert COSTS.total(["keep"] * 4) == 405
    assert COSTS.total(["layer"] * 4) == 5 + 4 * 10 + 90
    assert COSTS.total(["mlp"] * 4) == 5 + 4 * 40 + 60


def test_the_line_says_what_is_done():
    kept = activations.describe(["keep"] * 4, 2**20, 405.0 * 2**20, 2**40)
    assert kept == "activations: all kept for the backward pass, 0.4 GiB for 1048576 tokens at once"
    line = activations.describe(["layer", "mlp", "mlp", "keep"], 2**20, 285.0 * 2**20, 2**28)
    assert line == (
        "activations: computed again in the backward pass are feed-forwards of 2 layers and all of 1 layers, "
        "0.3 GiB for 1048576 tokens at once, more than the 0.2 GiB that are free"
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("ways", ["mlp", "layer", ["layer", "mlp"], ["keep", "layer"]])
@pytest.mark.parametrize("kernels", [True, False])
def test_every_way_gives_the_same_bits(family, ways, kernels):
    policy = Policy(adapted(build(family)), kernels=kernels).train()
    stored = outcome(policy)
    activations.apply(policy.anatomy.whole, ways)
    again = outcome(policy)
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    activations.apply(policy.anatomy.whole, "keep")
    assert all(torch.equal(outcome(policy)[name], value) for name, value in stored.items())


def test_dropout_is_drawn_once():
    policy = Policy(adapted(build("llama"), lora_dropout=0.5)).train()
    torch.manual_seed(3)
    stored = outcome(policy)
    for ways in ("mlp", "layer"):
        activations.apply(policy.anatomy.whole, ways)
        torch.manual_seed(3)
        again = outcome(policy)
        assert all(torch.equal(again[name], value) for name, value in stored.items())


@pytest.mark.parametrize("tile", [1, 7, 100])
def test_tiles_change_nothing_but_memory(tile):
    policy = Policy(adapted(build("llama")).double()).train()
    stored = outcome(policy)
    policy.checkpoint_activations(False, tile=tile)
    again = outcome(policy)
    for name, value in stored.items():
        torch.testing.assert_close(again[name], value, rtol=1e-9, atol=1e-12)


def test_what_is_measured_is_what_is_kept():
    policy = Policy(adapted(build("llama")))
    whole = policy.anatomy.whole
    ids = torch.arange(48) % 128
    costs = activations.measure(whole.train(), lambda: whole.model(ids[None], use_cache=False), 48)
    assert costs.layers == 2
    assert costs.layer == 64 * 4  # the layer's input in float32
    assert costs.layer < costs.mlp < costs.keep
    assert costs.keep - costs.mlp >= 2 * 128 * 4  # gate and up
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in whole.model.layers)


def test_a_small_budget_recomputes_and_a_large_one_does_not():
    policy = Policy(adapted(build("llama"))).train()
    stored = outcome(policy)
    assert policy.fit_activations(2048, 1e12).startswith("activations: all kept for the backward pass, ")
    assert "feed-forwards of 2 layers" in policy.fit_activations(2048, 2048 * 5750.0)
    line = policy.fit_activations(2048, 1.0)
    assert "all of 2 layers" in line
    assert "more than the 0.0 GiB that are free" in line
    assert all(torch.equal(outcome(policy)[name], value) for name, value in stored.items())


def test_a_model_without_layers_that_we_know_is_kept_whole():
    assert Policy(build("gpt2")).fit_activations(2048, 1.0) == "activations: all kept"


class Copies:
    """Copies that only take notes."""

    def __init__(self):
        self.log = []

    def out(self, tensor):
        self.log.append(("out", tensor.shape))
        return [tensor.clone(), False]

    def start_back(self, ticket):
        if not ticket[1]:
            ticket[1] = True
            self.log.append(("back", ticket[0].shape))

    def finish_back(self, ticket):
        return ticket[0]


def test_what_is_moved_comes_back_one_ahead_of_need():
    copies = Copies()
    weight = torch.randn(4, 4, requires_grad=True)
    mover = Mover(copies, storages(torch.nn.ParameterList([weight])), smallest=8)
    x = torch.randn(1, 4)
    plain = (x @ weight).exp()[:, :3].exp().repeat(1, 2).exp().sum()
    (expected,) = torch.autograd.grad(plain, weight)
    with torch.autograd.graph.saved_tensors_hooks(mover.pack, mover.unpack):
        moved = (x @ weight).exp()[:, :3].exp().repeat(1, 2).exp().sum()
    outs = [entry for entry in copies.log if entry[0] == "out"]
    assert len(outs) >= 3
    (found,) = torch.autograd.grad(moved, weight)
    assert torch.equal(found, expected)
    backs = [entry for entry in copies.log if entry[0] == "back"]
    assert [shape for _, shape in backs] == [shape for _, shape in reversed(outs)]


def test_small_tensors_integers_and_weights_stay():
    weight = torch.randn(8, 8)
    mover = Mover(Copies(), {weight.untyped_storage().data_ptr()}, smallest=64)
    for tensor in (torch.zeros(3), torch.zeros(100, dtype=torch.int64), weight.t()):
        assert mover.pack(tensor) is tensor
    assert mover.pack(torch.zeros(100)) == 0


def test_a_copy_of_the_model_recomputes_with_its_own_weights():
    policy = Policy(build("llama")).train()
    activations.apply(policy.anatomy.whole, "mlp")
    copied = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    assert copied(torch.arange(3, 9)[None]).logits.abs().max() > 0
    assert batch().weight > 0
