"""Rotary embedding: against fp64 truth, against the models' own function, in place, and every gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo_rope
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi_rope

from burnish.kernels import native
from burnish.kernels.rope import CASES, rope, rope_apply, rope_reference

cases = pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])


def inputs(case, dtype, seed=0):
    """(q, k, cos, sin): q and k lie in memory as a projection wrote them, [B, T, H, D]. The same numbers in every type."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((case["batch"], case["tokens"], case[heads], case["size"]) for heads in ("heads", "kv_heads"))
    q, k = (torch.randn(shape, generator=generator).bfloat16().to(dtype).transpose(1, 2) for shape in shapes)
    angles = torch.rand(case.get("tables", 1), case["tokens"], case.get("rotary", case["size"]) // 2, generator=generator) * 6
    cos, sin = (f(torch.cat((angles, angles), dim=-1)).mul(1.1).bfloat16().to(dtype) for f in (torch.cos, torch.sin))
    return q.requires_grad_(), k.requires_grad_(), cos, sin


def run(function, parts, **options):
    """q and k rotated, and their gradients."""
    outputs = function(*parts, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype) for output in outputs]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, parts[:2], upstream)]


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
    for mine, theirs in zip(run(rope, parts), run(rope_reference, parts), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("halves", ["equal", "different"])
def test_gradients_are_the_derivatives(halves):
    q, k, cos, sin = inputs({"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 3, "size": 6, "rotary": 4}, torch.float64)
    if halves == "different":  # not a rotation any more, but still linear: the transpose is general
        cos, sin = (torch.randn(t.shape, generator=torch.Generator().manual_seed(5), dtype=t.dtype) for t in (cos, sin))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: rope_reference(q, k, cos, sin), (q, k))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_not_above_the_plain_one(case, dtype):
    truth = run(rope_reference, inputs(case, torch.float64))
    assert_not_worse(run(rope, inputs(case, dtype)), run(rope_reference, inputs(case, dtype)), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_values_equal_the_models_own(dtype, scaling):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rope_parameters=scaling)
    positions = torch.tensor([[*range(5), *range(9)]])  # two documents, one after the other
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 14, heads, 16, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    for mine, theirs in zip(rope(q, k, cos, sin, impl="torch"), llama_rope(q, k, cos, sin), strict=True):
        assert mine.stride() == theirs.stride()
        if dtype is torch.bfloat16:
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs)


def test_partial_rotary_and_wide_tables_as_the_models():
    q, k, cos, sin = (t.detach() for t in inputs({"batch": 1, "heads": 4, "kv_heads": 2, "tokens": 6, "size": 16}, torch.bfloat16))
    for mine, theirs in zip(rope(q, k, cos[..., :8], sin[..., :8], impl="torch"), phi_rope(q, k, cos[..., :8], sin[..., :8]), strict=True):
        assert torch.equal(mine, theirs)
    wide = cos.float() + 1e-3, sin.float() - 1e-3  # OLMo 2 keeps its tables in fp32, and rounds at the end
    truth = rope_reference(q.double(), k.double(), *(t.double() for t in wide))
    found, plain = rope(q, k, *wide), olmo_rope(q, k, *wide)
    assert_not_worse(found, plain, truth)


def test_a_projections_output_is_read_where_it_lies(monkeypatch):
    q, k, cos, sin = inputs({"batch": 1, "heads": 4, "kv_heads": 2, "tokens": 5, "size": 8}, torch.float32)
    fused = torch.cat([x.detach().transpose(1, 2).flatten(2) for x in (q, k)], dim=-1)  # [1, T, (Hq + Hkv) D]
    inside = fused[..., :32].view(1, 5, 4, 8).transpose(1, 2), fused[..., 32:].view(1, 5, 2, 8).transpose(1, 2)
    read = []

    def apply(x, cos, sin, inverse, out):
        read.append(x.data_ptr())
        return rope_apply(x, cos, sin, inverse, out)

    monkeypatch.setattr(native, "rope_apply", apply, raising=False)
    found = rope(*inside, cos, sin, impl="native")
    assert read == [x.data_ptr() for x in inside]
    assert all(x.transpose(1, 2).is_contiguous() for x in found)
    torch.testing.assert_close(found, rope_reference(q.detach(), k.detach(), cos, sin))


def test_odd_strides():
    q, k, cos, sin = inputs({"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 5, "size": 8}, torch.float64)
    for change in (
        lambda x: x.detach().flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x.detach()[:, :1].expand_as(x),
    ):
        parts = (change(q).requires_grad_(), change(k).requires_grad_(), cos, sin)
        torch.testing.assert_close(run(rope, parts), run(rope_reference, parts))
        mine, theirs = (torch.autograd.grad(sum(x.sum() for x in f(*parts)), parts[:2]) for f in (rope, rope_reference))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_alone_may_be_used(used):
    parts = inputs({"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 4, "size": 8}, torch.float64)
    mine, theirs = (torch.autograd.grad(f(*parts)[used].square().sum(), parts[used]) for f in (rope, rope_reference))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rotary", [8, 4])
def test_in_place(dtype, rotary):
    q, k, cos, sin = inputs({"batch": 1, "heads": 4, "kv_heads": 2, "tokens": 5, "size": 8, "rotary": rotary}, dtype)

    def projected(function, **options):
        mine = q * 1, k * 1  # owned, in the middle of a graph
        places = [x.data_ptr() for x in mine]
        outputs = function(*mine, cos, sin, **options)
        gradients = torch.autograd.grad(sum(x.square().sum() for x in outputs), (q, k))
        return [x.detach() for x in (*outputs, *gradients)], [x.data_ptr() for x in outputs] == places

    found, same_place = projected(rope, inplace=True)
    expected, elsewhere = projected(rope)
    assert same_place and not elsewhere
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_in_place_is_a_permission():
    q, k, cos, sin = (t.detach() for t in inputs({"batch": 1, "heads": 4, "kv_heads": 4, "tokens": 5, "size": 8}, torch.float32))
    expected = rope_reference(q[:, :1].expand_as(q), k, cos, sin)
    seen = q[:, :1].expand_as(q), k.transpose(-1, -2).contiguous().transpose(-1, -2)  # one head's memory seen four times; scattered heads
    before = [x.clone() for x in seen]
    torch.testing.assert_close(rope(*seen, cos, sin, inplace=True), expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))
    with torch.inference_mode():
        mine = (k * 1, k * 1)
        assert rope(*mine, cos, sin, inplace=True)[0].data_ptr() == mine[0].data_ptr()
        torch.testing.assert_close(mine[1], expected[1])


def test_in_place_where_it_is_not_safe_is_an_error():
    q, k, cos, sin = inputs({"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 4, "size": 8}, torch.float32)
    with pytest.raises(ValueError, match="leaves"):
        rope(q, k, cos, sin, inplace=True)
    saved = q.exp()  # whose backward pass needs its own result
    rotated, _ = rope(saved, k * 1, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated.sum().backward()


def test_raw_function_writes_where_it_is_told():
    q, _, cos, sin = (
        t.detach() for t in inputs({"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 4, "size": 8, "rotary": 6}, torch.float32)
    )
    y = rope_apply(q, cos[0], sin[0], False)
    assert y.is_contiguous()
    out = torch.empty_like(q)
    assert rope_apply(q, cos[0], sin[0], False, out) is out
    assert torch.equal(out, y)
    again = q.clone()
    rope_apply(again, cos[0], sin[0], False, again)
    assert torch.equal(again, y)
    torch.testing.assert_close(rope_apply(y, cos[0] / 1.21, sin[0] / 1.21, True), q, rtol=0.02, atol=0.02)  # tables are bf16 numbers


def test_learned_angles_keep_their_gradient():
    parts = [t.detach().requires_grad_() for t in inputs({"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 3, "size": 4}, torch.float64)]
    assert torch.autograd.gradcheck(rope, parts)


def test_only_the_tables_are_saved():
    q, k, cos, sin = inputs({"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 3, "size": 4}, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(q, k, cos, sin)
    assert [t.data_ptr() for t in saved] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("tables", [1, 2])
def test_native_takes_what_it_knows(monkeypatch, tables):
    calls = []

    def apply(x, cos, sin, inverse, out):
        calls.append(x.dtype)
        assert x.stride(-1) == 1 and cos.dim() == 2 and cos.is_contiguous()
        return rope_apply(x, cos, sin, inverse, out)

    monkeypatch.setattr(native, "rope_apply", apply, raising=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parts = inputs({"batch": 2, "heads": 2, "kv_heads": 1, "tokens": 3, "size": 4, "tables": tables}, dtype)
        torch.testing.assert_close(run(rope, parts, impl="native"), run(rope, parts, impl="torch"), rtol=0, atol=0)
    assert set(calls) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k[:, :, :2], cos, sin),
        lambda q, k, cos, sin: (q, k, cos[:, :2], sin),
        lambda q, k, cos, sin: (q, k, cos[..., :3], sin[..., :3]),
        lambda q, k, cos, sin: (q[..., :2], k[..., :2], cos, sin),
        lambda q, k, cos, sin: (q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1)),
    ],
)
def test_wrong_shapes_are_named(change):
    parts = change(*inputs({"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 3, "size": 4}, torch.float32))
    with pytest.raises(ValueError, match="expected q"):
        rope(*parts)
