"""Spikes: only what is far above the steps before, and only when there are enough of them."""

from burnish.config.sections import Spike
from burnish.engine.spikes import Spikes


def of(losses: list[float], **settings: float) -> Spikes:
    spikes = Spikes(Spike.model_validate({"window": 8, **settings}))
    for loss in losses:
        spikes.add(loss)
    return spikes


def test_the_line_is_sigma_standard_deviations_above_the_mean() -> None:
    spikes = of([1.0, 3.0] * 4, sigma=2.0)  # mean 2, deviation 1
    assert not spikes.is_one(4.0) and spikes.is_one(4.001) and not spikes.is_one(-50.0)


def test_too_few_steps_are_no_ground() -> None:
    assert not of([1.0] * 7).is_one(100.0) and of([1.0] * 8).is_one(100.0)


def test_the_window_moves_and_comes_back() -> None:
    spikes = of([100.0] * 8 + [1.0] * 8)
    assert spikes.state() == [1.0] * 8 and spikes.is_one(50.0)
    other = of([])
    other.restore(spikes.state())
    assert other.is_one(50.0) and other.state() == spikes.state()
