"""Merged parts: the algebra and the plumbing in plain torch, against the dense oracle. tests/gpu runs the same with flash attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from burnish.kernels import attention_tree
from burnish.kernels.attention import eager_attention, forest_attention_reference
from burnish.kernels.attention_tree import part_backward_reference, part_reference, parts, tree_attention
from burnish.kernels.forest import Forest

from .attending import gradients, inputs

CPU = torch.device("cpu")
FORESTS = {
    "packed": Forest((1, 4, 17, 18), (-1,) * 4),
    "pairs": Forest((5, 8, 10, 13, 20, 21), (-1, 0, 0, -1, 3, 3)),
    "group": Forest((9, 10, 13, 21, 22), (-1, 0, 0, 0, 0)),
    "levels": Forest((4, 7, 9, 12, 15, 16), (-1, 0, 0, 2, 1, 3)),
}


def agree(forest, tensors, **options):
    def run(function):
        return lambda *x: function(*x[:3], forest, sinks=x[3] if len(x) > 3 else None, **options)

    weight = torch.randn(1, tensors[0].shape[1], tensors[0].shape[2], tensors[2].shape[3], generator=torch.Generator().manual_seed(5))
    ours, oracle = (gradients(run(f), tensors, weight) for f in (tree_attention, forest_attention_reference))
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("window", [None, 1, 4, 8, 99])
@pytest.mark.parametrize("name", FORESTS)
def test_it_equals_the_oracle(name, window):
    forest = FORESTS[name]
    total = forest.doc_ends[-1]
    sinks = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    agree(forest, inputs(total, value_size=5), window=window, scaling=0.4)
    agree(forest, [*inputs(total), sinks], window=window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1), (4, 4)])
def test_heads_share_keys(heads, kv_heads):
    agree(FORESTS["levels"], inputs(16, heads, kv_heads))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_forest(data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    parents = tuple(data.draw(st.integers(-1, i - 1)) for i in range(len(lengths)))
    forest = Forest(tuple(sum(lengths[: i + 1]) for i in range(len(lengths))), parents)
    agree(forest, inputs(sum(lengths), 2, 1, 4), window=data.draw(st.none() | st.integers(1, 9)))


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_by_finite_differences(window):
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def function(q, k, v, sinks):
        return tree_attention(q, k, v, FORESTS["levels"], window=window, sinks=sinks)

    assert torch.autograd.gradcheck(function, (*inputs(16, 2, 1, 3, 2), sinks), fast_mode=True)


def test_one_part_is_ordinary_attention():
    # part_reference against autograd's own backward of eager attention.
    q, k, v = inputs(7, 4, 2)
    (part,) = parts(Forest((7,), (-1,)), None, CPU)
    output, lse = part_reference(*(x[0].transpose(0, 1).detach() for x in (q, k, v)), part, 8**-0.5)
    truth = eager_attention(q, k, v, None)
    torch.testing.assert_close(output, truth[0].transpose(0, 1).detach())
    assert lse.shape == (4, 7)
    grad = torch.randn(7, 4, 8, dtype=torch.float64)
    flat = [x[0].transpose(0, 1).detach() for x in (q, k, v)]
    shares = part_backward_reference(grad, *flat, output, lse, part, 8**-0.5)
    wanted = torch.autograd.grad((truth[0].transpose(0, 1) * grad).sum(), (q, k, v))
    for mine, theirs in zip(shares, wanted, strict=True):
        torch.testing.assert_close(mine, theirs[0].transpose(0, 1))


def test_a_prompt_is_one_sequence_of_keys_for_all_its_answers():
    itself, roots, deeper, deepest = parts(FORESTS["levels"], None, CPU)
    assert itself.queries is itself.keys is None
    assert itself.causal
    assert itself.ends[0].tolist() == [0, 4, 7, 9, 12, 15, 16]
    assert roots.keys.tolist() == [0, 1, 2, 3]
    assert roots.queries.tolist() == list(range(4, 16))
    assert [x.tolist() for x in roots.ends] == [[0, 12], [0, 4]]
    assert deeper.keys.tolist() == [4, 5, 6, 7, 8]  # the children, with what continues each
    assert deeper.queries.tolist() == [12, 13, 14, 9, 10, 11, 15]
    assert [x.tolist() for x in deeper.ends] == [[0, 3, 7], [0, 3, 5]]
    assert deepest.keys.tolist() == [9, 10, 11]
    assert deepest.longest == (1, 3)
    assert not any(part.causal for part in (roots, deeper, deepest))


def test_a_window_takes_chains_and_no_more_of_them_than_is_seen():
    (part,) = parts(FORESTS["pairs"], 3, CPU)
    assert part.window == 3
    assert part.causal
    assert part.keys.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 3, 4, 8, 9, 10, 11, 12, 11, 12, 13, 14, 15, 16, 17, 18, 19, 11, 12, 20]
    assert part.ends[1].tolist() == [0, 5, 10, 14, 17, 26, 29]
    taken = [part.keys[chosen].tolist() for chosen in part.rounds]
    assert [len(set(x)) for x in taken] == [len(x) for x in taken] == [21, 4, 4]
    assert sorted(key for keys in taken for key in keys) == sorted(part.keys.tolist())


def test_a_window_beyond_the_longest_chain_is_none():
    found, expected = parts(FORESTS["pairs"], 12, CPU), parts(FORESTS["pairs"], None, CPU)
    assert [part.window for part in found] == [part.window for part in expected] == [None] * len(expected)
    assert all(a.keys is b.keys is None or torch.equal(a.keys, b.keys) for a, b in zip(found, expected, strict=True))
    assert len(parts(FORESTS["packed"], 3, CPU)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_error_is_not_above_the_plain_one(dtype, window):
    forest = Forest((100, 160, 230, 250), (-1, 0, 0, 2))
    tensors = inputs(250, 6, 2, 32, dtype=dtype)
    weight = torch.randn(1, 6, 250, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    truth = gradients(forest_attention_reference, doubles, weight, forest=forest, window=window)
    plain = gradients(forest_attention_reference, tensors, weight, forest=forest, window=window)
    ours = gradients(tree_attention, tensors, weight, forest=forest, window=window)
    more = 1.5 if dtype is torch.float32 else 1.05  # merging rounds once more per part, which shows where the result is kept as exactly
    for mine, theirs, exact in zip(ours, plain, truth, strict=True):
        assert mine.dtype is dtype
        assert (mine - exact).abs().mean() <= more * (theirs - exact).abs().mean()


def test_recomputed_layers_are_bit_equal():
    forest, tensors = FORESTS["pairs"], inputs(21, dtype=torch.bfloat16)
    weight = torch.randn(1, 6, 21, 8)

    def again(*x):
        return checkpoint(lambda *y: tree_attention(*y, forest), *x, use_reentrant=False)

    once, twice = gradients(tree_attention, tensors, weight, forest=forest), gradients(again, tensors, weight)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_is_called_as_its_twin(monkeypatch, window):
    # What reaches torch's operators, answered by the reference: the order of arguments, windows counted to the left, the total lse.
    calls = []

    def sequences(ends, longest, causal, left, right):
        return attention_tree.Part(None, None, ends, longest, causal or right == 0, None if left < 0 else left + 1)

    def forward(q, k, v, ends_q, ends_k, most_q, most_k, dropout, causal, debug, *, scale, window_size_left, window_size_right):
        assert (dropout, debug) == (0.0, False)
        calls.append((causal, window_size_left, window_size_right))
        part = sequences((ends_q, ends_k), (most_q, most_k), causal, window_size_left, window_size_right)
        return (*part_reference(q, k, v, part, scale), None, None, None)

    def backward(grad, q, k, v, output, lse, ends_q, ends_k, most_q, most_k, dropout, causal, state, unused, **options):
        assert (dropout, state.dtype, unused.numel()) == (0.0, torch.uint64, 0)
        part = sequences((ends_q, ends_k), (most_q, most_k), causal, options["window_size_left"], options["window_size_right"])
        return part_backward_reference(grad, q, k, v, output, lse, part, options["scale"])

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    forest, tensors = FORESTS["levels"], inputs(16)
    weight = torch.randn(1, 6, 16, 8)
    flash, twin = (gradients(tree_attention, tensors, weight, forest=forest, window=window, impl=impl) for impl in ("flash", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(flash, twin, strict=True))
    assert calls == ([(True, -1, 0), *[(False, -1, -1)] * 3] if window is None else [(False, 2, 0)])


def test_torchs_operators_take_what_they_are_given():
    # Their arguments by name and order, in this version of torch.
    forward, backward = (getattr(torch.ops.aten, f"_flash_attention_{way}").default._schema for way in ("forward", "backward"))
    common = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert [a.name for a in forward.arguments][:10] == ["query", "key", "value", *common, "return_debug_mask"]
    assert [a.name for a in backward.arguments][:14] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp"), *common, "rng_state", "unused"
    ]  # fmt: skip
    for schema in (forward, backward):
        assert {"scale", "window_size_left", "window_size_right"} <= {a.name for a in schema.arguments if a.kwarg_only}
