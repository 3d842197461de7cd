"""F9 to F11: gradients that are not finite, losses that jump, memory that is not there.

A part of the fault suite; `make faults` runs all of it."""

from __future__ import annotations

import pytest
from tests.faults.suite import f09_numbers
from tests.faults.suite.tries import Lab, Try, pick


@pytest.mark.parametrize("one", pick(f09_numbers), ids=str)
def test_survived(one: Try, lab: Lab) -> None:
    one.run(lab)
