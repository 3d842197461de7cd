"""Schedules against numbers worked out by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.config.base import Duration
from burnish.config.sections import Schedule, Train
from burnish.core.errors import ConfigError
from burnish.engine.schedule import effective, learning_rate, total_steps, warmup_steps

KINDS = ("constant", "linear", "cosine", "wsd", "inverse_sqrt", "polynomial")


def curve(total: int, **settings: object) -> list[float]:
    schedule = Schedule.model_validate({"warmup": 0, **settings})
    return [learning_rate(schedule, step, total) for step in range(total)]


def test_constant():
    assert curve(3, kind="constant") == [1.0, 1.0, 1.0]


def test_linear():
    assert curve(4, kind="linear") == [1.0, 0.75, 0.5, 0.25]


def test_linear_with_a_floor():
    assert curve(4, kind="linear", floor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine():
    assert curve(4, kind="cosine") == pytest.approx([1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2])


def test_cosine_with_a_floor():
    assert curve(4, kind="cosine", floor=0.1)[2] == pytest.approx(0.55)


def test_wsd_falls_in_the_last_fifth():
    assert curve(10, kind="wsd", decay=0.2) == pytest.approx([1.0] * 9 + [0.5])


def test_polynomial():
    assert curve(4, kind="polynomial", power=2.0) == pytest.approx([1.0, 0.5625, 0.25, 0.0625])


def test_inverse_sqrt():
    found = curve(20, kind="inverse_sqrt", warmup=4)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[4 + 12] == pytest.approx(0.5)  # sqrt(4 / 16)


def test_warmup_rises_in_equal_parts_and_never_starts_at_zero():
    assert curve(6, kind="linear", warmup=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [(0.1, 20), (0, 0), (7, 7), (500, 200), (Duration(0.5, "ep"), 25), (Duration(1000, "tok"), 10), (Duration(3, "st"), 3)],
)
def test_warmup_in_every_unit(warmup: object, steps: int):
    schedule = Schedule.model_validate({"warmup": warmup})
    assert warmup_steps(schedule, 200, steps_per_epoch=50, tokens_per_step=100) == steps


@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 300),
    warmup=st.integers(0, 300),
    floor=st.floats(0, 0.9),
    power=st.floats(0.5, 3),
)
def test_every_schedule_stays_within_its_bounds_and_only_falls_after_the_warmup(
    kind: str, total: int, warmup: int, floor: float, power: float
):
    found = curve(total, kind=kind, warmup=warmup, floor=floor, power=power)
    assert all(0 < value <= 1 + 1e-12 for value in found)
    after = found[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert all(value >= floor - 1e-12 for value in after)


def test_schedule_free_keeps_only_the_warmup():
    schedule = Schedule(kind="cosine", warmup=3)
    assert effective(schedule, "adamw_schedule_free") == Schedule(kind="constant", warmup=3)
    assert effective(schedule, "adamw") is schedule


def test_the_length_of_a_run():
    def steps(**train: object) -> int:
        return total_steps(Train.model_validate(train), steps_per_epoch=40, tokens_per_step=1000.0)

    assert steps() == 40
    assert steps(epochs=2.5) == 100
    assert steps(steps=7) == 7
    assert steps(tokens=1_000_001) == 1001
    assert steps(tokens="1M") == 1000


def test_a_stream_has_no_epochs():
    with pytest.raises(ConfigError, match="length of streamed data"):
        total_steps(Train(epochs=1.0), steps_per_epoch=None, tokens_per_step=10)
