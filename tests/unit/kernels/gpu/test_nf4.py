"""NF4 weights made dense in Triton, under its interpreter, equal those of plain torch."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels.nf4 import dequantize_nf4


def packed(shape, blocksize=64):
    generator = torch.Generator().manual_seed(0)
    n = shape[0] * shape[1]
    return (
        torch.randint(256, ((n + 1) // 2, 1), generator=generator, dtype=torch.uint8),
        torch.rand(-(-n // blocksize), generator=generator),
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (64, 64), (40, 130), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_plain_torch(shape, dtype):
    given = packed(shape)
    found = dequantize_nf4(*given, shape, dtype, impl="triton")
    assert torch.equal(found, dequantize_nf4(*given, shape, dtype, impl="torch"))


def test_block_size():
    given = packed((9, 200), 32)
    found = dequantize_nf4(*given, (9, 200), torch.float32, blocksize=32, impl="triton")
    assert torch.equal(found, dequantize_nf4(*given, (9, 200), torch.float32, blocksize=32, impl="torch"))


def test_bf16_runs():
    # The interpreter may round a bf16 store to the other neighbour: one step of 2^-7 relative at most.
    given = packed((9, 200))
    found = dequantize_nf4(*given, (9, 200), torch.bfloat16, impl="triton")
    torch.testing.assert_close(found.float(), dequantize_nf4(*given, (9, 200), torch.float32, impl="torch"), rtol=2**-7, atol=0)
