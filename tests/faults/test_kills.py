"""F1, F2, F6, F8: runs that are killed, told to stop, and gone on with.

A part of the fault suite; `make faults` runs all of it."""

from __future__ import annotations

import pytest
from tests.faults.suite import f01_kill, f02_signals, f06_resume
from tests.faults.suite.tries import Lab, Try, pick


@pytest.mark.parametrize("one", pick(f01_kill, f02_signals, f06_resume), ids=str)
def test_survived(one: Try, lab: Lab) -> None:
    one.run(lab)
