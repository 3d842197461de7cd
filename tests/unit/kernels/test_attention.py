"""Forest attention: every path against a dense softmax written out token by token, with gradients, trees, windows and grouped heads."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import ModelError
from burnish.kernels import attention, native
from burnish.kernels.attention import Forest, causal_mask, eager_attention, forest_attention, forest_attention_reference

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.ready(), reason=native.why_not() or ""))
ROOTS = Forest((4, 5, 12), (-1, -1, -1))
TREE = Forest((4, 7, 9, 12), (-1, 0, 0, 2))  # a prompt, two children, and a grandchild of the second


def qkv(total=12, heads=4, kv_heads=2, size=8, dtype=torch.float64, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, total, size), (1, kv_heads, total, size), (1, kv_heads, total, size))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def ancestors(forest, segment):
    return [] if segment < 0 else [*ancestors(forest, forest.parents[segment]), segment]


def naive(q, k, v, forest, window=None, softcap=None, sinks=None, scaling=None):
    """One query token at a time, from the definition."""
    starts = (0, *forest.doc_ends)
    out = torch.zeros(q.shape[1], q.shape[2], v.shape[3], dtype=q.dtype)
    groups = q.shape[1] // k.shape[1]
    rows = []
    for segment in range(len(forest.parents)):
        chain = [t for s in ancestors(forest, segment) for t in range(starts[s], starts[s + 1])]
        for token in range(starts[segment], starts[segment + 1]):
            seen = chain[: chain.index(token) + 1][-(window or len(chain)) :]
            for h in range(q.shape[1]):
                scores = (k[0, h // groups, seen] @ q[0, h, token]) * (scaling or 1 / math.sqrt(q.shape[3]))
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    p = torch.softmax(torch.cat([scores, sinks[h : h + 1]]), 0)[:-1]
                else:
                    p = torch.softmax(scores, 0)
                rows.append((h, token, p @ v[0, h // groups, seen]))
    index = {(h, t): row for h, t, row in rows}
    out = torch.stack([torch.stack([index[h, t] for t in range(q.shape[2])]) for h in range(q.shape[1])])
    return out[None]


def compare(forest, kinds=("reference", "eager", "sdpa", "gemm", "cascade"), **options):
    q, k, v = qkv(forest.doc_ends[-1])
    expected = naive(q, k, v, forest, **options)
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(9))
    truth = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for kind in kinds:
        function = forest_attention_reference if kind == "reference" else partial(forest_attention, kind=kind)
        found = function(q, k, v, forest, **options)
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), truth, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("forest", [ROOTS, TREE], ids=["roots", "tree"])
def test_every_path_equals_the_definition(forest, window):
    compare(forest, window=window)


def test_roots_of_one_length_as_a_batch():
    forest = Forest((4, 8, 12), (-1, -1, -1))
    assert forest.uniform and not ROOTS.uniform and not TREE.uniform and not Forest((4, 8), (-1, 0)).uniform
    (q, k, v), weight = qkv(12), torch.randn(1, 4, 12, 8, dtype=torch.float64)
    found, expected = attention._batched(q, k, v, forest, 0.3, 0.0), naive(q, k, v, forest, scaling=0.3)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("forest", [ROOTS, TREE], ids=["roots", "tree"])
def test_soft_cap_scaling_and_sinks(forest):
    compare(forest, kinds=("reference", "eager", "gemm", "auto"), softcap=2.0, scaling=0.3, window=3)
    sinks = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=torch.float64)
    compare(forest, kinds=("reference", "eager", "gemm", "cascade", "auto"), sinks=sinks, scaling=0.3)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_forest(data):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    parents = tuple(data.draw(st.integers(-1, i - 1)) for i in range(len(lengths)))
    ends = tuple(sum(lengths[: i + 1]) for i in range(len(lengths)))
    compare(Forest(ends, parents), window=data.draw(st.none() | st.integers(1, 6)))


def test_long_window_in_blocks():
    # Longer than one block of queries, so the band is cut in pieces. (Beyond the definition's reach: the oracle is the dense mask.)
    forest = Forest((300, 700), (-1, 0))
    q, k, v = qkv(700, heads=2, kv_heads=1, size=4)
    for window in (7, 150, 299):
        truth = forest_attention_reference(q, k, v, forest, window=window)
        for kind in ("sdpa", "gemm", "cascade"):
            torch.testing.assert_close(forest_attention(q, k, v, forest, kind=kind, window=window), truth)


@pytest.mark.parametrize("kind", ["eager", "sdpa", NATIVE, "gemm", "cascade"])
def test_segments_do_not_see_each_other(kind):
    q, k, v = qkv(dtype=torch.float32, grad=False)
    before = forest_attention(q, k, v, ROOTS, kind=kind)
    k[:, :, :4] += 1
    v[:, :, :4] -= 1
    after = forest_attention(q, k, v, ROOTS, kind=kind)
    assert torch.equal(before[:, :, 4:], after[:, :, 4:])
    assert not torch.equal(before[:, :, :4], after[:, :, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_error_is_not_far_above_the_plain_one(dtype):
    forest = Forest((300, 700), (-1, -1))
    truth = forest_attention_reference(*qkv(700, grad=False), forest)
    inputs = qkv(700, dtype=dtype, grad=False)
    kinds = ("eager", "sdpa", "gemm", "cascade", *(["native"] if native.ready() else []))
    errors = {kind: (forest_attention(*inputs, forest, kind=kind).double() - truth).abs().max() for kind in kinds}
    assert max(errors[kind] for kind in kinds) < 2 * errors["eager"] + 1e-6


@pytest.mark.parametrize("kind", ["auto", "eager", "sdpa", NATIVE, "gemm", "cascade"])
def test_under_autocast_its_type_is_taken(kind):
    forest, inputs = Forest((60, 160), (-1, 0)), qkv(160, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forest_attention(*inputs, forest, kind=kind)
        gradients = torch.autograd.grad(found.float().sum(), inputs)
    assert found.dtype is torch.bfloat16
    assert all(x.dtype is torch.float32 for x in gradients)
    truth = forest_attention_reference(*(x.detach() for x in inputs), forest)
    torch.testing.assert_close(found.float(), truth, rtol=0.02, atol=0.02)


def test_mask_without_forest_is_aligned_at_the_last_key():
    q, k, v = qkv(6, grad=False)
    whole = eager_attention(q, k, v, None)
    torch.testing.assert_close(eager_attention(q[:, :, 4:], k, v, None), whole[:, :, 4:])
    assert causal_mask(2, 4, 2, torch.device("cpu")).tolist() == [[False, True, True, False], [False, False, True, True]]


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = qkv(grad=False)
    v = torch.ones_like(v)
    mean = torch.stack([forest_attention(q, k, v, ROOTS, kind="sdpa", dropout=0.5) for _ in range(300)]).mean()
    assert mean.item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("ends", "parents", "message"),
    [((3,), (), "1 segments but 0 parents"), ((3, 5), (-1, 1), "stand before"), ((3, 3), (-1, -1), "empty")],
)
def test_impossible_forests_are_refused(ends, parents, message):
    with pytest.raises(ValueError, match=message):
        Forest(ends, parents)


def test_forest_knows_its_shape():
    assert TREE.lengths == (4, 3, 2, 3)
    assert TREE.chain(3) == [0, 2, 3]
    assert TREE.is_tree
    assert not ROOTS.is_tree
    assert ROOTS.cumulative(torch.device("cpu")).tolist() == [0, 4, 5, 12]
    assert ROOTS.cumulative(torch.device("cpu")) is ROOTS.cumulative(torch.device("cpu"))


@pytest.mark.parametrize("length", [20, 800])
def test_half_precision_keeps_its_type_whatever_it_is_computed_in(length):
    q, k, v = qkv(length, dtype=torch.bfloat16)
    forest = Forest((length,), (-1,))
    output = forest_attention(q, k, v, forest, kind="sdpa")
    output.sum().backward()
    assert output.dtype is q.grad.dtype is torch.bfloat16
    truth = forest_attention(q.detach().double(), k.detach().double(), v.detach().double(), forest, kind="eager")
    torch.testing.assert_close(output.double(), truth, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("kind", "forest", "options", "message"),
    [
        ("sdpa", ROOTS, {"softcap": 2.0}, "'sdpa' does not know soft caps"),
        ("varlen", TREE, {"dropout": 0.1}, "'varlen' does not know dropout or shared prompts or tensors on cpu"),
        ("gemm", TREE, {"dropout": 0.1, "softcap": 2.0}, "'gemm' does not know dropout$"),
        ("cascade", TREE, {"dropout": 0.1, "softcap": 2.0}, "'cascade' does not know dropout or soft caps$"),
        ("flex", ROOTS, {}, "'flex' is not available, expected one of auto, cascade, eager, gemm, native, sdpa, varlen"),
    ],
)
def test_what_a_named_implementation_cannot_do_is_refused(kind, forest, options, message):
    with pytest.raises(ModelError, match=message):
        forest_attention(*qkv(), forest, kind=kind, **options)
