"""F3 to F5, F14 to F18, F20: storage that fails, and checkpoints that were whole once.

A part of the fault suite; `make faults` runs all of it."""

from __future__ import annotations

import pytest
from tests.faults.suite import f03_disk, f04_damage, f14_folder
from tests.faults.suite.tries import Lab, Try, pick


@pytest.mark.parametrize("one", pick(f03_disk, f04_damage, f14_folder), ids=str)
def test_survived(one: Try, lab: Lab) -> None:
    one.run(lab)
