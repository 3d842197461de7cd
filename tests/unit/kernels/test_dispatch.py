from __future__ import annotations

import pytest
import torch

from burnish.kernels.dispatch import attention_kind, cpu_has_fast_bf16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = {"tree": False, "softcap": False, "sinks": False, "dropout": False}


@pytest.fixture(autouse=True)
def without_c_kernels(monkeypatch):
    monkeypatch.setattr("burnish.kernels.dispatch.available", lambda _: False)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "special", "expected"),
    [
        (CPU, torch.float32, 64, None, "sdpa"),
        (CPU, torch.bfloat16, 64, "tree", "sdpa"),
        (CPU, torch.bfloat16, 64, "softcap", "gemm"),
        (CPU, torch.bfloat16, 64, "sinks", "gemm"),
        (CPU, torch.bfloat16, 64, "dropout", "sdpa"),
        (CUDA, torch.bfloat16, 64, None, "varlen"),
        (CUDA, torch.float16, 256, None, "varlen"),
        (CUDA, torch.float32, 64, None, "sdpa"),
        (CUDA, torch.bfloat16, 63, None, "sdpa"),
        (CUDA, torch.bfloat16, 512, None, "sdpa"),
        (CUDA, torch.bfloat16, 0, None, "sdpa"),
        (CUDA, torch.bfloat16, 64, "tree", "cascade"),
        (CUDA, torch.float32, 64, "tree", "sdpa"),
        (CUDA, torch.bfloat16, 64, "dropout", "sdpa"),
        (CUDA, torch.bfloat16, 64, "sinks", "cascade"),
        (CUDA, torch.float32, 64, "sinks", "eager"),
        (CUDA, torch.bfloat16, 64, "softcap", "eager"),
    ],
)
def test_attention_follows_device_type_and_needs(device, dtype, size, special, expected):
    needs = {**PLAIN, **({special: True} if special else {})}
    assert attention_kind(device, dtype, size, **needs) == expected


@pytest.mark.parametrize(
    ("dtype", "lengths", "window", "tree", "expected"),
    [
        (torch.float32, (30, 40), None, False, "sdpa"),
        (torch.float32, (30, 40), None, True, "gemm"),
        (torch.float32, (120, 80), None, False, "gemm"),
        (torch.float32, (1536, 700), None, False, "gemm"),
        (torch.float32, (2000, 700), None, False, "sdpa"),
        (torch.float32, (2000, 700), 512, False, "gemm"),
        (torch.float32, (2000, 700), 4096, True, "sdpa"),
        (torch.bfloat16, (9000,), None, False, "sdpa"),
    ],
)
def test_attention_on_a_cpu_follows_the_lengths(dtype, lengths, window, tree, expected):
    assert attention_kind(CPU, dtype, 64, **{**PLAIN, "tree": tree}, window=window, lengths=lengths) == expected


@pytest.mark.parametrize(
    ("dtype", "needs", "expected"),
    [
        (torch.bfloat16, {}, "native"),
        (torch.float32, {"tree": True, "softcap": True, "sinks": True}, "native"),
        (torch.float32, {"dropout": True}, "sdpa"),
        (torch.float16, {}, "gemm"),
        (torch.float64, {"softcap": True}, "gemm"),
    ],
)
def test_c_kernels_take_what_they_know(monkeypatch, dtype, needs, expected):
    monkeypatch.setattr("burnish.kernels.dispatch.available", lambda _: True)
    assert attention_kind(CPU, dtype, 64, **{**PLAIN, **needs}, lengths=(1, 9000) if expected == "native" else (300,)) == expected


@pytest.mark.parametrize(
    ("lengths", "window", "tree", "expected"),
    [
        ((2048, 2048), None, False, "sdpa"),
        ((2048,), 4096, False, "sdpa"),
        ((2048, 2048), 512, False, "varlen"),
        ((2048, 1024), None, False, "varlen"),
        ((100, 100), None, False, "varlen"),
        ((2048, 2048), None, True, "cascade"),
    ],
)
def test_equal_lengths_are_an_ordinary_batch_on_a_gpu(lengths, window, tree, expected):
    found = attention_kind(CUDA, torch.bfloat16, 64, **{**PLAIN, "tree": tree}, window=window, lengths=lengths)
    assert found == expected


@pytest.mark.parametrize(("fast", "expected"), [(True, "gemm"), (False, "sdpa")])
def test_fast_bf16_moves_the_threshold(monkeypatch, fast, expected):
    monkeypatch.setattr("burnish.kernels.dispatch.cpu_has_fast_bf16", lambda: fast)
    assert attention_kind(CPU, torch.bfloat16, 64, **PLAIN, lengths=(64,)) == expected
    assert attention_kind(CPU, torch.bfloat16, 64, **PLAIN, lengths=(2000,)) == expected


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
