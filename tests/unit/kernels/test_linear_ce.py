"""The head against plain torch: values, gradients of every input, every statistic, real vocabulary sizes, and what is kept in memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.kernels.linear_ce import (
    OPTIONAL,
    TokenStats,
    default_chunk,
    head_stats,
    head_stats_module,
    head_stats_reference,
    stats_from_logits,
)

DIFFERENTIABLE = ("logprobs", "logsumexp", "mean_logit", "entropy")


def head(k=7, h=5, v=11, dtype=torch.float64, bias=False, train=(), seed=0):
    """Random inputs of a head; `train` names those that get gradients."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "hidden": torch.randn(k, h, generator=generator, dtype=torch.float64),
        "weight": torch.randn(v, h, generator=generator, dtype=torch.float64),
        "bias": torch.randn(v, generator=generator, dtype=torch.float64) if bias else None,
    }
    parts = {name: x.to(dtype).requires_grad_(name in train) if x is not None else None for name, x in parts.items()}
    return parts, torch.randint(v, (k,), generator=generator)


def objective(stats: TokenStats, seed=1) -> torch.Tensor:
    """A scalar that gives every statistic of every row a different upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for name in DIFFERENTIABLE:
        value = getattr(stats, name)
        if value is not None:
            total = total + (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
    return total


def gradients(function, parts, targets, **options):
    fresh = {n: x.detach().clone().requires_grad_(x.requires_grad) if x is not None else None for n, x in parts.items()}
    bias = {"bias": fresh["bias"]}
    stats = function(fresh["hidden"], fresh["weight"], targets, **bias, **options)
    objective(stats).backward()
    return stats, {n: x.grad for n, x in fresh.items() if x is not None}


@pytest.mark.parametrize("train", [("hidden",), ("weight",), ("hidden", "weight"), ("hidden", "weight", "bias"), ("bias",)])
@pytest.mark.parametrize("want", [set(), {"correct"}, {"entropy"}, {"logsumexp", "mean_logit"}, OPTIONAL])
@pytest.mark.parametrize("shape", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": 1.5}])
def test_values_and_gradients_equal_the_plain_formula(train, want, shape):
    parts, targets = head(bias="bias" in train, train=train)
    options = {"want": frozenset(want), **shape}
    ours, our_gradients = gradients(head_stats, parts, targets, chunk=3, **options)
    plain, plain_gradients = gradients(head_stats_reference, parts, targets, **options)
    for name in TokenStats.__slots__:
        expected, found = getattr(plain, name), getattr(ours, name)
        assert (found is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(found, expected)
    for name, expected in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], expected)


@pytest.mark.parametrize(("train", "want"), product([("hidden",), ("hidden", "weight", "bias")], [set(), {"entropy"}, OPTIONAL]))
def test_gradcheck(train, want):
    parts, targets = head(k=4, h=3, v=6, bias=True, train=train)
    tensors = [parts[name] for name in train]

    def function(*given_tensors):
        values = {**parts, **dict(zip(train, given_tensors, strict=True))}
        stats = head_stats(
            values["hidden"], values["weight"], targets, bias=values["bias"], softcap=4.0, scale=0.7, chunk=3, want=frozenset(want)
        )
        return tuple(value for name in DIFFERENTIABLE if (value := getattr(stats, name)) is not None)

    assert torch.autograd.gradcheck(function, tensors)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(0, 9), h=st.integers(1, 6), v=st.integers(1, 17), chunk=st.integers(1, 12), trained=st.booleans())
def test_any_shape_and_chunk(k, h, v, chunk, trained):
    parts, targets = head(k, h, v, train=("hidden", "weight") if trained else ("hidden",))
    ours, our_gradients = gradients(head_stats, parts, targets, chunk=chunk, want=OPTIONAL)
    plain, plain_gradients = gradients(head_stats_reference, parts, targets, want=OPTIONAL)
    for name in TokenStats.__slots__:
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))
    for name, expected in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], expected)


def test_nothing_to_predict_still_has_a_gradient():
    parts, targets = head(k=0, train=("hidden",))
    stats = head_stats(parts["hidden"], parts["weight"], targets)
    stats.logprobs.sum().backward()
    assert stats.logprobs.shape == (0,)
    assert parts["hidden"].grad.shape == (0, 5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [49152, 128256])
def test_error_against_truth_is_not_above_the_plain_one(dtype, trained, vocabulary):
    parts, targets = head(k=33, h=24, v=vocabulary, dtype=dtype, train=("hidden", "weight") if trained else ("hidden",))
    truth_parts = {n: x.detach().double().requires_grad_(x.requires_grad) if x is not None else None for n, x in parts.items()}
    truth, true_gradients = gradients(head_stats_reference, truth_parts, targets)
    ours, our_gradients = gradients(head_stats, parts, targets, chunk=8)
    plain, plain_gradients = gradients(head_stats_reference, parts, targets)

    def worst(found, expected):
        return (found.double() - expected).abs().max().item()

    pairs = [(ours.logprobs, plain.logprobs, truth.logprobs)]
    pairs += [(our_gradients[n], plain_gradients[n], true_gradients[n]) for n, x in parts.items() if x is not None and x.requires_grad]
    for mine, theirs, expected in pairs:
        slack = torch.finfo(torch.float32).eps * expected.abs().max().item()
        assert worst(mine, expected) <= 1.1 * worst(theirs, expected) + 4 * slack


def test_the_gradient_of_a_certain_token_keeps_its_relative_precision():
    # p = 0.999 or more: (p - 1) must not be rounded through p's own bf16 value, where it would vanish.
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16)
    head_stats(hidden, weight, torch.tensor([0])).logprobs.sum().backward()
    assert hidden.grad.item() == pytest.approx(8 * (1 - torch.sigmoid(torch.tensor(8.0))).item(), rel=1e-2)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_decides_the_type_of_products_only(backward_inside):
    parts, targets = head(k=9, h=16, v=64, dtype=torch.float32, train=("hidden", "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        stats = head_stats(parts["hidden"], parts["weight"], targets, want=OPTIONAL)
        if backward_inside:
            objective(stats).backward()
    if not backward_inside:
        objective(stats).backward()
    rounded = {n: x.detach().bfloat16() for n, x in parts.items() if x is not None}
    plain = head_stats_reference(rounded["hidden"], rounded["weight"], targets, want=OPTIONAL)
    assert stats.logprobs.dtype is torch.float32
    torch.testing.assert_close(stats.logprobs, plain.logprobs)
    assert parts["hidden"].grad.dtype is parts["weight"].grad.dtype is torch.float32
    _, expected = gradients(head_stats_reference, parts, targets, want=OPTIONAL)
    for name in ("hidden", "weight"):
        error = (parts[name].grad - expected[name]).norm() / expected[name].norm()
        assert error < 0.02


def test_half_precision_gradients_see_the_loss_scale():
    # Probabilities near 1e-8 vanish in fp16 unless the scaled upstream gradient is inside dz.
    k, v = 2, 40000
    hidden = torch.zeros(k, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.full((v, 1), 1.0, dtype=torch.float16)
    weight[0] = 0.0
    stats = head_stats(hidden, weight, torch.zeros(k, dtype=torch.int64), chunk=1)
    (stats.logprobs.sum() * -1024).backward()
    assert torch.allclose(hidden.grad.float() / 1024, torch.full((k, 1), (v - 1) / v), rtol=2e-2)


def test_no_graph_where_nothing_needs_one():
    parts, targets = head(train=())
    assert not head_stats(parts["hidden"], parts["weight"], targets).logprobs.requires_grad
    parts, targets = head(train=("hidden", "weight"))
    with torch.no_grad():
        assert not head_stats(parts["hidden"], parts["weight"], targets, want=OPTIONAL).logprobs.requires_grad


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight")])
@pytest.mark.parametrize("module", [False, True])
def test_logits_are_never_held_whole(train, module):
    k, v, chunk = 64, 1000, 8
    parts, targets = head(k, 4, v, dtype=torch.float32, train=train)
    with Largest() as seen:
        if module:
            stats = head_stats_module(parts["hidden"], lambda x: x @ parts["weight"].t(), v, targets, chunk=chunk, want=OPTIONAL)
        else:
            stats = head_stats(parts["hidden"], parts["weight"], targets, chunk=chunk, want=OPTIONAL)
        objective(stats).backward()
    assert v < seen.elements <= chunk * v


def test_frozen_head_multiplies_twice():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    parts, targets = head(train=("hidden",))
    with Products() as seen:
        head_stats(parts["hidden"], parts["weight"], targets, want=frozenset({"correct"})).logprobs.sum().backward()
    assert seen.count == 2


@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.parametrize("want", [set(), OPTIONAL])
def test_a_module_as_head(k, want):
    module = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 11)).double()
    parts, targets = head(k, train=("hidden",))
    expected = stats_from_logits(2.0 * torch.tanh(0.5 * module(parts["hidden"]) / 2.0), targets, frozenset(want))
    inputs = [parts["hidden"], *module.parameters()]
    plain = torch.autograd.grad(objective(expected), inputs)
    stats = head_stats_module(parts["hidden"], module, 11, targets, softcap=2.0, scale=0.5, chunk=3, want=frozenset(want))
    for name in TokenStats.__slots__:
        if getattr(expected, name) is None:
            assert getattr(stats, name) is None
        else:
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name))
    for mine, theirs in zip(torch.autograd.grad(objective(stats), inputs), plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_unknown_statistics_are_refused():
    parts, targets = head()
    with pytest.raises(ValueError, match="perplexity"):
        head_stats(parts["hidden"], parts["weight"], targets, want=frozenset({"perplexity"}))


def test_default_chunk_fits_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_chunk(49152, cpu) == 256
    assert default_chunk(262144, cpu) == 128
    assert default_chunk(128256, gpu, 2) == 2048
    assert default_chunk(128256, gpu, 4) == 1024
    assert default_chunk(10**12, cpu) == default_chunk(10**12, gpu) == 1
