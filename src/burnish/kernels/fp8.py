"""Frozen weights in FP8 (e4m3fn, Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433) with one scale per output channel.

    scale[o] = max over i of |W[o, i]| / 448        stored = round(W / scale) to e4m3        W' = stored * scale

A storage format: half the bytes of bf16, and products run in bf16 on the dense weight, so activations are never rounded to 8 bits. e4m3 has
3 bits of fraction, so an element is off by at most 2^-4 of itself where it is at least 2^-6 scale (a 28672nd of its row's largest), and by
at most 2^-10 scale below that. Making it dense in bf16 rounds once more, 2^-9 of the element.
"""

from __future__ import annotations

import torch

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite number of e4m3fn."""


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [out, in], fp32 scale [out]) of a weight [out, in].

    Raises:
        ValueError: the weight is not a matrix, or holds an infinity or a NaN, which would take its whole row with it.
    """
    if weight.dim() != 2:
        raise ValueError(f"expected a weight of shape [out, in], found {list(weight.shape)}")
    wide = weight.detach().float()
    largest = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("the weight is not finite")
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)  # a row of zeros has any scale
    # The division may round past the largest number, whose neighbour above is NaN.
    return (wide / scale[:, None]).clamp_(-LARGEST, LARGEST).to(FORMAT), scale


class FP8Weight:
    """A frozen [out, in] weight in FP8: a `kernels.matmul.DenseWeight`."""

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor, *, checked: bool = False) -> None:
        """Holds e4m3 [out, in] and fp32 [out].

        Args:
            stored: What `quantize_fp8` made.
            scale: Likewise.
            checked: It comes from there as it is, so it is not looked through for NaN again.

        Raises:
            ValueError: types or shapes do not fit, or an element is NaN.
        """
        if stored.dtype is not FORMAT or scale.shape != stored.shape[:1]:
            raise ValueError(
                f"expected {FORMAT} [out, in] and a scale [out], found {stored.dtype} {list(stored.shape)}, {list(scale.shape)}"
            )
        if not checked and bool((stored.view(torch.uint8).bitwise_and(127) == 127).any()):
            raise ValueError("the weight holds a NaN")
        self.stored, self.scale = stored, scale

    @classmethod
    def of(cls, weight: torch.Tensor) -> FP8Weight:
        """A plain weight, quantised; see `quantize_fp8`."""
        return cls(*quantize_fp8(weight))

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.stored.shape

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        return self.stored.device

    def dense(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [out, in] in `dtype`, in `out` where given."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        rows = max(1, _CHUNK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], rows):
            part = slice(start, start + rows)
            out[part] = _small(self.stored[part]).float().mul_((self.scale[part] * 2.0**8)[:, None])
        return out


def _small(stored: torch.Tensor) -> torch.Tensor:
    """Finite e4m3 numbers times 2^-8, in fp16, exactly.

    Both formats are sign, exponent, fraction, so the bits need only move: s eeee fff becomes s 0eeee fff0000000, whose exponent counts from
    8 lower. Two integer operations on a CPU, where torch converts FP8 one number after another (20 times slower).
    """
    bits = stored.view(torch.int8).to(torch.int16)  # the sign fills the upper nine bits
    return bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)


_CHUNK = 1 << 22
"""Elements made dense at once: the product with the scale is made in fp32, so that it is rounded once."""
