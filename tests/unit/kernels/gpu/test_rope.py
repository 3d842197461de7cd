"""Rotary embedding in Triton, under its interpreter: the same numbers as torch's, no further from the truth."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels.gpu.rope import rope_apply
from burnish.kernels.rope import CASES, rope, rope_reference
from burnish.kernels.rope import rope_apply as torch_apply

MORE = [
    ("many heads", {"batch": 1, "heads": 9, "kv_heads": 5, "tokens": 3, "size": 8}),
    ("wide", {"batch": 1, "heads": 1, "kv_heads": 1, "tokens": 20, "size": 256}),
]


def inputs(case, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((case["batch"], case["tokens"], case[heads], case["size"]) for heads in ("heads", "kv_heads"))
    q, k = (torch.randn(shape, generator=generator).bfloat16().to(dtype).transpose(1, 2) for shape in shapes)
    angles = torch.rand(case.get("tables", 1), case["tokens"], case.get("rotary", case["size"]) // 2, generator=generator) * 6
    cos, sin = (f(torch.cat((angles, angles), dim=-1)).mul(1.1).bfloat16().to(dtype) for f in (torch.cos, torch.sin))
    return q.requires_grad_(), k.requires_grad_(), cos, sin


def run(function, parts, **options):
    outputs = function(*parts, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype) for output in outputs]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, parts[:2], upstream)]


@pytest.mark.parametrize("case", [case for _, case in (*CASES, *MORE)], ids=[name for name, _ in (*CASES, *MORE)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_is_not_above_the_plain_one(case, dtype):
    truth = run(rope_reference, inputs(case, torch.float64))
    found, plain = run(rope, inputs(case, dtype), impl="triton"), run(rope_reference, inputs(case, dtype))
    for mine, theirs, true in zip(found, plain, truth, strict=True):
        assert mine.dtype is theirs.dtype and mine.shape == true.shape
        if true.numel():
            error, allowed = ((t.double() - true).abs().max().item() for t in (mine, theirs))
            assert error <= 1.05 * allowed + 1e-6 * true.abs().max().item()


def test_bf16_runs_with_wide_tables_too():
    q, k, cos, sin = inputs(CASES[0][1], torch.bfloat16)
    truth = run(rope_reference, tuple(t.detach().double().requires_grad_() for t in (q, k, cos, sin)))
    for tables in ((cos, sin), (cos.float(), sin.float())):
        for mine, true in zip(run(rope, (q, k, *tables), impl="triton"), truth, strict=True):
            assert mine.dtype is torch.bfloat16
            assert (mine.double() - true).abs().max() <= 0.02 * true.abs().max()  # the interpreter cuts off where a GPU rounds


def test_tables_with_different_halves():
    q, k, cos, sin = inputs(CASES[2][1], torch.float32)
    cos, sin = (torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) for i, t in enumerate((cos, sin)))
    for mine, theirs in zip(run(rope, (q, k, cos, sin), impl="triton"), run(rope_reference, (q, k, cos, sin)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("rotary", [8, 6])
def test_in_place(rotary):
    q, k, cos, sin = inputs({"batch": 1, "heads": 5, "kv_heads": 2, "tokens": 5, "size": 8, "rotary": rotary}, torch.float32)
    mine = q * 1, k * 1
    outputs = rope(*mine, cos, sin, inplace=True, impl="triton")
    assert [x.data_ptr() for x in outputs] == [x.data_ptr() for x in mine]
    expected = rope(q, k, cos, sin, impl="triton")
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)
    mine, theirs = (torch.autograd.grad(sum(x.square().sum() for x in y), (q, k)) for y in (outputs, expected))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_in_place_where_it_is_not_safe_is_an_error():
    q, k, cos, sin = inputs(CASES[0][1], torch.float32)
    saved = q.exp()  # whose backward pass needs its own result; the kernel's write is counted although torch did not see it
    rotated, _ = rope(saved, k * 1, cos, sin, inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated.sum().backward()


def test_odd_strides_and_one_of_the_two_alone():
    q, k, cos, sin = inputs({"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 5, "size": 8}, torch.float32)
    for change in (lambda x: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2), lambda x: x.detach()[:, :1].expand_as(x)):
        parts = (change(q).requires_grad_(), change(k).requires_grad_(), cos, sin)
        torch.testing.assert_close(run(rope, parts, impl="triton"), run(rope_reference, parts))
        for used in (0, 1):
            mine = torch.autograd.grad(rope(*parts, impl="triton")[used].sum(), parts[used])
            torch.testing.assert_close(mine, torch.autograd.grad(rope_reference(*parts)[used].sum(), parts[used]))


@pytest.mark.parametrize("inverse", [False, True])
def test_raw_function(inverse):
    q, _, cos, sin = (t.detach() for t in inputs(CASES[2][1], torch.float32))
    y = rope_apply(q, cos[0], sin[0], inverse)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch_apply(q, cos[0], sin[0], inverse))
    assert torch.equal(rope_apply(q, cos[0], sin[0], inverse, q), y) and torch.equal(q, y)
