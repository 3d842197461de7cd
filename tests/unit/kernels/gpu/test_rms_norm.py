"""RMSNorm in Triton, under its interpreter: the same numbers as torch's, no further from the truth."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels.gpu import rms_norm as gpu
from burnish.kernels.rms_norm import CASES, rms_norm, rms_norm_forward, rms_norm_kernels, rms_norm_reference

EPS = 1e-5
LARGE = [("many heads", {"rows": 300, "size": 16}), ("long row", {"rows": 2, "size": 5000, "residual": True})]


def inputs(case, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (case["rows"], case["size"])
    x, residual = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    weight = (torch.randn(case["size"], generator=generator) * 0.3 + 1 - case.get("offset", 0)).bfloat16()
    parts = (x.to(dtype), weight.to(dtype), residual.to(dtype) if case.get("residual") else None)
    return tuple(None if part is None else part.requires_grad_() for part in parts)


def run(norm, case, parts, **options):
    x, weight, residual = parts
    flags = {key: case[key] for key in ("gemma", "offset", "through") if key in case}
    outputs = norm(x, weight, EPS, residual=residual, **flags, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype) for output in outputs]
    leaves = [part for part in parts if part is not None and part.requires_grad]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize("case", [case for _, case in (*CASES, *LARGE)], ids=[name for name, _ in (*CASES, *LARGE)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_is_not_above_the_plain_one(case, dtype):
    truth = run(rms_norm_reference, case, inputs(case, torch.float64))
    found = run(rms_norm, case, inputs(case, dtype), impl="triton")
    plain = run(rms_norm_reference, case, inputs(case, dtype))
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == true.shape
        if true.numel():
            error, allowed = ((t.double() - true).abs().max().item() for t in (mine, theirs))
            assert error <= 1.05 * allowed + 1e-6 * true.abs().max().item()


@pytest.mark.parametrize("case", [CASES[2][1], CASES[4][1]], ids=["llama", "gemma"])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_bf16_runs(case, out_dtype):
    truth = run(rms_norm_reference, case, inputs(case, torch.float64))
    for mine, true in zip(run(rms_norm, case, inputs(case, torch.bfloat16), impl="triton", out_dtype=out_dtype), truth, strict=True):
        assert (mine.double() - true).abs().max() <= 0.02 * true.abs().max()  # the interpreter cuts off where a GPU rounds


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float32, torch.float16), (torch.float16, None), (torch.float16, torch.float16)])
def test_fp32_weights(gemma, dtype, out_dtype):
    case = {"rows": 5, "size": 40, "residual": True, "gemma": gemma, "offset": float(gemma)}
    x, weight, residual = inputs(case, dtype)
    parts = (x, weight.detach().float().requires_grad_(), residual)
    found = run(rms_norm, case, parts, impl="triton", out_dtype=out_dtype)
    for mine, theirs in zip(found, run(rms_norm_reference, case, parts, out_dtype=out_dtype), strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


def test_frozen_weight_no_weight_and_strided_rows():
    fused = torch.randn(6, 3, 20, generator=torch.Generator().manual_seed(0))
    for x in (fused[:, 1, :16], fused[..., 2:12], fused[..., ::2], fused[:1, :1].expand(2, 3, 20)):
        x = x.detach().requires_grad_()
        weight = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(1))
        for scale in (weight, None):
            mine, theirs = rms_norm(x, scale, EPS, impl="triton"), rms_norm_reference(x, scale, EPS)
            torch.testing.assert_close(mine, theirs)
            # A sum's gradient has strides of zero.
            torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (mine, theirs)), atol=1e-5, rtol=1e-5)


def test_the_weights_gradient_does_not_depend_on_the_grid(monkeypatch):
    case = {"rows": 90, "size": 8}
    expected = run(rms_norm_reference, case, inputs(case, torch.float64))[-1]
    for programs in (1, 3, 100):  # one program for all rows, several blocks each, one block each
        monkeypatch.setattr(gpu, "_PROGRAMS_PER_PROCESSOR", programs)
        found, again = (run(rms_norm, case, inputs(case, torch.float32), impl="triton")[-1] for _ in range(2))
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(found, again)


def test_nothing_given_is_written_to():
    x, weight, residual = (part.detach() for part in inputs({"rows": 3, "size": 8, "residual": True}, torch.float32))
    dy, dsummed = torch.ones_like(x), torch.ones_like(x)
    _, summed, rstd = gpu.rms_norm_forward(x, weight, EPS, 0.0, False, residual, torch.float32)
    given = (x, weight, residual, dy, dsummed, summed, rstd)
    before = [t.clone() for t in given]
    gpu.rms_norm_backward(dy, dsummed, summed, weight, rstd, 0.0, False, True)
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))


def test_what_triton_does_not_know_is_left_to_torch():
    for x in (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(1, 16385)):
        assert rms_norm_kernels("triton", x, x[0], None, x.dtype).forward is rms_norm_forward
    x = torch.zeros(1, 16384)
    assert rms_norm_kernels("triton", x, x[0], None, x.dtype).forward is gpu.rms_norm_forward
