"""Attention in tiles of matrix products: against the dense oracle, in every type, with every structure that a forest can have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from burnish.kernels import attention_cpu
from burnish.kernels.attention import eager_attention, forest_attention, forest_attention_reference
from burnish.kernels.attention_cpu import gemm_attention, tiles
from burnish.kernels.forest import Forest

from .attending import assert_no_further, fused, gradients, inputs

FORESTS = {
    "one": Forest((20,), (-1,)),
    "packed": Forest((1, 4, 17, 18, 30), (-1,) * 5),
    "pairs": Forest((5, 8, 10, 13, 20, 21), (-1, 0, 0, -1, 3, 3)),
    "group": Forest((9, 10, 13, 21, 22), (-1, 0, 0, 0, 0)),
    "levels": Forest((4, 7, 9, 12, 15), (-1, 0, 0, 2, 1)),
}


def agree(forest, tensors, block=None, keep=256, **options):
    def ours(*x):
        return gemm_attention(*x[:3], forest, block=block, keep=keep, sinks=x[3] if len(x) > 3 else None, **options)

    def oracle(*x):
        return forest_attention_reference(*x[:3], forest, sinks=x[3] if len(x) > 3 else None, **options)

    weight = torch.randn(1, tensors[0].shape[1], tensors[0].shape[2], tensors[2].shape[3], generator=torch.Generator().manual_seed(5))
    for mine, theirs in zip(gradients(ours, tensors, weight), gradients(oracle, tensors, weight), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("keep", [0, 256])
@pytest.mark.parametrize("window", [None, 1, 4, 19])
@pytest.mark.parametrize("name", FORESTS)
def test_it_equals_the_oracle(name, window, keep):
    forest = FORESTS[name]
    tensors = inputs(forest.doc_ends[-1], value_size=5)
    for block in (3, 8, 64):
        agree(forest, tensors, block, keep, window=window, scaling=0.4)


@pytest.mark.parametrize("keep", [0, 256])
@pytest.mark.parametrize("name", FORESTS)
def test_soft_caps_and_sinks(name, keep):
    forest = FORESTS[name]
    tensors = inputs(forest.doc_ends[-1])
    sinks = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for block in (4, 64):
        agree(forest, tensors, block, keep, softcap=1.5, window=5)
        agree(forest, [*tensors, sinks], block, keep)
        agree(forest, [*tensors, sinks], block, keep, softcap=1.5, window=3, scaling=2.0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1), (4, 4)])
def test_heads_share_keys(heads, kv_heads):
    forest = FORESTS["pairs"]
    agree(forest, inputs(21, heads, kv_heads), block=4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_forest(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    parents = tuple(data.draw(st.integers(-1, i - 1)) for i in range(len(lengths)))
    forest = Forest(tuple(sum(lengths[: i + 1]) for i in range(len(lengths))), parents)
    window = data.draw(st.none() | st.integers(1, 9))
    block, keep = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([0, 6, 99]))
    agree(forest, inputs(sum(lengths), 2, 1, 4), block, keep, window=window)


@pytest.mark.parametrize("name", ["packed", "levels"])
def test_gradients_by_finite_differences(name):
    forest = FORESTS[name]
    total = forest.doc_ends[-1]
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    q, k, v = inputs(total, 2, 1, 3, 2)

    def function(q, k, v, sinks):
        return gemm_attention(q, k, v, forest, window=7, softcap=3.0, sinks=sinks, block=4)

    assert torch.autograd.gradcheck(function, (q, k, v, sinks), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: gemm_attention(*x, forest, block=4), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_not_above_that_of_the_others(dtype, strength):
    # The others: plain attention and torch's fused kernel, in the same type. Real lengths and head sizes; `strength` makes probabilities
    # flat or sharp.
    forest = Forest((185, 260, 561), (-1, -1, -1))
    tensors = inputs(561, 9, 3, 64, dtype=dtype)
    with torch.no_grad():
        for x in tensors[:2]:
            x.mul_(strength**0.5)
    weight = torch.randn(1, 9, 561, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    truth = gradients(forest_attention_reference, [x.detach().double().requires_grad_() for x in tensors], weight, forest=forest)
    others = [gradients(forest_attention, tensors, weight, forest=forest, kind="eager"), gradients(fused, tensors, weight, forest=forest)]
    for keep in (0, 256):
        ours = gradients(gemm_attention, tensors, weight, forest=forest, keep=keep)
        assert_no_further(ours, others, truth, dtype)


def test_without_bf16_instructions_it_computes_in_fp32(monkeypatch):
    forest, tensors = FORESTS["levels"], inputs(15, dtype=torch.bfloat16)
    monkeypatch.setattr(attention_cpu, "cpu_has_fast_bf16", lambda: False)
    found = gemm_attention(*tensors, forest)
    wide = forest_attention_reference(*(x.detach().float() for x in tensors), forest)
    torch.testing.assert_close(found, wide.bfloat16(), rtol=2**-7, atol=1e-6)


def test_recomputed_layers_are_bit_equal():
    forest, tensors = FORESTS["pairs"], inputs(21, dtype=torch.bfloat16)
    weight = torch.randn(1, 6, 21, 8)

    def again(*x):
        return checkpoint(lambda *y: gemm_attention(*y, forest), *x, use_reentrant=False)

    once = gradients(gemm_attention, tensors, weight, forest=forest)
    twice = gradients(again, tensors, weight)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 2**-9)])
def test_kept_probabilities_are_the_computed_ones(dtype, tolerance):
    # Those of bf16 are kept in fp16, so now and then a product is rounded the other way.
    forest, tensors = Forest((100, 230, 300), (-1, 0, 0)), inputs(300, 9, 3, 16, dtype=dtype)
    weight = torch.randn(1, 9, 300, 16, generator=torch.Generator().manual_seed(5))
    kept, computed = (gradients(gemm_attention, tensors, weight, forest=forest, keep=keep) for keep in (999, 0))
    assert torch.equal(kept[0], computed[0])
    for a, b in zip(kept[1:], computed[1:], strict=True):
        assert (a - b).abs().mean() <= tolerance * b.abs().mean()


def test_two_threads_compute_the_same():
    forest, tensors = Forest((100, 230, 300), (-1, 0, 0)), inputs(300, 9, 3, 16, dtype=torch.float32)
    weight, threads = torch.randn(1, 9, 300, 16), torch.get_num_threads()
    alone = gradients(gemm_attention, tensors, weight, forest=forest)
    try:
        torch.set_num_threads(2)
        both = gradients(gemm_attention, tensors, weight, forest=forest)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b)


def test_any_layout_of_the_inputs():
    forest = FORESTS["group"]
    plain = inputs(22, dtype=torch.float32)
    strange = [torch.stack((x.detach(), x.detach()), dim=-1)[..., 0].requires_grad_() for x in plain]
    assert not any(x.is_contiguous() for x in strange)
    weight = torch.randn(1, 6, 22, 8).transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(*(gradients(gemm_attention, x, weight, forest=forest) for x in (plain, strange)), strict=True):
        assert torch.equal(a, b)


def test_outputs_and_gradients_lie_as_projections_want_them():
    tensors = inputs(21, dtype=torch.bfloat16)
    output = gemm_attention(*tensors, FORESTS["pairs"])
    (dq,) = torch.autograd.grad(output.sum(), tensors[0])
    assert output.transpose(1, 2).is_contiguous()
    assert dq.transpose(1, 2).is_contiguous()


def test_without_gradients_nothing_is_kept():
    tensors = inputs(21)
    with torch.no_grad():
        output = gemm_attention(*tensors, FORESTS["pairs"])
    assert output.grad_fn is None
    torch.testing.assert_close(output, gemm_attention(*tensors, FORESTS["pairs"]).detach())


def test_only_what_is_asked_for_is_differentiated():
    q, k, v = (x.detach() for x in inputs(21))
    v.requires_grad_()
    gemm_attention(q, k, v, FORESTS["pairs"]).sum().backward()
    truth = forest_attention_reference(q, k, v, FORESTS["pairs"])
    torch.testing.assert_close(v.grad, torch.autograd.grad(truth.sum(), v)[0])


def test_tiles_hold_every_query_once_and_no_needless_key():
    forest = Forest((200, 230, 231, 261, 761), (-1, -1, -1, 0, 0))
    plan = tiles(forest, None, 128)
    assert [(t.queries.start, t.queries.stop) for t in plan][:3] == [(0, 100), (100, 200), (200, 231)]
    assert [t.pieces for t in plan] == [(100,), (100,), (30, 1), (30,), (125,), (125,), (125,), (125,)]
    assert plan[3].keys == (slice(0, 200), slice(231, 261))
    assert plan[5].keys == (slice(0, 200), slice(261, 511))
    assert all(t.width == sum(rows.stop - rows.start for rows in t.keys) for t in plan)
    narrow = tiles(forest, 20, 128)
    assert narrow[1].keys == (slice(81, 200),)
    assert narrow[3].keys == (slice(181, 200), slice(231, 261))
    assert narrow[-1].keys == (slice(617, 761),)


def test_a_single_token_answers_with_its_value():
    q, k, v = inputs(1, 2, 1)
    torch.testing.assert_close(gemm_attention(q, k, v, Forest((1,), (-1,))), v.expand(1, 2, 1, 8))
    whole = inputs(6, 2, 1)
    torch.testing.assert_close(gemm_attention(*whole, Forest((6,), (-1,))), eager_attention(*whole, None))
