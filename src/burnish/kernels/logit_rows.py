"""What happens to one chunk of logits: raw logits of a few rows in, numbers per row and the gradient of the logits out.

The formulas are in linear_ce.py, which cuts the rows into chunks and adds up. Here are the three implementations (see `Head.impl`):

    torch     plain operations on fp32 logits: the oracle, for every device and type
    native    C on a CPU, bf16 and fp32: statistics and dz in one call, dz in place of the logits
    triton    see gpu/linear_ce.py: one program a row, dz in place of the logits
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from burnish.kernels.dispatch import Impl, choose
from burnish.kernels.matmul import mm_wide

OPTIONAL = frozenset({"logsumexp", "mean_logit", "entropy", "correct", "log_sum_sq"})
"""What `want` may name besides the log-probabilities."""

_Maybe = torch.Tensor | None
Fields = tuple[torch.Tensor, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe]
"""logprobs, logsumexp, mean_logit, entropy, correct, log_sum_sq: the fields of linear_ce.TokenStats, as autograd passes them around."""

_CPU_ROWS, _CPU_ELEMENTS = 512, 1 << 25
"""A CPU's chunk. W is read, and laid out for the product, once a chunk. One core, bf16, V = 128256, H = 2048: the product dz W runs at 125,
193, 272, 341 GFLOP/s with 32, 64, 128, 256 rows. Two cores, V = 49152, H = 576: 609, 742, 799, 821 with 128, 256, 512, 1024."""

_CUDA_BYTES = 1 << 29
"""A GPU's chunk of logits: 2048 rows of Llama 3 in bf16, so that dz W (2048 x 2048) has a tile for each of 132 processors."""


@dataclass(frozen=True, slots=True)
class Head:
    """How logits are made, and what is wanted of them. The temperature is inside `softcap` and `scale`."""

    softcap: float | None
    scale: float
    compute: torch.dtype
    chunk: int
    want: frozenset[str]
    impl: Literal["torch", "native", "triton"]


_TYPES = {
    "native": frozenset({torch.bfloat16, torch.float32}),
    "triton": frozenset({torch.bfloat16, torch.float16, torch.float32}),
}


def make_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    chunk: int | None,
    want: frozenset[str],
    impl: Impl,
) -> Head:
    """The settings of one call, with what `auto` and None stand for filled in.

    Raises:
        ValueError: As `linear_ce.head_stats`.
    """
    check(want, temperature)
    compute = compute_dtype(hidden, weight)
    chosen = choose(impl, hidden.device, frozenset(_TYPES))
    if "log_sum_sq" in want and chosen != "torch":  # a rare wish, which only plain torch fulfils
        if impl != "auto":
            raise ValueError(f"the '{impl}' head does not compute log_sum_sq")
        chosen = "torch"
    if chosen != "torch" and compute not in _TYPES[chosen]:
        if impl != "auto":
            raise ValueError(f"the '{impl}' head does not compute in {compute}, expected one of {sorted(map(str, _TYPES[chosen]))}")
        chosen = "torch"
    rows = chunk or default_chunk(weight.shape[0], hidden.device, 4 if chosen == "torch" else compute.itemsize)
    return Head(*tempered(softcap, scale, temperature), compute, rows, want, chosen)


def default_chunk(vocabulary: int, device: torch.device, itemsize: int = 4) -> int:
    """Rows of logits, of `itemsize` bytes each, to hold at once on `device`."""
    if device.type == "cpu":
        return max(1, min(_CPU_ROWS, _CPU_ELEMENTS // vocabulary))
    rows = _CUDA_BYTES // (itemsize * vocabulary)
    return max(1, rows // 128 * 128 or rows)  # whole tiles of a matrix product


def chunks(
    hidden: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, head: Head
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, raw logits `h W^T + b`, hidden in the compute type) for one chunk of rows after another, in one buffer that is reused.

    Chunks of about equal size: a short last one would read the whole weight for a few rows. The logits are in the compute type, but
    plain torch on a GPU gets the product's fp32 sums.
    """
    rows, vocabulary = hidden.shape[0], w.shape[0]
    pieces = max(1, -(-rows // head.chunk))
    size = min(head.chunk, -(-rows // (pieces * 16)) * 16)
    summed = head.impl == "torch" and _sums_in_fp32(w)
    width = -(-vocabulary // 16) * 16 if head.impl == "triton" else vocabulary  # rows begin where wide loads may
    buffer = None if summed else w.new_empty(min(size, rows), width)[:, :vocabulary]
    for start in range(0, rows, max(size, 1)):
        part = slice(start, min(start + size, rows))
        h = hidden[part].to(head.compute)
        if buffer is None:
            z = mm_wide(h, w.t())
            z = z if bias is None else z.add_(bias)
        elif bias is None:
            z = torch.mm(h, w.t(), out=buffer[: h.shape[0]])
        else:
            z = torch.addmm(bias.to(head.compute), h, w.t(), out=buffer[: h.shape[0]])
        yield part, z, h


def statistics(z: torch.Tensor, y: torch.Tensor, head: Head, gradient: bool) -> tuple[Fields, torch.Tensor | None]:
    """Statistics of raw logits z [C, V] at y [C], and d logp / dz in the compute type, which may be z's own memory."""
    if head.impl == "triton":
        from burnish.kernels.gpu.linear_ce import head_chunk  # only where Triton is

        return head_chunk(z, y, head.scale, head.softcap, gradient, head.want), z
    if head.impl == "native":
        from burnish.kernels import native

        return (*native.head_chunk(z, y, head.scale, head.softcap, gradient), None), z  # pyright: ignore
    z, y = shape(wide(z), head.softcap, head.scale), y[:, None]
    top, arg = z.max(dim=-1, keepdim=True)
    p = torch.softmax(z, dim=-1)
    log_total = -p.gather(-1, arg).log()  # the largest p is at least 1 / V, so its logarithm never underflows
    logp, lse, correct = z.gather(-1, y) - top - log_total, top + log_total, arg == y
    mean = z.mean(dim=-1) if "mean_logit" in head.want else None
    entropy = log_total.squeeze(-1) - (z - top).mul_(p).sum(dim=-1) if "entropy" in head.want else None
    squares = p.square().sum(dim=-1).log() if "log_sum_sq" in head.want else None
    fields = logp.squeeze(-1), lse.squeeze(-1), mean, entropy, correct.squeeze(-1), squares
    if not gradient:
        return fields, None
    dz = p.neg_().scatter_add_(-1, y, torch.ones_like(top))
    return fields, through_shape(dz, z, head).to(head.compute)


def logit_gradient(z: torch.Tensor, y: torch.Tensor, upstream: tuple[torch.Tensor | None, ...], head: Head) -> torch.Tensor:
    """Gradient of raw logits z [C, V] in the compute type, for targets y [C] and upstream gradients [C] (None is zero)."""
    if head.impl == "triton":
        from burnish.kernels.gpu.linear_ce import head_chunk_backward

        return head_chunk_backward(z, y, upstream, head.scale, head.softcap)
    z, y = shape(wide(z), head.softcap, head.scale), y[:, None]
    g_logp, g_lse, g_mean, g_entropy = (g[:, None] if g is not None else None for g in upstream)
    p = torch.softmax(z, dim=-1)
    weight_of_p = torch.zeros_like(z[:, :1])
    if g_lse is not None:
        weight_of_p = weight_of_p + g_lse
    if g_logp is not None:
        weight_of_p = weight_of_p - g_logp
    if g_entropy is None:
        dz = p.mul_(weight_of_p)
    else:
        logp = torch.log_softmax(z, dim=-1)
        entropy = -(p * logp).sum(dim=-1, keepdim=True)
        dz = p.mul_(weight_of_p - g_entropy * (logp + entropy))
    if g_logp is not None:
        dz.scatter_add_(-1, y, g_logp)
    if g_mean is not None:
        dz += g_mean / z.shape[-1]
    return through_shape(dz, z, head).to(head.compute)


def tempered(softcap: float | None, scale: float, temperature: float) -> tuple[float | None, float]:
    """Soft cap and scale with the temperature inside: c tanh(s z / c) / t = c' tanh(s' z / c') for c' = c / t, s' = s / t."""
    return softcap / temperature if softcap is not None else None, scale / temperature


def shape(z: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    """Scale and soft cap, where the model has them."""
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def through_shape(dz: torch.Tensor, z: torch.Tensor, head: Head) -> torch.Tensor:
    """The gradient before `shape` from the one after it; z is the shaped logit. In place."""
    if head.softcap is not None:
        dz *= 1 - (z / head.softcap).square()
    return dz if head.scale == 1.0 else dz.mul_(head.scale)


def _sums_in_fp32(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def add_mm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`total += a b` in fp32, inside the product where it can: a matrix of [V, H] more would be written and read for each chunk."""
    if a.dtype is total.dtype:
        return torch.addmm(total, a, b, out=total)
    if _sums_in_fp32(a) and _adds_to_fp32(a.dtype):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(mm_wide(a, b) if _sums_in_fp32(a) else torch.mm(a, b))


@cache
def _adds_to_fp32(dtype: torch.dtype) -> bool:
    """Whether this torch adds half precision products to an fp32 matrix (some versions want all types equal). Asked once."""
    a, total = torch.zeros(16, 16, dtype=dtype, device="cuda"), torch.zeros(16, 16, device="cuda")
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Autocast's type inside autocast, else the inputs' own (the wider one where they differ)."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or in fp64 where it is that."""
    return x.to(wide_dtype(x.dtype))


def check(want: frozenset[str], temperature: float = 1.0) -> None:
    """Refuses statistics that do not exist, and a temperature that is not positive."""
    if unknown := want - OPTIONAL:
        raise ValueError(f"unknown statistics {sorted(unknown)}, known are {sorted(OPTIONAL)}")
    if not temperature > 0:
        raise ValueError(f"a temperature must be positive, found {temperature}")
