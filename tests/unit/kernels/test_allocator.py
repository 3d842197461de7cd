from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from burnish.kernels import allocator

CHECK = """
import resource, torch
from burnish.kernels.allocator import keep_freed_memory
def faults():
    for _ in range(10):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
assert keep_freed_memory()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_pages_are_used_again():
    # In a process of its own: the setting cannot be taken back.
    result = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    # Not none: a request with its alignment may not fit the hole that the last one left.
    assert after < before / 2


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
