"""Triton's interpreter runs the kernels on the CPU. It must be chosen before triton is imported."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
