from __future__ import annotations

import pytest
import torch

from burnish.kernels.dispatch import attention_kind, cpu_has_fast_bf16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = {"tree": False, "softcap": False, "sinks": False, "dropout": False}


@pytest.mark.parametrize(
    ("device", "dtype", "size", "special", "expected"),
    [
        (CPU, torch.float32, 64, None, "sdpa"),
        (CPU, torch.bfloat16, 64, "tree", "sdpa"),
        (CPU, torch.bfloat16, 64, "softcap", "eager"),
        (CUDA, torch.bfloat16, 64, None, "varlen"),
        (CUDA, torch.float16, 256, None, "varlen"),
        (CUDA, torch.float32, 64, None, "sdpa"),
        (CUDA, torch.bfloat16, 63, None, "sdpa"),
        (CUDA, torch.bfloat16, 512, None, "sdpa"),
        (CUDA, torch.bfloat16, 64, "tree", "sdpa"),
        (CUDA, torch.bfloat16, 64, "dropout", "sdpa"),
        (CUDA, torch.bfloat16, 64, "sinks", "eager"),
    ],
)
def test_attention_follows_device_type_and_needs(device, dtype, size, special, expected):
    needs = {**PLAIN, **({special: True} if special else {})}
    assert attention_kind(device, dtype, size, **needs) == expected


@pytest.mark.parametrize(
    ("features", "expected"),
    [({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True)],
)
def test_fast_bf16_needs_its_instructions(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert cpu_has_fast_bf16() is expected


def test_an_old_torch_that_cannot_tell_says_no(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_has_fast_bf16() is False
