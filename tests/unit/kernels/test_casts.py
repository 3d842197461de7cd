"""Casts of all adapters at once: the same numbers as one by one, always of the weights as they are now."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from burnish.kernels import casts
from burnish.kernels.casts import Casts, cast, joined
from burnish.kernels.lora import LoraWeights, Projection, lora_stack


@pytest.fixture
def one_by_one(monkeypatch):
    """What is cast one by one."""
    calls = []
    real = casts._cast
    monkeypatch.setattr(casts, "_cast", lambda *given: calls.append(given[0]) or real(*given))
    return calls


def parameters(*shapes):
    return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)]


def layers():
    """Two stacks of two projections, as a model has them."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape, trained=True):
        tensor = torch.randn(shape, generator=generator) * 0.2
        return nn.Parameter(tensor) if trained else tensor

    return [
        [Projection(made(24, 24, trained=False), None, LoraWeights(made(4, 24), made(24, 4), factor)) for factor in (0.5, 0.3)]
        for _ in range(2)
    ]


def forward(stacks, x):
    with torch.autocast("cpu", torch.bfloat16):
        for stack in stacks:
            x = sum(lora_stack(x, stack))
    return x


def test_the_first_call_is_as_ever_and_the_second_is_made_at_once(one_by_one):
    a, b = parameters((3, 5), (5, 3))
    known = Casts(devices=("cpu",))
    for expected in (2, 0, 0):
        one_by_one.clear()
        with known.at_once():
            found = [cast(a, torch.bfloat16), cast(b, torch.bfloat16, 0.3)]
        assert len(one_by_one) == expected
        assert torch.equal(found[0], a.bfloat16())
        assert torch.equal(found[1], (b * 0.3).bfloat16())


def test_whole_layers_are_equal_to_the_bit_and_gradients_too(one_by_one):
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    plain, known = layers(), Casts(devices=("cpu",))
    other = layers()
    for step in range(3):
        expected = forward(plain, x)
        expected.square().sum().backward()
        one_by_one.clear()
        with known.at_once():
            found = forward(other, x)
        assert len(one_by_one) == (8 if step == 0 else 0)  # A and B of four projections
        found.square().sum().backward()  # outside, as training does it
        assert torch.equal(found, expected)
        for mine, theirs in zip(trained(other), trained(plain), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
            mine.data.sub_(mine.grad, alpha=0.01)  # behind autograd's back: seen all the same
            theirs.data.sub_(theirs.grad, alpha=0.01)
            mine.grad = theirs.grad = None


def trained(stacks):
    return [tensor for stack in stacks for p in stack for tensor in (p.lora.a, p.lora.b)]


def test_two_calls_before_their_backward_passes_do_not_share_memory():
    x, known = torch.randn(6, 24), Casts(devices=("cpu",))
    stacks = layers()
    with known.at_once():
        forward(stacks, x)
    outputs = []
    for _ in range(2):
        with known.at_once():
            outputs.append(forward(stacks, x))
    sum(y.sum() for y in outputs).backward()  # would raise where the second had overwritten what the first keeps
    twice = [tensor.grad.clone() for tensor in trained(stacks)]
    for tensor in trained(stacks):
        tensor.grad = None
    forward(stacks, x).sum().backward()
    for found, tensor in zip(twice, trained(stacks), strict=True):
        torch.testing.assert_close(found, 2 * tensor.grad)


def test_what_was_not_foreseen_is_cast_as_ever(one_by_one):
    a, b = parameters((3, 5), (5, 3))
    known = Casts(devices=("cpu",))
    with known.at_once():
        cast(a, torch.bfloat16)
    with known.at_once():
        assert torch.equal(cast(b, torch.bfloat16), b.bfloat16())
        assert torch.equal(cast(a, torch.bfloat16, 2.0), (a * 2.0).bfloat16())
        assert torch.equal(cast(a, torch.float16), a.half())
        assert cast(a, torch.float32) is a
    assert len(one_by_one) == 5  # and the first call's


def test_tensors_that_are_gone_are_forgotten(one_by_one):
    known = Casts(devices=("cpu",))
    with known.at_once():
        cast(*parameters((3, 5)), torch.bfloat16)
    one_by_one.clear()
    gc.collect()
    (other,) = parameters((2, 2))
    with known.at_once():
        assert torch.equal(cast(other, torch.bfloat16), other.bfloat16())


def test_neighbours_are_joined_without_a_copy():
    a, b, c = parameters((4, 16), (8, 16), (2, 16))
    known = Casts(devices=("cpu",))
    for _ in range(2):
        with known.at_once():
            made = [cast(tensor, torch.bfloat16) for tensor in (a, b, c)]
    whole = joined(made)
    assert whole.data_ptr() == made[0].data_ptr()
    assert torch.equal(whole, torch.cat([a, b, c]).bfloat16())
    swapped = joined([made[1], made[0]])
    assert torch.equal(swapped, torch.cat([b, a]).bfloat16())
    assert joined(made[:1]) is made[0]


def test_tensors_that_lie_apart_are_copied():
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    assert torch.equal(joined(parts), torch.cat(parts))
    turned = [torch.randn(3, 2).t(), torch.randn(3, 4).t()]
    assert torch.equal(joined(turned), torch.cat(turned))
