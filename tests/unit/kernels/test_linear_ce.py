"""The head against plain torch: values, gradients of every input, every statistic, real vocabulary sizes, and what is kept in memory."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.kernels import dispatch, native
from burnish.kernels.linear_ce import (
    CASES,
    OPTIONAL,
    TokenStats,
    default_chunk,
    head_stats,
    head_stats_module,
    head_stats_reference,
    stats_from_logits,
    weighted_nll,
)

MOST = OPTIONAL - {"log_sum_sq"}
"""What every implementation computes."""
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
@pytest.mark.parametrize("shape", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": 1.5, "temperature": 0.7}])
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
@pytest.mark.parametrize("vocabulary", [49152, 128256, 262144])
def test_error_against_truth_is_not_above_the_plain_one(dtype, trained, vocabulary):
    k = 33 if vocabulary < 262144 else 5
    parts, targets = head(k=k, h=24, v=vocabulary, dtype=dtype, train=("hidden", "weight") if trained else ("hidden",))
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


@pytest.mark.parametrize("way", ["early", "late", "weighted"])
def test_the_gradient_of_a_certain_token_keeps_its_relative_precision(way):
    # p = 0.999 or more: (p - 1) must not be rounded through p's own bf16 value, where it would vanish.
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16, requires_grad=way != "early")
    if way == "weighted":
        (-weighted_nll(hidden, weight, torch.tensor([0]), torch.ones(1))[0]).backward()
    else:
        head_stats(hidden, weight, torch.tensor([0])).logprobs.sum().backward()
    left = (1 - torch.sigmoid(torch.tensor(8.0, dtype=torch.float64))).item()
    assert hidden.grad.item() == pytest.approx(8 * left, rel=1e-2)
    if way != "early":
        assert weight.grad.flatten().tolist() == pytest.approx([left, -left], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_cost_no_precision(dtype):
    # Differences to the largest logit are exact, its own value is not: logp and entropy must come from the former.
    hidden = torch.tensor([[1e4], [-1e4], [3.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [1.0], [-1.0], [0.5]], dtype=dtype)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=dtype)
    targets = torch.tensor([0, 2, 3])
    stats = head_stats(hidden, weight, targets, bias=bias, want=MOST)
    (stats.logprobs + stats.entropy).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    truth = head_stats_reference(exact, weight.double(), targets, bias=bias.double(), want=MOST)
    (truth.logprobs + truth.entropy).sum().backward()
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(stats, name).double(), getattr(truth, name), rtol=1e-6, atol=1e-6)
    assert hidden.grad.isfinite().all()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_made_of_the_statistics(smoothing):
    parts, targets = head(bias=True, train=("hidden", "weight", "bias"))
    inputs = list(parts.values())
    stats = head_stats(parts["hidden"], parts["weight"], targets, bias=parts["bias"], want=frozenset({"logsumexp", "mean_logit"}))
    ours = (-(1 - smoothing) * stats.logprobs + smoothing * (stats.logsumexp - stats.mean_logit)).sum()
    plain = F.cross_entropy(F.linear(*inputs), targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch < 2.13")
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_the_head_of_torch(chunked, dtype):
    parts, targets = head(40, 16, 300, dtype=dtype, bias=True, train=("hidden", "weight", "bias"))
    inputs = list(parts.values())
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16) if chunked else None
    theirs = F.linear_cross_entropy(*inputs[:2], targets, linear_bias=inputs[2], reduction="sum", options=options)
    their_gradients = torch.autograd.grad(theirs, inputs)
    late = -head_stats(*inputs[:2], targets, bias=inputs[2], chunk=16).logprobs.sum()
    weighted, _ = weighted_nll(*inputs[:2], targets, torch.ones(40, dtype=dtype), bias=inputs[2], chunk=16)
    for ours in (late, weighted):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs), their_gradients)


def test_fake_tensors_refuse_to_be_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight")])
def test_nothing_waits_for_the_device(dtype, train):
    # Fake tensors have no values: reading one (item, nonzero, a boolean mask, a check of the targets) raises.
    with FakeTensorMode():
        hidden, weight = torch.empty(9, 4, dtype=dtype), torch.empty(30, 4, dtype=dtype)
        hidden.requires_grad_("hidden" in train)
        weight.requires_grad_("weight" in train)
        targets, row_weights = torch.empty(9, dtype=torch.int64), torch.empty(9)
        stats = head_stats(hidden, weight, targets, chunk=4, want=OPTIONAL, softcap=3.0, impl="torch")
        (stats.logprobs + stats.entropy + stats.logsumexp + stats.mean_logit).sum().backward()
        total, _ = weighted_nll(hidden, weight, targets, row_weights, chunk=4, want=OPTIONAL, impl="torch")
        total.backward()
        assert hidden.grad.shape == (9, 4)


def stand_in(z, y, scale, softcap, write_dz):
    """What the C kernel does, of plain torch."""
    raw = z.float().requires_grad_()
    with torch.enable_grad():
        shaped = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
        stats = stats_from_logits(shaped, y, OPTIONAL)
        (gradient,) = torch.autograd.grad(stats.logprobs.sum(), raw)
    if write_dz:
        z.copy_(gradient)
    return tuple(getattr(stats, name).detach() for name in TokenStats.__slots__ if name != "log_sum_sq")  # which C leaves out


@pytest.fixture
def c_kernel(monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: True)
    monkeypatch.setattr(native, "head_chunk", stand_in, raising=False)
    dispatch.available.cache_clear()
    yield
    dispatch.available.cache_clear()


@pytest.mark.usefixtures("c_kernel")
@pytest.mark.parametrize("impl", ["auto", "native"])
@pytest.mark.parametrize("train", [(), ("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_in_c_gives_what_torch_gives(monkeypatch, impl, train, dtype):
    parts, targets = head(7, 5, 40, dtype=dtype, bias=True, train=train)
    calls = []
    monkeypatch.setattr(native, "head_chunk", lambda *args: calls.append(args[0].dtype) or stand_in(*args))
    options = {"chunk": 3, "want": frozenset({"correct", "entropy"}), "softcap": 3.0, "temperature": 0.5}
    row_weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0, 0.25, 0.0])
    inputs = [parts[name] for name in train]
    results = []
    for way in (impl, "torch"):
        stats = head_stats(parts["hidden"], parts["weight"], targets, bias=parts["bias"], impl=way, **options)
        total, _ = weighted_nll(parts["hidden"], parts["weight"], targets, row_weights, bias=parts["bias"], impl=way, **options)
        gradients = [
            torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (stats.logprobs.sum(), stats.entropy.sum(), total) if inputs
        ]
        results.append((stats.logprobs, stats.entropy, stats.correct, total, stats.logsumexp, *gradients))
    assert set(calls) == {dtype}
    exact = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}  # dz may round the other way
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **exact)


def test_an_implementation_by_name_must_know_the_type():
    parts, targets = head()
    for impl in ("native", "triton"):
        with pytest.raises(ValueError, match="float64"):
            head_stats(parts["hidden"], parts["weight"], targets, impl=impl)
    with pytest.raises(ValueError, match="cuda"):
        head_stats(parts["hidden"], parts["weight"], targets, impl="cuda")


@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("shape", [{}, {"softcap": 2.0, "scale": 1.5, "temperature": 0.7}])
def test_log_sum_sq_is_that_of_two_equal_draws(trained, shape):
    parts, targets = head(bias=True, train=trained)
    stats = head_stats(parts["hidden"], parts["weight"], targets, bias=parts["bias"], chunk=3, want=frozenset({"log_sum_sq"}), **shape)
    logits = F.linear(parts["hidden"], parts["weight"], parts["bias"]) * shape.get("scale", 1.0)
    logits = logits if not shape else shape["softcap"] * torch.tanh(logits / shape["softcap"]) / shape["temperature"]
    p = torch.softmax(logits.detach(), -1)
    torch.testing.assert_close(stats.log_sum_sq, (p * p).sum(-1).log())
    assert not stats.log_sum_sq.requires_grad
    if trained:
        both, alone = (
            torch.autograd.grad(found.logprobs.sum(), [parts[name] for name in trained])
            for found in (stats, head_stats(parts["hidden"], parts["weight"], targets, bias=parts["bias"], chunk=3, **shape))
        )
        torch.testing.assert_close(both, alone)


def test_log_sum_sq_of_a_certain_and_of_an_open_prediction():
    weight = torch.zeros(128256, 1)
    weight[0] = 100.0
    stats = head_stats(torch.tensor([[1.0], [0.0]]), weight, torch.tensor([0, 5]), want=frozenset({"log_sum_sq"}))
    assert stats.log_sum_sq.tolist() == pytest.approx([0.0, -math.log(128256)], rel=1e-6, abs=1e-6)


@pytest.mark.usefixtures("c_kernel")
def test_log_sum_sq_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(native, "head_chunk", None)
    parts, targets = head(dtype=torch.float32)
    assert head_stats(parts["hidden"], parts["weight"], targets, want=OPTIONAL).log_sum_sq is not None
    with pytest.raises(ValueError, match="the 'native' head does not compute log_sum_sq"):
        head_stats(parts["hidden"], parts["weight"], targets, want=OPTIONAL, impl="native")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    parts, targets = head()
    with pytest.raises(ValueError, match="temperature"):
        head_stats(parts["hidden"], parts["weight"], targets, temperature=temperature)


def test_cases_are_heads():
    for name, case in CASES:
        assert case["k"] * case["h"] * case["v"] > 0, name
        assert set(case) <= {"k", "h", "v", "softcap", "scale"}, name


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_decides_the_type_of_products_only(backward_inside):
    parts, targets = head(k=9, h=16, v=64, dtype=torch.float32, train=("hidden", "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        stats = head_stats(parts["hidden"], parts["weight"], targets, want=MOST)
        if backward_inside:
            objective(stats).backward()
    if not backward_inside:
        objective(stats).backward()
    rounded = {n: x.detach().bfloat16() for n, x in parts.items() if x is not None}
    plain = head_stats_reference(rounded["hidden"], rounded["weight"], targets, want=MOST)
    assert stats.logprobs.dtype is torch.float32
    torch.testing.assert_close(stats.logprobs, plain.logprobs)
    assert parts["hidden"].grad.dtype is parts["weight"].grad.dtype is torch.float32
    _, expected = gradients(head_stats_reference, parts, targets, want=MOST)
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


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_frozen_head_multiplies_twice():
    parts, targets = head(train=("hidden",))
    with Products() as seen:
        head_stats(parts["hidden"], parts["weight"], targets, want=frozenset({"correct"})).logprobs.sum().backward()
    assert seen.count == 2


def nll_by_statistics(hidden, weight, targets, row_weights, **options):
    """What `weighted_nll` stands for, of plain torch."""
    stats = head_stats_reference(hidden, weight, targets, **options)
    return -(row_weights * stats.logprobs).sum(), stats


@pytest.mark.parametrize("train", [("hidden",), ("weight",), ("hidden", "weight"), ("hidden", "weight", "bias"), ("bias",)])
@pytest.mark.parametrize("shape", [{}, {"softcap": 2.0, "scale": 1.5, "temperature": 0.7}])
@pytest.mark.parametrize("k", [0, 1, 7])
def test_the_weighted_sum_equals_the_plain_formula(train, shape, k):
    parts, targets = head(k, bias="bias" in train, train=train)
    row_weights = torch.linspace(-1, 2, k, dtype=torch.float64)
    inputs = [parts[name] for name in train]
    results = []
    for function, options in ((weighted_nll, {"chunk": 3}), (nll_by_statistics, {})):
        total, stats = function(
            parts["hidden"], parts["weight"], targets, row_weights, bias=parts["bias"], want=OPTIONAL, **shape, **options
        )
        assert total.shape == ()
        # Twice, and scaled in between: neither pass may consume what the other needs.
        loss = (3.7 * total).square() if k else total
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        results.append((total, stats, first, torch.autograd.grad(loss, inputs)))
    (ours, our_stats, *our_gradients), (plain, plain_stats, *plain_gradients) = results
    torch.testing.assert_close(ours, plain)
    for name in TokenStats.__slots__:
        assert not getattr(our_stats, name).requires_grad
        torch.testing.assert_close(getattr(our_stats, name), getattr(plain_stats, name).detach())
    torch.testing.assert_close(our_gradients, plain_gradients)


def test_weights_of_rows_can_be_differentiated_too():
    parts, targets = head(train=("hidden", "weight"))
    row_weights = torch.linspace(1, 2, 7, dtype=torch.float64, requires_grad=True)
    inputs = [row_weights, parts["hidden"], parts["weight"]]
    gradients = [
        torch.autograd.grad(function(parts["hidden"], parts["weight"], targets, row_weights)[0], inputs)
        for function in (weighted_nll, nll_by_statistics)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("train", "count"), [(("hidden",), 2), (("hidden", "weight"), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weighted_sum_needs_no_product_twice(train, count, dtype):
    parts, targets = head(dtype=dtype, train=train)
    with Products() as seen:
        weighted_nll(parts["hidden"], parts["weight"], targets, torch.ones(7), want=frozenset({"correct"}))[0].backward()
    assert seen.count == count


def test_half_precision_weighs_late():
    k, v = 2, 40000
    weight = torch.full((v, 1), 1.0, dtype=torch.float16)
    weight[0] = 0.0
    hidden = torch.zeros(k, 1, dtype=torch.float16, requires_grad=True)
    total, _ = weighted_nll(hidden, weight.requires_grad_(), torch.zeros(k, dtype=torch.int64), torch.ones(k), chunk=1)
    (total * 1024).backward()
    assert torch.allclose(hidden.grad.float() / 1024, torch.full((k, 1), (v - 1) / v), rtol=2e-2)


@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.parametrize("want", [set(), OPTIONAL])
def test_a_module_as_head(k, want):
    module = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 11)).double()
    parts, targets = head(k, train=("hidden",))
    expected = stats_from_logits(2.0 * torch.tanh(0.5 * module(parts["hidden"]) / 2.0) / 1.3, targets, frozenset(want))
    inputs = [parts["hidden"], *module.parameters()]
    plain = torch.autograd.grad(objective(expected), inputs)
    stats = head_stats_module(parts["hidden"], module, 11, targets, softcap=2.0, scale=0.5, temperature=1.3, chunk=3, want=frozenset(want))
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
    assert default_chunk(49152, cpu) == 512
    assert default_chunk(262144, cpu) == 128
    assert default_chunk(128256, gpu, 2) == 2048
    assert default_chunk(128256, gpu, 4) == 1024
    assert default_chunk(10**12, cpu) == default_chunk(10**12, gpu) == 1
