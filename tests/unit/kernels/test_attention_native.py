"""Attention in C: against the dense oracle in float64, over every structure that a forest can have, and beside its twin in torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from burnish.kernels import native
from burnish.kernels.attention import eager_attention, forest_attention, forest_attention_reference
from burnish.kernels.attention_cpu import gemm_attention
from burnish.kernels.attention_native import native_attention
from burnish.kernels.forest import Forest

from . import attending
from .attending import assert_no_further, fused, gradients

pytestmark = pytest.mark.skipif(not native.ready(), reason=native.why_not() or "")

BF16, FP32 = torch.bfloat16, torch.float32
inputs = partial(attending.inputs, size=24, dtype=FP32)
FORESTS = {
    "one": ((20,), (-1,)),
    "packed": ((1, 3, 130, 1, 66), (-1,) * 5),
    "pairs": ((50, 30, 21, 70, 33, 2), (-1, 0, 0, -1, 3, 3)),
    "levels": ((41, 30, 20, 33, 27), (-1, 0, 0, 2, 1)),
    "crossed": ((40, 30, 50, 25), (-1, -1, 0, 1)),  # two trees, one within the other's tokens
    "long": ((1100,), (-1,)),  # beyond one piece of work
    "long tree": ((700, 300, 290), (-1, 0, 0)),
    "long crossed": ((600, 200, 300, 150), (-1, -1, 0, 1)),
}


def forest_of(name):
    lengths, parents = FORESTS[name]
    return Forest(tuple(sum(lengths[: i + 1]) for i in range(len(lengths))), parents)


def weight_for(tensors):
    shape = (1, tensors[0].shape[1], tensors[0].shape[2], tensors[2].shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(tensors[0].dtype)


def agree(forest, tensors, **options):
    """Output and gradients of q, k, v (and sinks, where they are a fourth tensor) are those of float64, up to the type's rounding."""
    weight, dtype = weight_for(tensors), tensors[0].dtype

    def ours(*x):
        return native_attention(*x[:3], forest, sinks=x[3] if len(x) > 3 else None, **options)

    def oracle(*x):
        return forest_attention_reference(*x[:3], forest, sinks=x[3] if len(x) > 3 else None, **options)

    truth = gradients(oracle, [x.detach().double().requires_grad_() for x in tensors], weight.double())
    for place, (mine, exact) in enumerate(zip(gradients(ours, tensors, weight), truth, strict=True)):
        assert mine.shape == exact.shape
        bound = 3e-6 if dtype is FP32 else 2**-7 if place < 4 else 2**-5  # of a sink: a sum of rounded outputs, which cancel
        # Where a query sees one key, what comes back to q and k is the difference of equal numbers.
        assert (mine.double() - exact).norm() <= bound * (exact.norm() + 0.1 * exact.numel() ** 0.5), place


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("window", [None, 1, 37, 200])
@pytest.mark.parametrize("name", FORESTS)
def test_it_equals_the_oracle(name, window, dtype):
    forest = forest_of(name)
    agree(forest, inputs(forest.doc_ends[-1], value_size=17, dtype=dtype), window=window, scaling=0.3)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["pairs", "levels", "long tree"])
def test_soft_caps_and_sinks(name, dtype):
    forest = forest_of(name)
    tensors = inputs(forest.doc_ends[-1], dtype=dtype)
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    agree(forest, tensors, softcap=1.5, window=50)
    agree(forest, [*tensors, sinks])
    agree(forest, [*tensors, sinks], softcap=1.5, window=33, scaling=0.5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (8, 1, 128), (4, 4, 7), (160, 1, 8), (2, 2, 1)])
def test_heads_share_keys(heads, kv_heads, size, dtype):
    agree(forest_of("pairs"), inputs(206, heads, kv_heads, size=size, dtype=dtype))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_forest(data):
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=6))
    parents = tuple(data.draw(st.integers(-1, i - 1)) for i in range(len(lengths)))
    forest = Forest(tuple(sum(lengths[: i + 1]) for i in range(len(lengths))), parents)
    window, size = data.draw(st.none() | st.integers(1, 99)), data.draw(st.integers(1, 20))
    agree(forest, inputs(sum(lengths), 4, 2, size=size, dtype=data.draw(st.sampled_from([FP32, BF16]))), window=window)


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_error_is_not_above_that_of_the_others(dtype, strength):
    # Plain attention, torch's fused kernel and the twin, in the same type. `strength` makes probabilities flat or sharp.
    forest = Forest((185, 260, 561), (-1, -1, -1))
    tensors = inputs(561, 9, 3, size=64, dtype=dtype)
    with torch.no_grad():
        for x in tensors[:2]:
            x.mul_(strength**0.5)
    weight = weight_for(tensors)
    truth = gradients(forest_attention_reference, [x.detach().double().requires_grad_() for x in tensors], weight, forest=forest)
    others = [
        gradients(forest_attention, tensors, weight, forest=forest, kind="eager"),
        gradients(fused, tensors, weight, forest=forest),
        gradients(gemm_attention, tensors, weight, forest=forest),
    ]
    ours = gradients(native_attention, tensors, weight, forest=forest)
    assert_no_further(ours, others, truth, dtype)


def test_recomputed_layers_are_bit_equal():
    forest, tensors = forest_of("pairs"), inputs(206, dtype=BF16)

    def again(*x):
        return checkpoint(lambda *y: native_attention(*y, forest), *x, use_reentrant=False)

    once = gradients(native_attention, tensors, weight_for(tensors), forest=forest)
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(again, tensors, weight_for(tensors)), strict=True))


@pytest.mark.parametrize("name", ["packed", "long tree"])
def test_segments_do_not_see_each_other(name):
    """What one tree computes does not depend on its neighbours, to the bit."""
    forest = forest_of(name)
    tensors = inputs(forest.doc_ends[-1], dtype=BF16)
    more = Forest((*forest.doc_ends, forest.doc_ends[-1] + 77), (*forest.parents, -1))
    beside = [torch.cat((x, torch.full_like(x[:, :, :77], 3.0)), dim=2).detach().requires_grad_() for x in tensors]
    alone = gradients(native_attention, tensors, weight_for(tensors), forest=forest)
    together = gradients(native_attention, beside, torch.cat((weight_for(tensors), weight_for(tensors)[:, :, :77]), 2), forest=more)
    assert all(torch.equal(a, b[:, :, : a.shape[2]]) for a, b in zip(alone, together, strict=True))


def test_any_layout_of_the_inputs():
    plain = inputs(206)
    strange = [torch.stack((x.detach(), x.detach()), dim=-1)[..., 0].requires_grad_() for x in plain]
    expanded = [plain[0], *(x.detach()[:, :1].expand(-1, 2, -1, -1).requires_grad_() for x in plain[1:])]
    copied = [x.detach().clone().requires_grad_() for x in expanded]
    assert not any(x.is_contiguous() for x in strange)
    for one, other in ((plain, strange), (expanded, copied)):
        results = (gradients(native_attention, x, weight_for(plain), forest=forest_of("pairs")) for x in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_outputs_and_gradients_lie_as_projections_want_them():
    tensors = inputs(206, dtype=BF16)
    output = native_attention(*tensors, forest_of("pairs"))
    assert all(x.transpose(1, 2).is_contiguous() for x in (output, *torch.autograd.grad(output.sum(), tensors)))


def test_without_gradients_nothing_is_kept():
    tensors = inputs(206)
    with torch.no_grad():
        output = native_attention(*tensors, forest_of("pairs"))
    assert output.grad_fn is None
    assert torch.equal(output, native_attention(*tensors, forest_of("pairs")).detach())


def test_what_is_not_a_number_is_not_hidden():
    q, k, v = (x.detach() for x in inputs(206))
    k[0, :, 60] = float("nan")  # in the second segment, which its child does not exist for
    output = native_attention(q, k, v, forest_of("pairs"))
    assert output[0, :, 60:80].isnan().all() and output[0, :, :50].isfinite().all() and output[0, :, 80:].isfinite().all()


def test_a_single_token_answers_with_its_value():
    q, k, v = inputs(1, 2, 1)
    torch.testing.assert_close(native_attention(q, k, v, Forest((1,), (-1,))), v.expand(1, 2, 1, 24))
    whole = inputs(6, 2, 1)
    torch.testing.assert_close(native_attention(*whole, Forest((6,), (-1,))), eager_attention(*whole, None))


def test_it_is_what_a_cpu_runs(monkeypatch):
    called = []
    monkeypatch.setattr("burnish.kernels.attention.native_attention", lambda *x, **_: called.append(x[0].dtype) or x[0])
    for dtype in (BF16, FP32, torch.float64):
        forest_attention(*(x.to(dtype) for x in inputs(206, 2, 2)), forest_of("pairs"))
    assert called == [BF16, FP32]
