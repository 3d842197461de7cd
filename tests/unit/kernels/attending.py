"""What the tests of attention share: inputs as a model makes them, gradients, and how far an error may go."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def inputs(total, heads=6, kv_heads=2, size=8, value_size=None, dtype=torch.float64, seed=0):
    """q, k, v as projections make them: [1, H, T, D] views of [1, T, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, size), (kv_heads, size), (kv_heads, value_size or size))
    made = [torch.randn(1, total, *s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def gradients(function, tensors, weight, **options):
    output = function(*tensors, **options)
    return [output.detach(), *torch.autograd.grad((output * weight.to(output.dtype)).sum(), tensors)]


def fused(q, k, v, forest):
    """Roots by torch's own kernel, in the type of the inputs."""
    parts = zip(*(x.split(forest.lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts], dim=2)


def assert_no_further(ours, others, truth, dtype):
    """Our results are no further from the truth than the worst of the others.

    A maximum over so many is one unlucky rounding of a few elements, and may fall either way; means may not.
    """
    for mine, *theirs, exact in zip(ours, *others, truth, strict=True):
        assert mine.dtype is dtype
        found, allowed = (mine - exact).abs(), [(x - exact).abs() for x in theirs]
        assert found.mean() <= 1.05 * max(x.mean() for x in allowed)
        assert found.square().mean() <= 1.25 * max(x.square().mean() for x in allowed)
        assert found.max() <= 2 * max(x.max() for x in allowed)
