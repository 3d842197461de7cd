"""RMSNorm: against fp64 truth, against the models' own modules, and every gradient."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from burnish.kernels import native
from burnish.kernels.rms_norm import CASES, rms_norm, rms_norm_backward, rms_norm_forward, rms_norm_kernels, rms_norm_reference

EPS = 1e-5
cases = pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])


def inputs(case, dtype, weight_dtype=None, seed=0):
    """(x, weight, residual or None), leaves; the same numbers in every type that holds bf16."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case["rows"], case["size"])
    x, residual = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    weight = (torch.randn(case["size"], generator=generator) * 0.3 + 1 - case.get("offset", 0)).bfloat16()
    parts = (x.to(dtype), weight.to(weight_dtype or dtype), residual.to(dtype) if case.get("residual") else None)
    return tuple(None if part is None else part.requires_grad_() for part in parts)


def flags(case):
    return {key: case[key] for key in ("gemma", "offset", "through") if key in case}


def run(norm, case, parts, **options):
    """Outputs and the gradients of all inputs, under upstream gradients that depend on the shape only."""
    x, weight, residual = parts
    outputs = norm(x, weight, EPS, residual=residual, **flags(case), **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype) for output in outputs]
    leaves = [part for part in parts if part is not None and part.requires_grad]
    tied = [(output, g) for output, g in zip(outputs, upstream, strict=True) if output.requires_grad]
    gradients = torch.autograd.grad([output for output, _ in tied], leaves, [g for _, g in tied])
    return [*(output.detach() for output in outputs), *gradients]


def assert_not_worse(found, plain, truth):
    """Scale-free: no further from the truth than plain torch in the same type, but for a last bit."""
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == true.shape
        if true.numel():
            error, allowed = ((t.double() - true).abs().max().item() for t in (mine, theirs))
            assert error <= 1.05 * allowed + 1e-6 * true.abs().max().item()


@cases
def test_equals_plain_torch_in_double(case):
    parts = inputs(case, torch.float64)
    for mine, theirs in zip(run(rms_norm, case, parts), run(rms_norm_reference, case, parts), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gemma", [False, True])
def test_gradients_are_the_derivatives(gemma):
    case = {"rows": 3, "size": 5, "residual": True, "gemma": gemma, "offset": float(gemma)}
    parts = inputs(case, torch.float64)

    def function(x, weight, residual):
        return rms_norm(x, weight, EPS, residual=residual, **flags(case))

    assert torch.autograd.gradcheck(function, parts)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS, through=True, **flags(case)), parts[:2])
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_reference(x, weight, EPS, **flags(case)), parts[:2])


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_not_above_the_plain_one(case, dtype):
    truth = run(rms_norm_reference, case, inputs(case, torch.float64))
    assert_not_worse(run(rms_norm, case, inputs(case, dtype)), run(rms_norm_reference, case, inputs(case, dtype)), truth)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "out_dtype"),
    [
        (torch.float32, torch.float32, torch.bfloat16),  # full fine-tuning under autocast
        (torch.bfloat16, torch.float32, None),  # norms kept in fp32
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("gemma", [False, True])
def test_mixed_types(dtype, weight_dtype, out_dtype, gemma):
    case = {"rows": 6, "size": 40, "residual": True, "gemma": gemma, "offset": float(gemma)}
    truth = run(rms_norm_reference, case, inputs(case, torch.float64))
    found, plain = (run(norm, case, inputs(case, dtype, weight_dtype), out_dtype=out_dtype) for norm in (rms_norm, rms_norm_reference))
    assert_not_worse(found, plain, truth)


@pytest.mark.parametrize("wide", ["x", "residual"])
def test_the_sum_has_the_wider_type(wide):
    case = {"rows": 4, "size": 16, "residual": True}
    x, weight, residual = inputs(case, torch.float32)
    narrow = (residual if wide == "x" else x).detach().bfloat16().requires_grad_()
    parts = (x, weight, narrow) if wide == "x" else (narrow, weight, residual)
    found, plain = run(rms_norm, case, parts), run(rms_norm_reference, case, parts)
    for mine, theirs in zip(found, plain, strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs)


MODULES = {
    "llama": (LlamaRMSNorm, {}),
    "gemma2": (Gemma2RMSNorm, {"gemma": True, "offset": 1.0}),
    "gemma3": (Gemma3RMSNorm, {"gemma": True, "offset": 1.0}),
    "olmo2": (Olmo2RMSNorm, {"gemma": True}),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_equal_the_models_own(name, dtype):
    kind, options = MODULES[name]
    module = kind(576, EPS).to(dtype)
    with torch.no_grad():
        module.weight.add_(torch.randn(576, generator=torch.Generator().manual_seed(3)) * 0.2)
    x = torch.randn(2, 9, 576, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = rms_norm(x, module.weight, EPS, impl="torch", **options)
    assert found.dtype is dtype
    assert torch.equal(found, module(x))


@pytest.mark.parametrize("name", MODULES)
def test_whatever_runs_here_stays_as_near_to_the_truth_as_the_model(name):
    kind, options = MODULES[name]
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    module = kind(64, EPS).bfloat16()
    truth = rms_norm_reference(x.double(), module.weight.double(), EPS, **options)
    assert_not_worse([rms_norm(x, module.weight, EPS, **options).detach()], [module(x).detach()], [truth.detach()])


def test_strided_rows_are_read_where_they_lie():
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(1, 5, 4, 24, generator=generator, dtype=torch.float64)
    weight = torch.rand(8, generator=generator, dtype=torch.float64)
    for x in (fused[..., 8:16], fused[..., 8:16].transpose(1, 2), fused[..., ::3], fused[:, :1, :1, :8].expand(1, 5, 4, 8)):
        x = x.detach().requires_grad_()
        y = rms_norm(x, weight, EPS)
        assert y.shape == x.shape
        torch.testing.assert_close(y, rms_norm_reference(x, weight, EPS))
        # A sum's gradient is one number, seen everywhere: strides of zero.
        (mine,), (theirs,) = (torch.autograd.grad(norm(x, weight, EPS).sum(), x) for norm in (rms_norm, rms_norm_reference))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_frozen_inputs_get_no_gradient(trained):
    case = {"rows": 4, "size": 8, "residual": True}
    parts = [part.detach().requires_grad_(wanted) for part, wanted in zip(inputs(case, torch.float64), trained, strict=True)]
    for mine, theirs in zip(run(rms_norm, case, parts), run(rms_norm_reference, case, parts), strict=True):
        torch.testing.assert_close(mine, theirs)
    _, summed = rms_norm(parts[0], parts[1], EPS, residual=parts[2])
    assert summed.requires_grad == (trained[0] or trained[2])


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("second", ["residual", "through"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_output_alone_may_be_used(used, second, dtype):
    parts = inputs({"rows": 4, "size": 8, "residual": second == "residual"}, dtype)
    leaves = [part for part in parts if part is not None]
    for norm in (rms_norm, rms_norm_reference):
        norm(parts[0], parts[1], EPS, residual=parts[2], through=second == "through")[used].square().sum().backward()
        found = [torch.zeros_like(part) if part.grad is None else part.grad.clone() for part in leaves]
        if norm is rms_norm:
            mine = found
        for part in leaves:
            part.grad = None
    for a, b in zip(mine, found, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}))


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_x_goes_through_without_a_copy_and_its_gradients_meet_in_one_node(impl):
    x, weight, _ = inputs({"rows": 4, "size": 8}, torch.float32)
    above = x * 2
    y, same = rms_norm(above, weight, EPS, through=True, impl=impl)
    assert same.data_ptr() == above.data_ptr()
    assert same.grad_fn is y.grad_fn  # so `above` is used once, and autograd has nothing to add to it
    assert torch.equal(rms_norm(above, weight, EPS, impl=impl), y)
    with torch.no_grad():
        assert torch.equal(rms_norm(above, weight, EPS, through=True, impl=impl)[1], above)


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_a_frozen_x_goes_through(trained):
    case = {"rows": 4, "size": 8, "through": True}
    x, weight, _ = inputs(case, torch.float64)
    parts = (x.detach().requires_grad_(trained[0]), weight.detach().requires_grad_(trained[1]), None)
    for mine, theirs in zip(run(rms_norm, case, parts), run(rms_norm_reference, case, parts), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert rms_norm(parts[0], parts[1], EPS, through=True)[1].requires_grad == trained[0]


def test_native_adds_a_narrower_residual(monkeypatch):
    """The residual stream in fp32 and a branch in bf16, as under autocast."""
    if not native.ready():
        pytest.skip("no compiler")
    x, weight, residual = inputs({"rows": 4, "size": 8, "residual": True}, torch.float32)
    calls = []
    right = native.rms_norm_forward
    monkeypatch.setattr(native, "rms_norm_forward", lambda *given: calls.append(1) or right(*given))
    _, summed = rms_norm(x.detach().bfloat16(), weight, EPS, residual=residual)
    assert calls == [1]
    assert torch.equal(summed, x.bfloat16() + residual)


def test_without_a_weight():
    (x, _, _) = inputs({"rows": 4, "size": 8}, torch.float64)
    for gemma in (False, True):
        y = rms_norm(x, None, EPS, gemma=gemma)
        torch.testing.assert_close(y, rms_norm_reference(x, None, EPS, gemma=gemma))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, EPS), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_given_is_written_to(dtype):
    x, weight, residual = (part.detach() for part in inputs({"rows": 3, "size": 8, "residual": True}, dtype))
    dy, dsummed = torch.ones_like(x), torch.ones_like(x)
    _, summed, rstd = rms_norm_forward(x, weight, EPS, 0.0, False, residual, dtype)
    given = (x, weight, residual, dy, dsummed, summed, rstd)
    before = [t.clone() for t in given]
    rms_norm_forward(x, weight, EPS, 1.0, True, None, dtype)
    rms_norm_backward(dy, dsummed, summed, weight, rstd, 0.0, False, True)
    rms_norm_backward(dy, None, summed, None, rstd, 0.0, False, False)
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))


def test_little_is_saved():
    x, weight, residual = inputs({"rows": 6, "size": 32, "residual": True}, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS, residual=residual)
    assert sorted((t.numel(), t.dtype) for t in saved) == sorted([(192, x.dtype), (32, x.dtype), (6, torch.float32)])


def test_autocast_changes_nothing():
    case = {"rows": 5, "size": 16}
    parts = inputs(case, torch.float32)
    before = run(rms_norm, case, parts)
    with torch.autocast("cpu", torch.bfloat16):
        after = run(rms_norm, case, parts)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_native_takes_what_it_knows(monkeypatch):
    mine = (lambda *_: None, lambda *_: None)
    monkeypatch.setattr(native, "rms_norm_forward", mine[0], raising=False)
    monkeypatch.setattr(native, "rms_norm_backward", mine[1], raising=False)
    torch_kernels = (rms_norm_forward, rms_norm_backward)
    for dtype, expected in ((torch.bfloat16, mine), (torch.float32, mine), (torch.float16, torch_kernels), (torch.float64, torch_kernels)):
        x = torch.zeros(2, 4, dtype=dtype)
        assert rms_norm_kernels("native", x, x[0], None, dtype) == expected
        assert rms_norm_kernels("native", x, None, None, dtype) == torch_kernels
        assert rms_norm_kernels("torch", x, x[0], x, dtype) == torch_kernels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.ones(3)}, "needs a weight of that size"),
        ({"residual": torch.ones(3, 4)}, "differ in shape"),
        ({"offset": 1.0}, "gemma=True"),
        ({"impl": "cobol"}, "cobol"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    weight = options.pop("weight", torch.ones(4))
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(2, 4), weight, EPS, **options)
