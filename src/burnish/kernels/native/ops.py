"""The C kernels as functions on tensors: no autograd, CPU, bf16 and fp32. Shapes are checked here, since C checks nothing.

Every function raises ValueError for tensors that it cannot take, and BuildError where there is no library (see `native.ready`).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

import torch

from burnish.kernels.native import build

Activation = Literal["silu", "gelu_tanh", "gelu"]
"""The gate's activation: `gelu_tanh` is the tanh approximation (Gemma), `gelu` the exact one."""

_KINDS: dict[str, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
_GRAIN = 1 << 14
"""Elements below which one thread does it all, as in torch. Above it all threads work: a team of another size would be made anew."""

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "rms_chunks": (_N, [_N]),
    "rms_forward": (None, [_N, _N, *[_P] * 6, _F, _F, *[_I] * 5]),
    "rms_backward": (None, [_N, _N, *[_P] * 5, _F, _I, *[_P] * 3, *[_I] * 4]),
    "rope": (None, [*[_N] * 5, *[_P] * 6, *[_I] * 4]),
    "glu_forward": (None, [_N, _N, _P, _N, _P, _N, _P, *[_I] * 3]),
    "glu_backward": (None, [_N, _N, _P, _P, _N, _P, _N, *[_P] * 3, *[_I] * 3]),
    "head": (None, [_N, _N, _P, _N, _P, _F, _F, _P, _P, *[_I] * 3]),
    "softmax_forward": (_I, [*[_N] * 3, _P, _N, _N, _F, *[_N] * 3, _P, _I, _I]),
    "softmax_backward": (None, [*[_N] * 3, _P, _N, _N, _P, _N, _N, _P, _F, *[_N] * 3, *[_I] * 3]),
    "adamw": (None, [_N, *[_P] * 4, *[_F] * 8, _I, _I]),
}


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels can work on these: on the CPU, bf16 or fp32. None is left out."""
    return all(x is None or (x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)) for x in tensors)


@cache
def _library() -> ctypes.CDLL:
    """The loaded library, its functions' types declared."""
    library = build.load()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"burnish_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    gemma: bool,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """RMSNorm of x (+ residual). See `kernels.rms_norm` for the formulas.

    Args:
        x: [N, H].
        weight: [H].
        eps: Added to the mean square.
        offset: Added to the weight, with Gemma's cast only.
        gemma: Multiply by the weight in fp32 and round once, rather than round x's norm to x's type first.
        residual: [N, H] of x's type, added to x in that type.
        out_dtype: bf16 or fp32.

    Returns:
        y [N, H], the sum [N, H] (None without residual), and 1 / rms [N] in fp32.
    """
    _need(x, weight, residual)
    _shapes(x.dim() == 2 and weight.shape == x.shape[1:], "x [N, H] and weight [H]", x, weight)
    _shapes(residual is None or (residual.shape == x.shape and residual.dtype is x.dtype), "a residual like x", x, residual)
    _shapes(gemma or offset == 0, "no offset with Llama's cast")
    n, h = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, rstd = torch.empty((n, h), dtype=out_dtype), torch.empty(n, dtype=torch.float32)
    _need(y)
    summed = None if residual is None else torch.empty_like(x)
    if x.numel():
        pointers = _pointers(x, residual, summed, weight, y, rstd)
        _library().burnish_rms_forward(n, h, *pointers, eps, offset, gemma, *_halves(x, weight, y), _threads(n * h))
    return y, summed, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    gemma: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of RMSNorm.

    Args:
        dy: [N, H] gradient of y.
        dsummed: [N, H] gradient of the sum, of x's type.
        x: [N, H] what was normalised: the sum, where there was a residual.
        weight: [H].
        rstd: fp32 [N], from the forward pass.
        offset: As in the forward pass.
        gemma: As in the forward pass.
        need_dw: Compute the weight's gradient.

    Returns:
        dx [N, H] in x's type (the gradient of x and of the residual), and dw fp32 [H] or None.
    """
    _need(dy, dsummed, x, weight, rstd)
    _shapes(x.dim() == 2 and weight.shape == x.shape[1:], "x [N, H] and weight [H]", x, weight)
    _shapes(dy.shape == x.shape and rstd.shape == x.shape[:1] and rstd.dtype is torch.float32, "dy [N, H], rstd fp32 [N]", dy, rstd)
    _shapes(dsummed is None or (dsummed.shape == x.shape and dsummed.dtype is x.dtype), "dsummed like x", x, dsummed)
    _shapes(gemma or offset == 0, "no offset with Llama's cast")
    n, h = x.shape
    dy, x, weight, rstd = dy.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    dsummed = None if dsummed is None else dsummed.contiguous()
    dx, dw = torch.empty_like(x), torch.zeros(h, dtype=torch.float32) if need_dw else None
    partial = torch.zeros((_library().burnish_rms_chunks(n), h), dtype=torch.float32) if need_dw else None
    if x.numel():
        before, after = _pointers(dy, dsummed, x, weight, rstd), _pointers(dx, partial, dw)
        _library().burnish_rms_backward(n, h, *before, offset, gemma, *after, *_halves(x, weight, dy), _threads(n * h))
    return dx, dw


def rope_apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rotates pairs (i, i + D_rot / 2) of the first D_rot dimensions; the rest passes through.

    Args:
        x: [B, H, T, D], any strides with the last dimension in one piece.
        cos: [T, D_rot].
        sin: [T, D_rot], of the same type as cos.
        inverse: The transpose instead, which is the backward pass.
        out: Where to write; may be x itself.

    Returns:
        `out`, or a new contiguous tensor.
    """
    _need(x, cos, sin, out)
    _shapes(x.dim() == 4 and x.shape[2:3] == cos.shape[:1] and cos.shape == sin.shape, "x [B, H, T, D], tables [T, D]", x, cos, sin)
    _shapes(cos.dtype is sin.dtype and cos.shape[1] <= x.shape[3] and cos.shape[1] % 2 == 0, "even tables of one type", cos, sin)
    x = x if x.stride(3) == 1 else x.contiguous()
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    same = out.shape == x.shape and out.dtype is x.dtype and (out.stride(3) == 1 or x.shape[3] <= 1)
    _shapes(same, "out like x, its last dimension in one piece", x, out)
    if x.numel():
        b, h, t, d = x.shape
        rotated = cos.shape[1]
        strides = [(ctypes.c_int64 * 3)(*y.stride()[:3]) for y in (x, out)]
        tables = [table.contiguous() for table in (cos, sin)]  # named, so that they live until the call is over
        sizes, halves = (b, h, t, rotated, d - rotated), _halves(x, cos)
        pointers = (x.data_ptr(), strides[0], *_pointers(*tables), out.data_ptr(), strides[1])
        _library().burnish_rope(*sizes, *pointers, inverse, *halves, _threads(x.numel()))
    return out


def glu_forward(gate: torch.Tensor, up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """act(gate) * up, [N, I] of one type; rows may lie apart (halves of one matrix). Returns a contiguous tensor."""
    gate, up, n, m = _flat_rows(gate, up)
    h = torch.empty(gate.shape, dtype=gate.dtype)
    if h.numel():
        inputs = (gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0))
        _library().burnish_glu_forward(n, m, *inputs, h.data_ptr(), _kind(kind), *_halves(gate), _threads(h.numel()))
    return h


def glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: Activation, want_h: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dgate, dup, h or None) from dh, gate and up [N, I], all of one type. Computing h again saves keeping it."""
    gate, up, n, m = _flat_rows(gate, up)
    _shapes(dh.shape == gate.shape and dh.dtype is gate.dtype, "dh like gate", dh, gate)
    dh = dh.contiguous()
    dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(gate.shape, dtype=gate.dtype)
    h = torch.empty(gate.shape, dtype=gate.dtype) if want_h else None
    if dh.numel():
        inputs = (dh.data_ptr(), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0))
        _library().burnish_glu_backward(n, m, *inputs, *_pointers(dgate, dup, h), _kind(kind), *_halves(gate), _threads(dh.numel()))
    return dgate, dup, h


def head_chunk(
    z: torch.Tensor, y: torch.Tensor, scale: float, softcap: float | None, write_dz: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of rows of logits, and the gradient of the target's log-probability.

    Args:
        z: [C, V] raw logits, rows in one piece. Overwritten where `write_dz`.
        y: int64 [C], each in 0..V-1.
        scale: Multiplier of the logits.
        softcap: c in `c * tanh(scale * z / c)`.
        write_dz: Replace z by d logp / dz, through soft cap and scale, in z's type.

    Returns:
        log-probability of y, log-sum-exp, mean logit, entropy (fp32 [C]), and whether y is the first largest logit (bool [C]).
    """
    _need(z)
    fits = z.dim() == 2 and z.shape[1] > 0 and (z.stride(1) == 1 or z.shape[1] == 1) and y.shape == z.shape[:1]
    _shapes(fits and y.dtype is torch.int64 and y.device.type == "cpu", "z [C, V] with rows in one piece, y int64 [C]", z, y)
    rows, size = z.shape
    out, correct = torch.empty((rows, 4), dtype=torch.float32), torch.empty(rows, dtype=torch.bool)
    if rows:
        y = y.contiguous()
        if int(y.min()) < 0 or int(y.max()) >= size:
            raise ValueError(f"targets outside 0..{size - 1}")
        inputs = (z.data_ptr(), z.stride(0), y.data_ptr(), scale, softcap or 0.0)
        _library().burnish_head(rows, size, *inputs, *_pointers(out, correct), write_dz, *_halves(z), _threads(z.numel()))
    logp, lse, mean, entropy = out.unbind(1)
    return logp, lse, mean, entropy, correct


def softmax_causal_forward(
    scores: torch.Tensor, scale: float, *, offset: int, queries: int | None = None, window: int | None = None
) -> torch.Tensor:
    """Causal softmax of `scale * scores`, in place; entries that a query does not see are not read and become exact zeros.

    Args:
        scores: [G, R, Tk], last dimension in one piece.
        scale: Factor on the scores.
        offset: Query q sees the keys up to q + offset: Tk - Tq where the last query sees the last key.
        queries: Row r stands for query r % queries (query heads of one key head, stacked). Default: R.
        window: A query sees its last `window` keys only.

    Returns:
        Log-sum-exp fp32 [G, R]; -inf where a query sees nothing (its probabilities are zeros).
    """
    _need(scores)
    _shapes(scores.dim() == 3 and (scores.stride(2) == 1 or scores.shape[2] <= 1), "scores [G, R, Tk] with rows in one piece", scores)
    groups, rows, keys = scores.shape
    lse = torch.full((groups, rows), float("-inf"), dtype=torch.float32)
    if scores.numel():
        mask = (offset, queries or rows, window or 0)
        call, threads = _library().burnish_softmax_forward, _threads(scores.numel())
        if call(groups, rows, keys, *_strided(scores), scale, *mask, lse.data_ptr(), *_halves(scores), threads):
            raise MemoryError(f"no memory for a row of {keys} scores")
    return lse


def softmax_causal_backward(
    p: torch.Tensor,
    dp: torch.Tensor,
    delta: torch.Tensor | None,
    scale: float,
    *,
    offset: int,
    queries: int | None = None,
    window: int | None = None,
) -> None:
    """Turns dp [G, R, Tk] into the scores' gradient `scale * p * (dp - delta)`, in place; zeros where a query does not see.

    Args:
        p: [G, R, Tk] probabilities from the forward pass.
        dp: Their gradient; overwritten. May have another type than p.
        delta: fp32 [G, R], sum over the keys of p * dp (which is sum of dO * O). None: computed here.
        scale: As in the forward pass, like the rest.
        offset: Diagonal.
        queries: Row modulus.
        window: Keys seen.
    """
    _need(p, dp, delta)
    _shapes(p.dim() == 3 and p.shape == dp.shape, "p and dp [G, R, Tk]", p, dp)
    _shapes(p.shape[2] <= 1 or (p.stride(2) == 1 and dp.stride(2) == 1), "rows in one piece", p, dp)
    good = delta is None or (delta.shape == p.shape[:2] and delta.dtype is torch.float32)
    _shapes(good, "delta fp32 [G, R]", p, delta)
    groups, rows, keys = p.shape
    if p.numel():
        delta = None if delta is None else delta.contiguous()
        mask = (offset, queries or rows, window or 0)
        tensors = (*_strided(p), *_strided(dp), *_pointers(delta))
        _library().burnish_softmax_backward(groups, rows, keys, *tensors, scale, *mask, *_halves(p, dp), _threads(p.numel()))


def adamw_flat(
    param: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    correction1: float,
    correction2: float,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW update in place, everything [n] in one piece.

    Args:
        param: fp32.
        grad: fp32 or bf16.
        m: fp32 first moment.
        v: fp32 second moment.
        lr: Learning rate.
        b1: Decay of m.
        b2: Decay of v.
        eps: Added to the root.
        wd: Decoupled weight decay.
        correction1: 1 - b1^t.
        correction2: 1 - b2^t.
        grad_scale: Multiplier of the gradient (clipping).
    """
    _need(param, grad, m, v)
    same = all(x.shape == param.shape and x.is_contiguous() for x in (param, grad, m, v))
    _shapes(same and {param.dtype, m.dtype, v.dtype} == {torch.float32}, "fp32 buffers of one shape in one piece", param, grad, m, v)
    if param.numel():
        factors = (grad_scale, 1 - lr * wd, 1 - b1, b2, 1 - b2, correction2**0.5, eps, -lr / correction1)
        _library().burnish_adamw(param.numel(), *_pointers(param, grad, m, v), *factors, *_halves(grad), _threads(param.numel()))


def _need(*tensors: torch.Tensor | None) -> None:
    if not takes(*tensors):
        found = ", ".join(f"{x.dtype} on {x.device.type}" for x in tensors if x is not None)
        raise ValueError(f"the C kernels take bf16 and fp32 on the CPU, found {found}")


def _shapes(good: bool, expected: str, *tensors: torch.Tensor | None) -> None:
    if not good:
        found = ", ".join(f"{x.dtype} {list(x.shape)} strides {list(x.stride())}" for x in tensors if x is not None)
        raise ValueError(f"expected {expected}" + (f", found {found}" if found else ""))


def _kind(kind: str) -> int:
    if kind not in _KINDS:
        raise ValueError(f"unknown activation '{kind}', expected one of {', '.join(_KINDS)}")
    return _KINDS[kind]


def _flat_rows(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Both with rows in one piece, and the loops' two sizes: one long row where nothing lies between the rows."""
    _need(gate, up)
    _shapes(gate.dim() == 2 and gate.shape == up.shape and gate.dtype is up.dtype, "gate and up [N, I] of one type", gate, up)
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    if gate.is_contiguous() and up.is_contiguous():
        return gate, up, 1, gate.numel()
    return gate, up, gate.shape[0], gate.shape[1]


def _strided(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _pointers(*tensors: torch.Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def _halves(*tensors: torch.Tensor) -> list[bool]:
    return [x.dtype is torch.bfloat16 for x in tensors]


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _GRAIN else 1
