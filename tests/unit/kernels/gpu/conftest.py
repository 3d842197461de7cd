"""Triton's interpreter runs the kernels on the CPU; tests/conftest.py switches it on."""

import pytest

pytest.importorskip("triton")
