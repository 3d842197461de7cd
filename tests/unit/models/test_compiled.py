"""Compiled layers stay where they are faster and agree, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from burnish.models import compiled
from burnish.models.compiled import Trial, try_compile
from burnish.models.policy import Policy

from .conftest import build
from .test_patch import adapted, batch, outcome


def tried(policy, **options):
    step = batch()
    return try_compile(policy.anatomy.whole, lambda: policy.hidden(step), **options)


def layers(policy):
    return policy.anatomy.whole.model.layers


@pytest.fixture
def clock(monkeypatch):
    """As if the two passes took so many seconds: a function that says how many."""
    real, seconds = compiled._outcome, []
    monkeypatch.setattr(compiled, "_outcome", lambda model, run: (real(model, run)[0], seconds.pop(0)))
    return lambda *given: seconds.extend(given)


def test_faster_and_equal_stays(clock):
    clock(1.0, 0.5)
    policy = Policy(adapted(build("llama"))).train()
    before = outcome(policy)
    trial = tried(policy, backend="aot_eager")
    assert trial.reason == ""
    assert trial.line() == "compile: layers compiled, 500 ms against 1000 ms"
    assert all(layer._compiled_call_impl is not None for layer in layers(policy))
    for name, value in outcome(policy).items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4)


def test_slower_is_taken_back(clock):
    clock(1.0, 0.99)
    policy = Policy(adapted(build("llama"))).train()
    before = outcome(policy)
    trial = tried(policy, backend="aot_eager")
    assert trial.reason == "it is not faster"
    assert trial.line() == "compile: not used, it is not faster (990 ms against 1000 ms)"
    assert all(layer._compiled_call_impl is None for layer in layers(policy))
    assert all("forward" in vars(layer.mlp) for layer in layers(policy))
    assert all(torch.equal(value, before[name]) for name, value in outcome(policy).items())


def test_different_is_taken_back(clock, monkeypatch):
    clock(1.0, 0.5)
    policy = Policy(adapted(build("llama"))).train()
    before = outcome(policy)
    norm = type(layers(policy)[0].input_layernorm)
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x) * 1.01)  # as if the compiler were wrong
    trial = tried(policy, backend="aot_eager")
    assert trial.reason.startswith("it does not agree, off by ")
    assert all(torch.equal(value, before[name]) for name, value in outcome(policy).items())


def test_a_compiler_that_fails_is_not_needed():
    policy = Policy(build("llama")).train()
    trial = tried(policy, backend="no such compiler")
    assert trial == Trial(trial.before, 0.0, trial.reason)
    assert trial.line().startswith("compile: not used, it fails (")
    assert outcome(policy)["logprobs"].isfinite().all()
