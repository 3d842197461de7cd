"""Every kernel on a real GPU: output and every input's gradient against float64, never further away than plain torch in the same type.

The interpreter tests (tests/unit/kernels/gpu) prove the algorithms on any machine; bf16 rounding, the compiler and real memory are seen
only here. Errors are compared by their root mean square, where thousands of numbers leave little to chance, and by the largest, which one
rounding more or less at the end of a range can double. To run the same code without a GPU:

    TRITON_INTERPRET=1 BURNISH_GPU_TESTS_ON=cpu python -m pytest tests/gpu
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from benchmarks.problems import KERNELS, Kernel, Outputs, Problem, leaves

from burnish.kernels.nf4 import dequantize_nf4

DEVICE = torch.device("cuda" if torch.cuda.is_available() else os.environ.get("BURNISH_GPU_TESTS_ON", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device")

# The interpreter rounds bf16 in its own way, so only a GPU can be asked about it.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
NAMES = {kernel.name: kernel for kernel in KERNELS if kernel.module() is not None}
OWN = ("attention", "experts", "divergence")  # kernels with tests of their own
TRITON = [(name, title, dtype) for name in NAMES if name not in OWN for title, _ in NAMES[name].cases() for dtype in DTYPES]
EXPERTS = [(title, dtype) for title, case in NAMES["experts"].cases() if case["tokens"] for dtype in DTYPES]
DIVERGENCE = [(title, dtype) for title, _ in NAMES["divergence"].cases() for dtype in DTYPES]
ATTENTION = [(title, dtype) for title, _ in NAMES["attention"].cases() for dtype in DTYPES]


def label(value: Any) -> str:
    return str(value).removeprefix("torch.").replace(" ", "-")


@pytest.mark.parametrize(("name", "title", "dtype"), TRITON, ids=label)
def test_triton_is_no_further_from_the_truth_than_plain_torch(name: str, title: str, dtype: torch.dtype) -> None:
    if name == "adamw" and dtype is not torch.float32:
        pytest.skip("its state is fp32")
    kernel = NAMES[name]
    problem = kernel.problem(dict(kernel.cases())[title], dtype, DEVICE)
    require(kernel, problem, "triton")
    compare(problem, "triton")


@pytest.mark.parametrize(("title", "dtype"), DIVERGENCE, ids=label)
def test_two_heads_compared(title: str, dtype: torch.dtype) -> None:
    kernel = NAMES["divergence"]
    compare(kernel.problem(dict(kernel.cases())[title], dtype, DEVICE), "torch")


@pytest.mark.parametrize(("title", "dtype"), ATTENTION, ids=label)
def test_attention_over_segments(title: str, dtype: torch.dtype) -> None:
    kernel = NAMES["attention"]
    compare(kernel.problem(dict(kernel.cases())[title], dtype, DEVICE), "auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=label)
def test_varlen_attention_is_what_packing_uses(dtype: torch.dtype) -> None:
    if DEVICE.type != "cuda":
        pytest.skip("flash attention is CUDA's")
    kernel = NAMES["attention"]
    compare(kernel.problem(dict(kernel.cases())["roots"], dtype, DEVICE), "varlen")


@pytest.mark.parametrize(("title", "dtype"), EXPERTS, ids=label)
def test_experts_are_on_the_average_no_further_from_the_truth(title: str, dtype: torch.dtype) -> None:
    """A handful of numbers through four products each: single errors say little, so those of many draws are added up."""
    kernel, module = NAMES["experts"], NAMES["experts"].module()
    assert module is not None
    draws = 3 if dtype is torch.float32 else 15
    sums: list[list[float]] = []
    for seed in range(draws):
        torch.manual_seed(seed)
        problem = kernel.build(module, dict(kernel.cases())[title], dtype, DEVICE)
        found, plain, true = evaluate(problem, "auto"), evaluate(problem, "plain"), evaluate(problem, "plain", torch.float64)
        size = [float(exact.pow(2).sum()) for exact in true]
        errors = [[float((x.double() - exact).pow(2).sum()) for x in both] for *both, exact in zip(found, plain, true, strict=True)]
        sums.append([value for (mine, theirs), square in zip(errors, size, strict=True) for value in (mine, theirs, square)])
    total = torch.tensor(sums).sum(dim=0).view(-1, 3).sqrt()
    assert bool((total[:, 0] <= 1.4 * total[:, 1] + 1e-6 * total[:, 2]).all()), total.tolist()


@pytest.mark.parametrize("name", ["rms_norm", "rope", "glu", "lora", "lora_mlp", "experts", "linear_ce"])
def test_real_sizes_in_bf16(name: str) -> None:
    """Many programs, many tiles, offsets beyond 2^24: what small cases do not reach."""
    if DEVICE.type != "cuda":
        pytest.skip("too large for an interpreter")
    kernel = NAMES.get(name)
    if kernel is None:
        pytest.skip(f"there is no kernel '{name}'")
    for _, case in kernel.sizes("cuda", 4096):
        problem = kernel.problem(case, torch.bfloat16, DEVICE)
        require(kernel, problem, "triton")
        compare(problem, "triton", truth=torch.float32)  # fp64 products of that size would take minutes


@pytest.mark.parametrize("name", ["rms_norm", "rope", "glu", "lora", "lora_mlp", "linear_ce"])
def test_the_same_bits_every_time(name: str) -> None:
    kernel = NAMES.get(name)
    if kernel is None:
        pytest.skip(f"there is no kernel '{name}'")
    problem = kernel.problem(kernel.cases()[0][1], torch.bfloat16 if DEVICE.type == "cuda" else torch.float32, DEVICE)
    require(kernel, problem, "triton")
    first, second = (evaluate(problem, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("shape", [(6, 192), (5, 33), (1, 64), (40, 500), *([(4096, 14336)] if DEVICE.type == "cuda" else [])])
def test_nf4_weights_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    elements = shape[0] * shape[1]
    torch.manual_seed(0)
    packed = torch.randint(256, ((elements + 1) // 2,), dtype=torch.uint8).to(DEVICE)
    absmax = (torch.rand(-(-elements // 64)) + 0.01).to(DEVICE)
    found, plain = (dequantize_nf4(packed, absmax, shape, dtype, impl=impl) for impl in ("triton", "torch"))
    assert torch.equal(found, plain)


def require(kernel: Kernel, problem: Problem, impl: str) -> None:
    """Skips where a kernel is not written in `impl`; where it is, a failure to run is a failure."""
    try:
        problem.run(leaves(problem), impl)
    except ValueError as error:
        if "implementation" in str(error) or "only in torch" in str(error):
            pytest.skip(f"{kernel.name}: {error}")
        raise


def compare(problem: Problem, impl: str, truth: torch.dtype = torch.float64) -> None:
    found, plain, true = evaluate(problem, impl), evaluate(problem, "plain"), evaluate(problem, "plain", truth)
    for i, (mine, theirs, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert mine.shape == exact.shape and mine.dtype is theirs.dtype
        if not exact.numel():
            continue
        assert bool(mine.isfinite().all())
        error, allowed = ((x.to(truth) - exact).abs() for x in (mine, theirs))
        floor = 1e-6 * float(exact.abs().max())
        for measure, slack in ((torch.linalg.vector_norm, 1.05 + 4 / exact.numel() ** 0.5), (torch.max, 2.0)):
            worst, limit = float(measure(error)), slack * float(measure(allowed))
            size = exact.numel() ** 0.5 if measure is torch.linalg.vector_norm else 1.0
            assert worst <= limit + floor * size, f"output {i} of {len(true)}: {worst:.4g} against {limit / slack:.4g} ({slack:.2f})"


def evaluate(problem: Problem, impl: str, dtype: torch.dtype | None = None) -> Outputs:
    """Outputs and gradients, under the same random gradient from above for everyone."""
    given = leaves(problem, dtype)
    outputs = problem.plain(given) if impl == "plain" else problem.run(given, impl)
    generator = torch.Generator().manual_seed(7)
    kept = problem.inputs[problem.trained[0]].dtype if problem.trained else outputs[0].dtype
    upstream = [torch.randn(y.shape, generator=generator).to(kept).to(y.device, y.dtype) for y in outputs]
    wanted = [given[name] for name in problem.trained]
    gradients = torch.autograd.grad(outputs, wanted, upstream) if wanted else ()
    return tuple(y.detach() for y in (*outputs, *gradients))
