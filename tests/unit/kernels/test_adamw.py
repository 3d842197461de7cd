"""One AdamW step over flat buffers: torch's formula to rounding, whatever computes it; 8-bit moments within their documented error."""

from typing import Any

import pytest
import torch
from torch import nn

from burnish.kernels import native
from burnish.kernels.adamw import (
    BLOCK,
    CASES,
    Quantised,
    Segment,
    adamw,
    adamw_8bit,
    adamw_8bit_reference,
    adamw_reference,
    dequantise,
    quantise,
)


def layout(case: dict[str, Any], step: int = 1) -> tuple[list[Segment], int]:
    """The segments of a case, each with hyper-parameters of its own, and the size of the buffer."""
    segments, at = [], 0
    for number, size in enumerate(case["sizes"]):
        decay = case.get("weight_decay", 0.1 * number)
        betas = (0.9, 0.999) if number % 2 == 0 else (0.8, 0.95)
        segments.append(
            Segment(at, at + size, lr=0.01 * (number + 1), weight_decay=decay, step=step + number, beta1=betas[0], beta2=betas[1])
        )
        at += size + case.get("gap", 0)
    return segments, at


def buffers(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Parameters, gradient and moments in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)
    p, g, m, v = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4))
    return [x.to(dtype) for x in (p, g * 0.1, m * 0.05, v.square() * 0.01)]


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [(a.double() - b).abs().max().item() for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_one_step_is_as_exact_as_torchs(name: str, case: dict[str, Any]):
    segments, size = layout(case, step=3)
    scale = case.get("grad_scale", 1.0)
    start = buffers(size)
    truth = [x.double() for x in start]
    adamw_reference(*truth, segments, grad_scale=scale)
    plain = [x.clone() for x in start]
    for segment in segments:  # torch's own loop, tensor by tensor
        part = slice(segment.start, segment.stop)
        torch_step(*(x[part] for x in plain), segment, scale)
    ours, reference = ([x.clone() for x in start] for _ in range(2))
    adamw(*ours, segments, grad_scale=scale, impl="torch")
    adamw_reference(*reference, segments, grad_scale=scale)
    kept = (0, 2, 3)
    allowed = error([plain[i] for i in kept], [truth[i] for i in kept])
    for found in (ours, reference):
        for i, most, seen in zip(kept, allowed, error([found[i] for i in kept], [truth[i] for i in kept]), strict=True):
            assert seen <= 1.05 * most + 2e-7 * truth[i].abs().max().item()


def torch_step(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, segment: Segment, scale: float) -> None:
    parameter = nn.Parameter(p.clone())
    parameter.grad = g * scale
    betas = (segment.beta1, segment.beta2)
    optimizer = torch.optim.AdamW(
        [parameter], lr=segment.lr, betas=betas, eps=segment.eps, weight_decay=segment.weight_decay, foreach=False
    )
    state = optimizer.state[parameter]
    state["step"], state["exp_avg"], state["exp_avg_sq"] = torch.tensor(float(segment.step - 1)), m, v
    optimizer.step()
    p.copy_(parameter.detach())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_c_kernel_is_as_exact(name: str, case: dict[str, Any]):
    if not hasattr(native, "adamw_flat") or not native.ready():
        pytest.skip("the C kernels are not compiled here")
    segments, size = layout(case, step=3)
    scale = case.get("grad_scale", 1.0)
    start = buffers(size)
    truth = [x.double() for x in start]
    adamw_reference(*truth, segments, grad_scale=scale)
    plain, ours = ([x.clone() for x in start] for _ in range(2))
    for segment in segments:
        part = slice(segment.start, segment.stop)
        torch_step(*(x[part] for x in plain), segment, scale)
    adamw(*ours, segments, grad_scale=scale, impl="native")
    kept = (0, 2, 3)
    for i, most, seen in zip(
        kept,
        error([plain[i] for i in kept], [truth[i] for i in kept]),
        error([ours[i] for i in kept], [truth[i] for i in kept]),
        strict=True,
    ):
        assert seen <= 1.05 * most + 2e-7 * truth[i].abs().max().item()


def test_the_c_kernel_gets_each_segment(monkeypatch: pytest.MonkeyPatch):
    """The order of its arguments, and half precision goes elsewhere; the kernel itself has its own tests."""
    calls: list[tuple[float, ...]] = []

    def stand_in(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *factors: float) -> None:
        calls.append(factors)
        p.fill_(len(calls))

    monkeypatch.setattr(native, "adamw_flat", stand_in, raising=False)
    segments, size = layout(CASES[2][1], step=3)
    p, g, m, v = buffers(size)
    shadow = torch.zeros(size, dtype=torch.bfloat16)
    adamw(p, g, m, v, segments, grad_scale=0.5, shadow=shadow, impl="native")
    assert calls[1] == pytest.approx((0.02, 0.8, 0.95, 1e-8, 0.1, 1 - 0.8**4, 1 - 0.95**4, 0.5))
    assert p[:700].eq(1).all() and shadow[756:1056].eq(2).all() and not shadow[700:756].any()
    adamw(*buffers(size, torch.float16), segments, impl="native")
    assert len(calls) == 2


def test_what_is_outside_all_segments_stays():
    start = buffers(1024)
    ours = [x.clone() for x in start]
    adamw(*ours, [Segment(100, 300, 0.1, 0.1, 1)], impl="torch")
    for before, after in zip(start, ours, strict=True):
        assert torch.equal(before[:100], after[:100]) and torch.equal(before[300:], after[300:])
    assert not torch.equal(start[0][100:300], ours[0][100:300])


def test_the_decay_is_not_rounded_to_steps_of_one_minus_it():
    # lr * wd = 2e-6 would be 1.97e-6 as 1 - lr wd in fp32.
    p, zero = torch.full((4096,), 1.0), torch.zeros(4096)
    p += torch.rand(4096, generator=torch.Generator().manual_seed(0))
    exact, before = p.double(), p.double()
    for step in range(1, 201):
        adamw_reference(p, zero.clone(), zero.clone(), zero.clone(), [Segment(0, 4096, 2e-4, 0.01, step)])
        exact = exact * (1 - 2e-6)
    assert (p.double() - before).mean().item() == pytest.approx((exact - before).mean().item(), rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_shadow_is_the_rounded_master(dtype: torch.dtype):
    segments, size = layout(CASES[1][1])
    p, g, m, v = buffers(size)
    twin = [x.clone() for x in (p, g.to(dtype).float(), m, v)]
    shadow = torch.zeros(size, dtype=dtype)
    adamw(p, g.to(dtype), m, v, segments, shadow=shadow, impl="torch")
    adamw(*twin, segments, impl="torch")
    assert torch.equal(p, twin[0])
    assert torch.equal(shadow, p.to(dtype))


def test_bad_buffers_are_refused():
    p, g, m, v = buffers(512)
    with pytest.raises(ValueError, match=r"one size are expected.*\(512,\), \(256,\)"):
        adamw(p, g[:256], m, v, [Segment(0, 512, 0.1, 0, 1)])
    with pytest.raises(ValueError, match="contiguous"):
        adamw(p[::2], g[::2], m[::2], v[::2], [Segment(0, 256, 0.1, 0, 1)])
    with pytest.raises(ValueError, match="within the 512 elements"):
        adamw(p, g, m, v, [Segment(0, 513, 0.1, 0, 1)])
    with pytest.raises(ValueError, match="begin or end within one"):
        adamw_8bit(p, g, Quantised.zeros(512, p.device), [Segment(0, 300, 0.1, 0, 1)])


def test_codes_keep_their_documented_error():
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(64 * BLOCK, generator=generator) * torch.exp(3 * torch.randn(64 * BLOCK, generator=generator))
    v = (torch.randn(64 * BLOCK, generator=generator) * torch.exp(2 * torch.randn(64 * BLOCK, generator=generator))).square()
    m[:BLOCK], v[:BLOCK] = 0, 0  # a block of nothing
    state = Quantised.zeros(64 * BLOCK, m.device)
    quantise(m, v, state)
    found_m, found_v = dequantise(state)
    assert not found_m[:BLOCK].any() and not found_v[:BLOCK].any()
    a = m.view(-1, BLOCK).abs().amax(1, keepdim=True).clamp_min(1e-30)
    root = (m.view(-1, BLOCK).abs() / a).sqrt() - (found_m.view(-1, BLOCK).abs() / a).sqrt()
    assert root.abs().max() <= 1 / 254 + 1e-6
    assert not (m * found_m < 0).any()
    a = v.view(-1, BLOCK).amax(1, keepdim=True).clamp_min(1e-30)
    exact, kept = (v.view(-1, BLOCK) / a)[1:] ** 0.25, (found_v.view(-1, BLOCK) / a)[1:] ** 0.25
    assert (exact.clamp_min(1 / 256) - kept).abs().max() <= 1 / 512 + 1e-6
    assert (found_v[BLOCK:] > 0).all()
    again = Quantised.zeros(64 * BLOCK, m.device)
    quantise(found_m, found_v, again)  # what was rounded once is rounded to itself
    assert torch.equal(again.first, state.first) and torch.equal(again.second[BLOCK:], state.second[BLOCK:])


def test_the_first_8bit_step_is_the_exact_one():
    p, g, _, _ = buffers(2048)
    wide = [p.clone(), g.clone(), torch.zeros(2048), torch.zeros(2048)]
    segments = [Segment(0, 1024, 0.01, 0.1, 1), Segment(1024, 2048, 0.03, 0.0, 1)]
    adamw_reference(*wide, segments, grad_scale=0.5)
    adamw_8bit(p, g, Quantised.zeros(2048, p.device), segments, grad_scale=0.5, impl="torch")
    torch.testing.assert_close(p, wide[0], rtol=1e-6, atol=1e-7)  # rounding touches the history only


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch):
    found = []
    for piece in (1 << 20, 512):
        monkeypatch.setattr("burnish.kernels.adamw._PIECE", piece)
        p, g, _, _ = buffers(2048)
        state = Quantised.zeros(2048, p.device)
        for step in (1, 2):
            adamw_8bit_reference(p, g, state, [Segment(0, 2048, 0.01, 0.1, step)])
        found.append((p, state.first, state.second, state.first_scale, state.second_scale))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_8bit_moments_learn_a_regression_as_well_as_fp32():
    """Least squares with badly scaled inputs. From the same start the losses agree within 5 % all the way, over three decades."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 64, generator=generator) * torch.logspace(0, -1.5, 64)
    targets = inputs @ torch.randn(64, 16, generator=generator) + 0.02 * torch.randn(512, 16, generator=generator)

    def losses(bits: int) -> list[float]:
        p, m, v = torch.zeros(64 * 16), torch.zeros(64 * 16), torch.zeros(64 * 16)
        state, found = Quantised.zeros(64 * 16, p.device), []
        for step in range(1, 401):
            off = inputs @ p.view(64, 16) - targets
            found.append(off.square().mean().item())
            g = (inputs.T @ off * (2 / off.numel())).reshape(-1)
            segment = [Segment(0, 1024, 0.05 * (1 - step / 401), 0.0, step)]
            if bits == 8:
                adamw_8bit(p, g, state, segment, impl="torch")
            else:
                adamw(p, g, m, v, segment, impl="torch")
        return found

    wide, narrow = losses(32), losses(8)
    assert wide[-1] < wide[0] / 1000
    assert all(b == pytest.approx(a, rel=0.05) for a, b in zip(wide, narrow, strict=True))


def test_8bit_moments_take_two_bytes_for_each_element():
    state = Quantised.zeros(1 << 16, torch.device("cpu"))
    size = sum(x.nbytes for x in (state.first, state.first_scale, state.second, state.second_scale))
    assert size / (1 << 16) == pytest.approx(2 + 8 / 256)
