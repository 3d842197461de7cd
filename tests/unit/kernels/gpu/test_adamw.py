"""The Triton kernels, interpreted on the CPU, against the plain formula."""

from typing import Any

import pytest
import torch
from tests.unit.kernels.test_adamw import buffers, error, layout

from burnish.kernels.adamw import CASES, Quantised, Segment, adamw, adamw_8bit, adamw_reference, dequantise


@pytest.mark.parametrize(("name", "case"), CASES)
def test_one_step_is_as_exact_as_the_reference(name: str, case: dict[str, Any]):
    segments, size = layout(case, step=3)
    scale = case.get("grad_scale", 1.0)
    start = buffers(size)
    truth = [x.double() for x in start]
    adamw_reference(*truth, segments, grad_scale=scale)
    plain, ours = ([x.clone() for x in start] for _ in range(2))
    adamw_reference(*plain, segments, grad_scale=scale)
    adamw(*ours, segments, grad_scale=scale, impl="triton")
    for i, most, seen in zip(range(4), error(plain, truth), error(ours, truth), strict=True):
        assert seen <= 1.05 * most + 2e-7 * truth[i].abs().max().item()
    for i in range(4):  # gaps between segments stay as they are
        inside = torch.zeros(size, dtype=torch.bool)
        for segment in segments:
            inside[segment.start : segment.stop] = True
        assert torch.equal(ours[i][~inside], start[i][~inside])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shadow_and_gradient(dtype: torch.dtype):
    segments, size = layout(CASES[1][1])
    p, g, m, v = buffers(size)
    twin = [x.clone() for x in (p, g.to(dtype).float(), m, v)]
    shadow = torch.zeros(size, dtype=dtype)
    adamw(p, g.to(dtype), m, v, segments, shadow=shadow, impl="triton")
    adamw_reference(*twin, segments)
    torch.testing.assert_close(p, twin[0], rtol=1e-6, atol=1e-7)
    # The interpreter rounds bf16 stores its own way: within one unit in the last place.
    torch.testing.assert_close(shadow.float(), p, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_pure_half_precision_runs():
    start = buffers(1500, torch.float16)
    segments = [Segment(0, 1500, 0.01, 0.1, 2)]
    plain, ours = ([x.clone() for x in start] for _ in range(2))
    adamw_reference(*plain, segments)
    adamw(*ours, segments, impl="triton")
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("shadow", [None, torch.float16])
def test_8bit_steps_have_the_references_codes(shadow: torch.dtype | None):
    sizes = [256, 1280, 2560]  # less than a program, and not a multiple of one
    segments = [Segment(0, 256, 0.01, 0.1, 1), Segment(256, 1536, 0.03, 0.0, 1), Segment(1536, 4096, 0.02, 0.2, 1)]
    total = sum(sizes) + 256  # one block belongs to nobody
    start = buffers(total)[0]
    found = []
    for impl in ("torch", "triton"):
        p, state = start.clone(), Quantised.zeros(total, start.device)
        copy = None if shadow is None else p.to(shadow)
        for step in range(1, 4):
            now = [Segment(s.start, s.stop, s.lr, s.weight_decay, step) for s in segments]
            adamw_8bit(p, buffers(total, seed=step)[1], state, now, grad_scale=0.7, shadow=copy, impl=impl)  # pyright: ignore[reportArgumentType]
        found.append((p, state, copy))
    (p, state, copy), (q, other, other_copy) = found
    off = (q - p).abs()  # where a tie fell to the other side, the next update differs by a part of the learning rate
    assert off.max() <= 0.05 * 0.03 and (off > 1e-6).float().mean() < 1e-3
    for a, b in ((state.first, other.first), (state.second, other.second)):
        off = (a.int() - b.int()).abs()
        assert off.max() <= 1 and off.float().mean() < 1e-3  # a tie may fall to either side
    for a, b in zip(dequantise(state), dequantise(other), strict=True):
        torch.testing.assert_close(b, a, rtol=0.05, atol=1e-6)
    assert not other.first[-256:].any() and torch.equal(q[-256:], start[-256:])
    if copy is not None and other_copy is not None:
        assert torch.equal(other_copy, q.to(shadow)) or torch.allclose(other_copy.float(), q, rtol=1e-3)


def test_many_segments_share_a_launch():
    segments = [Segment(i * 7, i * 7 + 5, 0.001 * (i + 1), 0.1, i + 1) for i in range(37)]
    start = buffers(37 * 7)
    plain, ours = ([x.clone() for x in start] for _ in range(2))
    adamw_reference(*plain, segments)
    adamw(*ours, segments, impl="triton")
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
