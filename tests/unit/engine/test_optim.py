"""Optimisers against their formulas, and the parameter groups."""

import copy
import re
import sys

import pytest
import torch
from torch import nn

from burnish.config.sections import Train
from burnish.core.errors import ConfigError, DependencyError
from burnish.engine.optim import Combined, FlatAdamW, Lion, averaged_weights, build_optimizer, parameter_groups, set_learning_rate

ON_CPU = ("adamw", "adamw_8bit", "adafactor", "lion", "muon", "sgd", "adamw_schedule_free")


def named(seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    shapes = {
        "embed_tokens.weight": (32, 16),
        "layers.0.q_proj.lora_A.default.weight": (4, 16),
        "layers.0.q_proj.lora_B.default.weight": (16, 4),
        "layers.0.up_proj.weight": (96, 64),  # large enough for 8-bit state
        "layers.0.norm.weight": (16,),
    }
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(**settings: object) -> Train:
    return Train.model_validate({"learning_rate": 0.01, **settings})


@pytest.mark.parametrize("kind", ON_CPU)
def test_every_optimizer_moves_every_parameter_and_restores_bit_for_bit(kind: str):
    parameters = named()
    before = copy.deepcopy(parameters)
    optimizer = build_optimizer(parameters, train(optimizer=kind, weight_decay=0.1))
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    assert all(not torch.equal(parameters[name], before[name]) for name in parameters)

    twins = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    twin = build_optimizer(twins, train(optimizer=kind, weight_decay=0.1))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        set_learning_rate(optimizer, 1 / step)
        set_learning_rate(twin, 1 / step)
        give_gradients(parameters, step)
        give_gradients(twins, step)
        optimizer.step()
        twin.step()
    assert all(torch.equal(parameters[name], twins[name]) for name in parameters)


def test_lion_equals_its_formula():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 3))
    truth, momentum = parameter.detach().clone(), torch.zeros(5, 3)
    optimizer = Lion([parameter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(5):
        gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.clone()
        optimizer.step()
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        truth = (1 - 0.01 * 0.1) * truth - 0.01 * update
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(parameter.detach(), truth)


def test_adamw_equals_its_formula():
    torch.manual_seed(0)
    parameters = {"w": nn.Parameter(torch.randn(4, 4))}
    truth, first, second = parameters["w"].detach().clone(), torch.zeros(4, 4), torch.zeros(4, 4)
    optimizer = build_optimizer(parameters, train(weight_decay=0.1, optimizer={"kind": "adamw", "betas": (0.8, 0.95)}))
    for step in range(1, 5):
        give_gradients(parameters, step)
        gradient = parameters["w"].grad.clone()
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        truth = truth * (1 - 0.01 * 0.1)
        truth = truth - 0.01 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameters["w"].detach(), truth)


def test_weight_decay_is_for_matrices():
    groups = parameter_groups(named(), train(weight_decay=0.1))
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay == {name: (0.0 if "norm" in name else 0.1) for name in named()}


def test_lora_plus_gives_b_its_own_rate():
    groups = parameter_groups(named(), train(lora_plus_ratio=16))
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["layers.0.q_proj.lora_B.default.weight"] == pytest.approx(0.16)
    assert {rate for name, rate in rates.items() if "lora_B" not in name} == {0.01}


def test_the_first_matching_pattern_decides():
    groups = parameter_groups(
        named(),
        train(rates=[{"match": r"q_proj\.lora_A", "learning_rate": 0.5}, {"match": "q_proj", "weight_decay": 0.3}]),
    )
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found["layers.0.q_proj.lora_A.default.weight"] == (0.5, 0.0)
    assert found["layers.0.q_proj.lora_B.default.weight"] == (0.01, 0.3)
    assert found["layers.0.up_proj.weight"] == (0.01, 0.0)


def test_schedule_moves_all_groups_together():
    optimizer = build_optimizer(named(), train(rates=[{"match": "norm", "learning_rate": 0.1}]))
    set_learning_rate(optimizer, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.005, 0.05])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": [{"match": "q_porj"}]}, r"train.rates\[0\].match.*'q_porj' decides about no trained parameter"),
        ({"rates": [{"match": "q_proj"}, {"match": "lora_A"}]}, r"train.rates\[1\].match"),
        ({"optimizer": {"kind": "lion", "momentum": 0.5}}, "'momentum' has no effect on lion; it belongs to muon, sgd"),
        ({"optimizer": {"kind": "sgd", "betas": (0.9, 0.9)}}, "'betas' has no effect on sgd"),
        ({"optimizer": "paged_adamw"}, "this run has no GPU; found device: cpu"),
        ({"optimizer": "paged_adamw_8bit"}, "this run has no GPU"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError) as caught:
        build_optimizer(named(), train(**settings))
    assert re.search(message, str(caught.value)), caught.value


def test_lora_plus_without_lora_is_refused():
    with pytest.raises(ConfigError, match="this run trains none"):
        build_optimizer({"w": nn.Parameter(torch.ones(2, 2))}, train(lora_plus_ratio=4))


@pytest.mark.parametrize(("kind", "package"), [("adamw_schedule_free", "schedulefree")])
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=f"needs the package {package}"):
        build_optimizer(named(), train(optimizer=kind))


def test_8bit_state_needs_no_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    parameters, twins = named(), named()
    adapter = build_optimizer(parameters, train(optimizer="adamw_8bit"))
    whole = build_optimizer({"layers.0.up_proj.weight": twins["layers.0.up_proj.weight"]}, train(optimizer="adamw_8bit"))
    assert isinstance(adapter, FlatAdamW) and adapter.flat_gradients
    assert isinstance(whole, FlatAdamW) and not whole.flat_gradients  # a whole model's gradients do not stay in memory
    for optimizer, which in ((adapter, parameters), (whole, twins)):
        give_gradients(which, 0)
        optimizer.step()
    assert adapter.state[parameters["layers.0.up_proj.weight"]]["exp_avg_codes"].dtype == torch.int8
    torch.testing.assert_close(parameters["layers.0.up_proj.weight"], twins["layers.0.up_proj.weight"])


def test_a_state_of_the_other_8bit_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch):
    parameters = named()
    theirs = build_optimizer(parameters, train(optimizer="adamw_8bit"))
    give_gradients(parameters, 0)
    theirs.step()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="of a parameter of shape"):
        build_optimizer(named(), train(optimizer="adamw_8bit")).load_state_dict(theirs.state_dict())


def test_muon_takes_the_hidden_matrices_only():
    optimizer = build_optimizer(named(), train(optimizer="muon"))
    assert isinstance(optimizer, Combined)
    by_muon = {name for group in optimizer.parts[0].param_groups for name in group["names"]}
    assert by_muon == {name for name in named() if "layers" in name and "norm" not in name}


def test_averaged_weights_come_and_go_bit_for_bit():
    parameters = named()
    optimizer = build_optimizer(parameters, train(optimizer="adamw_schedule_free"))
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    with averaged_weights(optimizer):
        assert all(not torch.equal(parameters[name], trained[name]) for name in parameters)
    assert all(torch.equal(parameters[name], trained[name]) for name in parameters)
    give_gradients(parameters, 3)
    optimizer.step()  # raises where the optimiser was left in evaluation mode
    assert not torch.equal(parameters["embed_tokens.weight"], trained["embed_tokens.weight"])


def test_averaged_weights_are_the_weights_elsewhere():
    parameters = named()
    before = parameters["embed_tokens.weight"].detach().clone()
    with averaged_weights(build_optimizer(parameters, train())):
        assert torch.equal(parameters["embed_tokens.weight"], before)
