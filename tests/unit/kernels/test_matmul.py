"""Raw products: the same numbers whichever library computes them, for any layout; dense weights in shared memory."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels import matmul
from burnish.kernels.matmul import DenseWeight, add_mm_, dense, linear, mm, mm_wide, onednn_is_faster

LARGE = (128, 96, 120)  # more than _SMALL multiplications
SMALL = (5, 3, 4)


def layouts(rows, columns, dtype, seed):
    """The same matrix, laid out in memory in different ways."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return {
        "contiguous": x,
        "transposed": x.t().contiguous().t(),
        "cut": torch.cat([x, x], dim=1)[:, :columns],
        "every other": torch.stack([x, x], dim=2).flatten(1)[:, ::2],
    }


@pytest.fixture(params=[False, True], ids=["default", "onednn"])
def library(request, monkeypatch):
    if request.param:
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    else:
        monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    return request.param


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "cut", "every other"])
@pytest.mark.parametrize("shape", [LARGE, SMALL, (0, 3, 4), (1, 2000, 600)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products(library, layout, shape, dtype):
    m, k, n = shape
    a, b, out = layouts(m, k, dtype, 0)[layout], layouts(k, n, dtype, 1)[layout], layouts(m, n, dtype, 2)["contiguous"]
    bias = torch.randn(n, dtype=dtype)
    right = a.double() @ b.double()
    # Sums of k terms: every step may round. bf16 is rounded once or twice at the end.
    tolerance = 2 * torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 else k**0.5)
    scale = 4 + (right.abs().max().item() if m else 0.0)

    def close(found, expected):
        assert found.shape == expected.shape
        assert m == 0 or (found - expected).abs().max().item() <= tolerance * scale

    close(mm(a, b), right)
    close(mm_wide(a, b), right)
    assert mm_wide(a, b).dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    close(linear(a, b.t(), bias), right + bias.double())
    before = out.double().clone()
    assert add_mm_(out, a, b) is out
    close(out, before + right)


def test_a_sum_may_be_wider_than_its_products():
    a, b, out = torch.randn(5, 3).bfloat16(), torch.randn(3, 4).bfloat16(), torch.full((5, 4), 1000.0)
    add_mm_(out, a, b)
    assert (out - 1000 - a.float() @ b.float()).abs().max() < 0.05  # a bf16 sum would be off by up to 4


def test_an_expanded_gradient(library):
    dy = torch.ones(()).expand(128, 120)
    torch.testing.assert_close(mm(dy, torch.ones(120, 96)), torch.full((128, 96), 120.0))
    torch.testing.assert_close(mm(dy.t(), torch.ones(128, 96)), torch.full((120, 96), 128.0))


def test_onednn_does_not_lower_the_precision(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", torch.backends.mkldnn.is_available)
    a, b = torch.randn(128, 1536), torch.randn(1536, 96)
    error = (mm(a, b) - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
    assert error < 2e-6  # bf16 or tf32 inside would give 1e-3


def test_the_choice_is_one_of_the_machine():
    assert onednn_is_faster() in (True, False)


class Constant:
    """A weight that is stored as one number."""

    def __init__(self, value, shape):
        self.value, self.shape, self.device = value, torch.Size(shape), torch.device("cpu")

    def dense(self, dtype, out=None):
        out = torch.empty(self.shape, dtype=dtype) if out is None else out
        return out.fill_(self.value)


def test_dense_weights_share_memory():
    large, small = Constant(1.0, (6, 5)), Constant(2.0, (2, 3))
    assert isinstance(large, DenseWeight)
    first = dense(large, torch.float32)
    assert first.tolist() == [[1.0] * 5] * 6
    second = dense(small, torch.float32)
    assert second.shape == (2, 3)
    assert second.data_ptr() == first.data_ptr()
    assert dense(large, torch.float64).data_ptr() != first.data_ptr()
    plain = torch.ones(2, 3)
    assert dense(plain, torch.float32) is plain
    assert dense(plain, torch.bfloat16).dtype is torch.bfloat16
