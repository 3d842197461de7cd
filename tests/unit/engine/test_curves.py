"""Smoothing, and what the pictures show."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.engine.curves import curves_of, smooth


def lines(count: int) -> list[dict[str, float]]:
    keys = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    return [{"step": step, **dict.fromkeys(keys, 1.0 / step)} for step in range(1, count + 1)]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=80), st.floats(1, 20))
def test_a_smoothed_curve_stays_within_the_raw_one(values: list[float], width: float):
    found = smooth(np.array(values), width=width)
    assert len(found) == len(values)
    assert found.min() >= min(values) - 1e-9 and found.max() <= max(values) + 1e-9


def test_a_straight_line_stays_straight_and_does_not_lag():
    values = np.arange(100.0)
    np.testing.assert_allclose(smooth(values, width=3)[10:-10], values[10:-10])


def test_gaps_are_passed_over():
    values = np.full(50, 2.0)
    values[20:25] = math.nan
    np.testing.assert_allclose(smooth(values, width=3), 2.0)
    assert np.isnan(smooth(np.full(5, math.nan))).all()


@pytest.mark.parametrize("count", [1, 3, 30, 4000])
def test_pictures_of_short_and_long_runs(count: int, tmp_path: Path):
    evaluations = [{"step": count, "eval_loss": 0.7}]
    curves = curves_of(lines(count), evaluations, best_step=count)
    assert [curve.name for curve in curves] == ["loss", "learning_rate", "grad_norm", "tokens_per_second"]
    curves[0].png(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    svg = curves[0].svg()
    assert b"<svg" in svg and len(svg) < 300_000
    labels = [line.get_label() for line in curves[0].figure.axes[0].get_lines()]
    assert "held out" in labels and "training" in labels


def test_a_spike_does_not_flatten_the_rest():
    found = lines(200)
    found[100]["loss"] = 1000.0
    axes = curves_of(found, [])[0].figure.axes[0]
    assert axes.get_ylim()[1] < 2


def test_numbers_that_were_not_finite_are_gaps():
    found = [{**line, "loss": None} for line in lines(3)]
    assert len(curves_of(found, [{"step": 3, "eval_loss": None}])) == 4


def test_no_steps_no_pictures():
    assert curves_of([], []) == []
