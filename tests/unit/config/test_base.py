from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from burnish.config.base import Duration, Kind, LongForm, OneOrMany, read_seconds, read_tokens, read_warmup, written_seconds
from burnish.config.sections import Model, Optimizer, Parallel, Schedule, Source, Train


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("2ep", 2, "ep"), ("0.5ep", 0.5, "ep"), ("500st", 500, "st"), ("1.5Btok", 1.5e9, "tok"), (7, 7, "st"), (" 3 kst ", 3000, "st")],
)
def test_durations_carry_their_unit(text: object, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("text", ["", "2", "ep", "2 epochs", "-1ep", "0st", 0, -3, True, None, 1.5, "nanep", "1e999tok"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("seconds", "written"), [(1800.0, "30m"), (90.0, "90s"), (7200.0, "2h"), (0.5, 0.5), (3660.0, "61m"), (1e9, "1000000000s")]
)
def test_times_are_written_as_they_are_read(seconds: float, written: str | float) -> None:
    assert written_seconds(seconds) == written and read_seconds(written) == seconds


@given(st.floats(min_value=1e-6, max_value=1e15), st.sampled_from(["ep", "st", "tok"]))
def test_a_duration_survives_being_written(value: float, unit: str) -> None:
    duration = Duration(float(f"{value:.15g}"), unit)  # pyright: ignore[reportArgumentType]
    assert Duration.parse(str(duration)) == duration


@given(st.integers(1, 10**9), st.floats(1, 1e6), st.floats(1, 1e6), st.sampled_from(["ep", "st", "tok"]))
def test_a_duration_is_at_least_one_step(value: int, per_epoch: float, per_step: float, unit: str) -> None:
    steps = Duration(float(value), unit).steps(steps_per_epoch=per_epoch, tokens_per_step=per_step)  # pyright: ignore[reportArgumentType]
    assert steps >= 1


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    assert Duration.parse("1001tok").steps(steps_per_epoch=1, tokens_per_step=100) == 11


@pytest.mark.parametrize(
    ("written", "tokens"), [("1.5B", 1_500_000_000), ("250k", 250_000), ("3e6", 3_000_000), (1e3, 1000), ("10Mtok", 10_000_000), (7, 7)]
)
def test_tokens_may_be_scaled(written: object, tokens: int) -> None:
    assert read_tokens(written) == tokens
    assert Train(tokens=written).tokens == tokens  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("written", ["many", "1.5G", "0", -1, 1.5, True])
def test_bad_amounts_of_tokens_are_refused(written: object) -> None:
    with pytest.raises(ValidationError):
        Train(tokens=written)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("written", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), (20, 20), (0.5, 0.5), (" 2 m ", 120)])
def test_a_time_may_carry_its_unit(written: object, seconds: float) -> None:
    assert Parallel.model_validate({"timeout": written}).timeout == seconds


@pytest.mark.parametrize("written", ["", "30", "30 min", "-1s", "0s", 0, -3, True, None, "2d"])
def test_what_is_no_time_is_refused(written: object) -> None:
    with pytest.raises(ValidationError):
        Parallel.model_validate({"timeout": written})


def test_a_warmup_is_a_share_a_number_of_steps_or_a_duration() -> None:
    assert read_warmup(0.03) == 0.03
    assert Schedule(warmup=100).warmup == 100 and isinstance(Schedule(warmup=100).warmup, int)
    assert Schedule.model_validate({"warmup": "0.1ep"}).warmup == Duration(0.1, "ep")


@pytest.mark.parametrize("warmup", [1.0, 1.5, -0.1, -3, True, None, "soon"])
def test_bad_warmups_are_refused(warmup: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_warmup(warmup)


def test_sections_have_short_forms_from_python_too() -> None:
    train = Train.model_validate({"optimizer": "lion", "schedule": "wsd"})
    assert (train.optimizer.kind, train.schedule.kind) == ("lion", "wsd")
    assert LongForm("path").expand({"path": "x"}) == {"path": "x"}
    assert OneOrMany().expand("x") == ["x"] and OneOrMany().expand(["x"]) == ["x"]


def test_nothing_is_coerced_and_nothing_is_changed() -> None:
    with pytest.raises(ValidationError):
        Model(path=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValidationError, match="frozen"):
        Model(path="x").path = "y"


def test_names_of_parts_are_checked() -> None:
    table = Kind(lambda: ("sft",), "objectives")
    assert table.check("sft") == "sft" and table.check("./mine.py:Loss") == "./mine.py:Loss"
    with pytest.raises(ValueError, match="did you mean 'sft'"):
        table.check("sfft")
    with pytest.raises(ValidationError, match="did you mean 'alpaca'"):
        Source(path="x", format="alpca")


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("auto", "auto")])
def test_short_names_of_float_types(short: str, full: str) -> None:
    assert Train.model_validate({"precision": short}).precision == full


@pytest.mark.parametrize("betas", [[0.9], [0.9, 1.0], [0.9, "x"], [0.9, 0.99, 0.999]])
def test_betas_are_two_numbers_below_one(betas: list[object]) -> None:
    assert Optimizer.model_validate({"betas": [0.9, 0.95]}).betas == (0.9, 0.95)
    with pytest.raises(ValidationError):
        Optimizer.model_validate({"betas": betas})


@pytest.mark.parametrize(("written", "value"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_a_switch_may_be_a_boolean(written: object, value: str) -> None:
    assert Train.model_validate({"checkpoint_activations": written}).checkpoint_activations == value
