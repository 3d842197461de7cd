"""The C kernels as functions on tensors: no autograd, CPU, bf16 and fp32. Shapes are checked here, since C checks nothing.

Every function raises ValueError for tensors that it cannot take, and BuildError where there is no library (see `native.ready`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from burnish.kernels.forest import Forest
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
    "attention_forward": (_I, [*[_P] * 4, _I]),
    "attention_backward": (_I, [*[_P] * 4, _I]),
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


class _Rows(ctypes.Structure):
    """rows_t of attention.h."""

    _fields_ = [("data", _P), ("head", _N), ("token", _N)]


class _Shape(ctypes.Structure):
    """shape_t of attention.h."""

    _fields_ = [
        *((name, _N) for name in ("heads", "groups", "dim", "vdim", "segments")),
        *((name, _P) for name in ("first", "parent", "before")),
        ("window", _N),
        ("scale", _F),
        ("cap", _F),
        ("half", _I),
    ]


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What the kernels of attention take besides tensors."""

    forest: Forest
    scale: float
    window: int | None = None  # keys that a query sees, the last of them its own
    softcap: float | None = None


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over a forest.

    Args:
        q: [1, Hq, T, D], any strides with the last dimension in one piece; k and v likewise, all of one type.
        k: [1, Hkv, T, D].
        v: [1, Hkv, T, D'].
        sinks: fp32 [Hq], scores that take probability and give nothing.
        options: Segments, scale, window, soft cap.

    Returns:
        The output [1, Hq, T, D'], stored as [T, Hq, D'], and of each row's softmax the largest score and the sum of the exponentials
        of the others' distance to it, sinks included: fp32 [Hkv, T, Hq / Hkv, 2].
    """
    _attention_shapes(q, k, v, options.forest)
    _shapes(sinks is None or (sinks.shape == q.shape[1:2] and sinks.dtype is torch.float32), "sinks fp32 [Hq]", q, sinks)
    output, kept = _token_by_token(q, v.shape[3]), _row_values(q, k, 2)
    if output.numel():
        shape, _arrays = _attention_shape(q, k, v, options)
        sinks = None if sinks is None else sinks.contiguous()
        rows = (_Rows * 4)(*map(_as_rows, (q, k, v, output)))
        call, threads = _library().burnish_attention_forward, _threads(q.numel())
        if call(ctypes.byref(shape), rows, *_pointers(kept, sinks), threads):
            raise MemoryError("no memory for attention")
    return output, kept


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    kept: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward`, from its arguments and results.

    Args:
        grad: [1, Hq, T, D'] gradient of the output, of its type.
        q: As in the forward pass, like k and v.
        k: Keys.
        v: Values.
        output: From the forward pass.
        kept: From the forward pass.
        options: As in the forward pass.

    Returns:
        dq, dk, dv (stored token by token), and delta fp32 [Hkv, T, Hq / Hkv], each row's sum of grad * output. The gradient of a sink is
        the sum over its tokens of -e^(sink - top) / sum * delta.
    """
    _attention_shapes(q, k, v, options.forest)
    _shapes(grad.shape == output.shape and grad.dtype is output.dtype is q.dtype, "grad like the output", grad, output)
    like = kept.shape == _row_values(q, k, 2).shape and kept.dtype is torch.float32 and kept.is_contiguous()
    _shapes(like, "what is kept of the softmax fp32 [Hkv, T, G, 2]", kept)
    delta = _row_values(q, k)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    gradients = [_token_by_token(x, x.shape[3]) for x in (q, k, v)]
    if output.numel():
        shape, _arrays = _attention_shape(q, k, v, options)
        rows = (_Rows * 8)(*map(_as_rows, (q, k, v, output, grad, *gradients)))
        call, threads = _library().burnish_attention_backward, _threads(q.numel())
        if call(ctypes.byref(shape), rows, *_pointers(kept, delta), threads):
            raise MemoryError("no memory for attention")
    return gradients[0], gradients[1], gradients[2], delta


def _attention_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forest: Forest) -> None:
    _need(q, k, v)
    good = all(x.dim() == 4 and x.shape[0] == 1 and x.dtype is q.dtype and (x.stride(3) == 1 or x.shape[3] <= 1) for x in (q, k, v))
    _shapes(good, "q, k, v [1, H, T, D] of one type with rows in one piece", q, k, v)
    good = q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3] and q.shape[2] == k.shape[2] and q.shape[1] % max(k.shape[1], 1) == 0
    _shapes(good, "key heads that divide the query heads, and as many tokens everywhere", q, k, v)
    total = forest.doc_ends[-1] if forest.doc_ends else 0
    _shapes(total == q.shape[2], f"the {total} tokens of the segments", q)


def _attention_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> tuple[_Shape, object]:
    """The structure, and the arrays that it points to."""
    forest = options.forest
    arrays = [(_N * len(x))(*x) for x in ((0, *forest.doc_ends), forest.parents, forest.inherited)]
    sizes = (k.shape[1], q.shape[1] // k.shape[1], q.shape[3], v.shape[3], len(forest.parents))
    pointers = (ctypes.cast(x, _P) for x in arrays)
    return _Shape(*sizes, *pointers, options.window or 0, options.scale, options.softcap or 0.0, *_halves(q)), arrays


def _as_rows(x: torch.Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(1), x.stride(2))


def _token_by_token(x: torch.Tensor, size: int) -> torch.Tensor:
    """Memory for [1, H, T, size] like x, in which a token's heads lie together."""
    return torch.empty(1, x.shape[2], x.shape[1], size, dtype=x.dtype).transpose(1, 2)


def _row_values(q: torch.Tensor, k: torch.Tensor, *each: int) -> torch.Tensor:
    return torch.empty(k.shape[1], k.shape[2], q.shape[1] // max(k.shape[1], 1), *each, dtype=torch.float32)


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


def _pointers(*tensors: torch.Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def _halves(*tensors: torch.Tensor) -> list[bool]:
    return [x.dtype is torch.bfloat16 for x in tensors]


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _GRAIN else 1
