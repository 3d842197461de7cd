"""The head's Triton kernels under the interpreter: the same numbers as plain torch, at any size; and that a compiler takes them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.kernels import linear_ce
from burnish.kernels.gpu import linear_ce as gpu
from burnish.kernels.linear_ce import head_stats, head_stats_reference, stats_from_logits, weighted_nll

OPTIONAL = linear_ce.OPTIONAL - {"log_sum_sq"}  # which Triton does not compute
DIFFERENTIABLE = ("logprobs", "logsumexp", "mean_logit", "entropy")


def inputs(k, h, v, dtype, train, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((k, h), (v, h), (v,))]
    parts[0] = torch.stack((parts[0], parts[0]), dim=1)[:, 0]  # rows with a gap between them
    names = ("hidden", "weight", "bias")
    return [x.to(dtype).requires_grad_(name in train) for x, name in zip(parts, names, strict=True)], torch.randint(
        v, (k,), generator=generator
    )


def run(function, parts, targets, **options):
    """(statistics, gradients of what needs one), every statistic of every row with an upstream gradient of its own."""
    parts = [x.detach().requires_grad_(x.requires_grad) for x in parts]
    stats = function(parts[0], parts[1], targets, bias=parts[2], **options)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for name in DIFFERENTIABLE:
        value = getattr(stats, name)
        if value is not None:
            total = total + (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
    return stats, torch.autograd.grad(total, [x for x in parts if x.requires_grad])


def compare(parts, targets, dtype, want=OPTIONAL, **options):
    """Against fp64 truth, no further from it than the plain formula in `dtype`."""
    truth, true_gradients = run(
        head_stats_reference, [x.detach().double().requires_grad_(x.requires_grad) for x in parts], targets, want=want, **options
    )
    ours, our_gradients = run(head_stats, parts, targets, want=want, impl="triton", chunk=3, **options)
    plain, plain_gradients = run(head_stats_reference, parts, targets, want=want, **options)
    trios = [(getattr(ours, n), getattr(plain, n), getattr(truth, n)) for n in DIFFERENTIABLE if getattr(truth, n) is not None]
    trios += list(zip(our_gradients, plain_gradients, true_gradients, strict=True))
    for mine, theirs, true in trios:
        slack = 4 * torch.finfo(torch.float32).eps * max(true.abs().max().item(), 1.0)
        if mine.dtype is torch.float16:  # with a handful of numbers, who rounds the largest one luckily is chance
            slack += torch.finfo(mine.dtype).eps / 2 * true.abs().max().item()
        assert mine.dtype is theirs.dtype
        assert worst(mine, true) <= 1.05 * worst(theirs, true) + slack
    if "correct" in want:
        assert torch.equal(ours.correct, plain.correct)


def worst(found, true):
    return (found.double() - true).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 8192 + 5])
@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5, "temperature": 0.7}])
def test_no_further_from_the_truth_than_plain_torch(dtype, vocabulary, train, options):
    parts, targets = inputs(4, 5, vocabulary, dtype, train)
    compare(parts, targets, dtype, **options)


@pytest.mark.parametrize("want", [set(), {"entropy"}, {"correct"}, {"logsumexp"}, {"mean_logit"}])
@pytest.mark.parametrize("train", [("hidden",), ("weight",)])
def test_any_choice_of_statistics(want, train):
    parts, targets = inputs(1, 3, 50, torch.float32, train)
    compare(parts, targets, torch.float32, want=frozenset(want))


@pytest.mark.parametrize("upstream", [None, (1.5, -0.5, 2.0, 0.7)])
@pytest.mark.parametrize(("vocabulary", "rows"), [(128256, 2), (262144, 1)])
def test_real_vocabularies(vocabulary, rows, upstream):
    # Without the products, whose own rounding over so many columns is larger than the kernel's.
    z = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    y = torch.tensor([vocabulary - 1, 5][:rows])

    def plain(raw):
        raw = raw.clone().requires_grad_()
        stats = stats_from_logits(2.5 * torch.tanh(raw / 2.5), y, OPTIONAL)
        weighed = zip(DIFFERENTIABLE, upstream or (1.0, 0.0, 0.0, 0.0), strict=True)
        sum((getattr(stats, name) * weight).sum() for name, weight in weighed).backward()
        return *(getattr(stats, name).detach() for name in DIFFERENTIABLE), raw.grad

    stats = gpu.head_chunk(dz := z.clone(), y, 1.0, 2.5, upstream is None, OPTIONAL)
    if upstream is not None:
        gpu.head_chunk_backward(dz, y, tuple(torch.full((rows,), g) for g in upstream), 1.0, 2.5)
    for mine, theirs, true in zip((*stats[:4], dz), plain(z), plain(z.double()), strict=True):
        slack = 2 * torch.finfo(torch.float32).eps * true.abs().max().item()
        assert worst(mine, true) <= 1.05 * worst(theirs, true) + slack


@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")])
def test_bf16_runs(train):
    # The interpreter rounds bf16 in its own way: near the plain numbers is all that can be asked of it.
    parts, targets = inputs(4, 5, 300, torch.bfloat16, train)
    ours, our_gradients = run(head_stats, parts, targets, want=OPTIONAL, impl="triton", softcap=5.0)
    plain, plain_gradients = run(head_stats_reference, parts, targets, want=OPTIONAL, softcap=5.0)
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(our_gradients, plain_gradients, strict=True):
        assert (mine.double() - theirs.double()).norm() <= 0.02 * theirs.double().norm()


def test_the_weighted_sum():
    parts, targets = inputs(5, 6, 40, torch.float32, ("hidden", "weight", "bias"))
    weights = torch.linspace(-1, 2, 5)
    options = {"bias": parts[2], "softcap": 3.0}
    ours, stats = weighted_nll(parts[0], parts[1], targets, weights, want=OPTIONAL, impl="triton", chunk=2, **options)
    plain = head_stats_reference(parts[0], parts[1], targets, want=OPTIONAL, **options)
    total = -(weights * plain.logprobs).sum()
    torch.testing.assert_close(ours, total)
    for name in ("logprobs", *OPTIONAL):
        torch.testing.assert_close(getattr(stats, name), getattr(plain, name).detach())
    torch.testing.assert_close(torch.autograd.grad(3 * ours, parts), torch.autograd.grad(3 * total, parts))


@pytest.mark.parametrize("train", [("hidden",), ("weight",)])
def test_nothing_to_predict(train):
    parts, targets = inputs(0, 3, 9, torch.float32, train)
    stats, gradients = run(head_stats, parts, targets, want=OPTIONAL, impl="triton")
    assert stats.logprobs.shape == (0,)
    assert not gradients[0].any()


def test_the_first_of_equal_logits_is_the_choice():
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0], [1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    for targets, expected in (([1, 2, 0], [True, False, True]), ([3, 0, 1], [False, False, False])):
        stats = gpu.head_chunk(z.clone(), torch.tensor(targets), 1.0, None, False, OPTIONAL)
        assert stats[4].tolist() == expected


@pytest.mark.parametrize("way", ["early", "late"])
@pytest.mark.parametrize("margin", [7.0, 12.0])
def test_the_gradient_of_a_certain_token_keeps_its_relative_precision(way, margin):
    # p = 0.999 and 0.999994; a product of bf16 values with (p - 1) rounded through p would be zero.
    z = torch.tensor([[margin, 0.0]], dtype=torch.float16)
    y = torch.tensor([0])
    if way == "early":
        gpu.head_chunk(z, y, 1.0, None, True, frozenset())
    else:
        gpu.head_chunk_backward(z, y, (torch.ones(1), None, None, None), 1.0, None)
    left = 1 - torch.sigmoid(torch.tensor(margin, dtype=torch.float64)).item()
    assert z[0].tolist() == pytest.approx([left, -left], rel=2e-2)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(size):
    z = torch.tensor([[size, size - 1, -size, 0.25]])
    truth = z.double().requires_grad_()
    logp = truth.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum()
    (logp[0, 1] + entropy).backward()
    ours, y = z.clone(), torch.tensor([1])
    stats = gpu.head_chunk(ours, y, 1.0, None, False, OPTIONAL)
    assert stats[0].item() == pytest.approx(logp[0, 1].item(), rel=1e-6)
    assert stats[3].item() == pytest.approx(entropy.item(), rel=1e-6, abs=1e-30)
    gpu.head_chunk_backward(ours, y, (torch.ones(1), None, None, torch.ones(1)), 1.0, None)
    torch.testing.assert_close(ours.double(), truth.grad, rtol=1e-5, atol=1e-7)


def test_rows_lie_further_apart_than_32_bits_count():
    # Three rows 2^30 apart: 4 GB of addresses, of which three pages are ever touched.
    store = torch.empty((2 << 30) + 8, dtype=torch.float16)
    z = store.as_strided((3, 8), (1 << 30, 1))
    z.copy_(torch.arange(24).reshape(3, 8) / 8)
    expected = z.float()
    y = torch.tensor([0, 3, 7])
    stats = gpu.head_chunk(z, y, 1.0, None, True, OPTIONAL)
    logp = expected.log_softmax(-1)
    torch.testing.assert_close(stats[0], logp[torch.arange(3), y])
    torch.testing.assert_close(z.float(), torch.nn.functional.one_hot(y, 8) - logp.exp(), rtol=1e-3, atol=1e-3)


def test_nothing_waits_for_the_device(monkeypatch):
    # Fake tensors have no values, so reading one raises. The kernels themselves, which need memory, are left out.
    grids = []

    class Launched:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(gpu, "_forward", Launched())
    monkeypatch.setattr(gpu, "_backward", Launched())
    with FakeTensorMode():
        hidden, weight = torch.empty(9, 4, requires_grad=True), torch.empty(30, 4, requires_grad=True)
        targets, rows = torch.empty(9, dtype=torch.int64), torch.empty(9)
        stats = head_stats(hidden, weight, targets, chunk=4, want=OPTIONAL, impl="triton")
        (stats.logprobs + stats.entropy + stats.logsumexp + stats.mean_logit).sum().backward()
        weighted_nll(hidden, weight, targets, rows, chunk=4, impl="triton")[0].backward()
        assert weight.grad.shape == (30, 4)
    assert grids == [(4,), (4,), (1,)] * 3


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from burnish.kernels.gpu import linear_ce as gpu

KINDS = {"z_ptr": "*bf16", "y_ptr": "*i64", "correct_ptr": "*i1", "row_stride": "i32", "vocabulary": "i32"}
KINDS |= {"scale": "fp32", "softcap": "fp32"}
for kernel, constants in (
    (gpu._forward, {"softcap": None, "mean_ptr": None, "entropy_ptr": None, "GRADIENT": True}),
    (gpu._forward, {"GRADIENT": False}),
    (gpu._backward, {}),
):
    constants["BLOCK"] = gpu._BLOCK
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else KINDS.get(name, "*fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 32})
    print(kernel.__name__, len(compiled.asm["ptx"]) > 0, compiled.metadata.shared <= 64 * 1024)
"""


def test_a_compiler_takes_the_kernels(tmp_path):
    # The interpreter forgives what a compiler does not (types, shapes of branches). No GPU is needed to compile for one.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_head.py"  # Triton reads the source of kernels, and of what calls them
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["_forward", "True", "True", "_forward", "True", "True", "_backward", "True", "True"]
