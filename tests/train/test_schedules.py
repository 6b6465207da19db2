"""What changes over the budget, and the budget itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import MTPConfig, ScheduleConfig, TrainConfig
from shoal.train.budget import Budget
from shoal.train.schedule import learning_rate_share, mtp_weight

SHARE = st.floats(0, 1)
SCHEDULES = st.builds(ScheduleConfig, name=st.sampled_from(["trapezoid", "cosine"]), warmup=st.floats(0, 0.9), decay=SHARE, final=SHARE)


@given(SCHEDULES, st.floats(-1, 2))
def test_the_rate_is_a_share_and_never_below_the_final_one_after_warmup(schedule: ScheduleConfig, progress: float) -> None:
    share = learning_rate_share(schedule, progress)
    assert 0 <= share <= 1
    if progress >= schedule.warmup:
        assert share >= schedule.final - 1e-12


@given(SCHEDULES, SHARE, SHARE)
def test_the_rate_rises_through_warmup_and_then_only_falls(schedule: ScheduleConfig, a: float, b: float) -> None:
    early, late = sorted((a, b))
    first, second = learning_rate_share(schedule, early), learning_rate_share(schedule, late)
    if late < schedule.warmup:
        assert first <= second
    elif early >= schedule.warmup:
        assert first >= second


@given(SCHEDULES)
def test_the_rate_reaches_its_peak_after_warmup_and_its_final_share_at_the_end(schedule: ScheduleConfig) -> None:
    assert learning_rate_share(schedule, schedule.warmup) == pytest.approx(1.0)
    assert learning_rate_share(schedule, 1.0) == pytest.approx(schedule.final)
    if schedule.warmup > 1e-6:
        assert learning_rate_share(schedule, schedule.warmup * (1 - 1e-9)) == pytest.approx(1.0)
        assert learning_rate_share(schedule, 0.0) == 0


def test_trapezoid_and_cosine_at_known_points() -> None:
    trapezoid = ScheduleConfig("trapezoid", warmup=0.1, decay=0.4, final=0.2)
    assert [learning_rate_share(trapezoid, x) for x in (0.05, 0.3, 0.6)] == pytest.approx([0.5, 1, 1])
    assert learning_rate_share(trapezoid, 0.8) == pytest.approx(0.2 + 0.8 * 0.5)
    cosine = ScheduleConfig("cosine", warmup=0.2, final=0.1)
    assert learning_rate_share(cosine, 0.6) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_share(cosine, 0.4) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


@given(st.floats(0, 1), st.floats(0, 1), SHARE)
def test_mtp_weight_goes_straight_from_first_to_last(first: float, last: float, progress: float) -> None:
    config = MTPConfig(first, last)
    assert mtp_weight(config, 0) == first
    assert mtp_weight(config, 1) == pytest.approx(last)
    assert mtp_weight(config, progress) == pytest.approx(first * (1 - progress) + last * progress)


@pytest.mark.parametrize(
    ("budget", "step", "seconds", "expected"),
    [
        ({"steps": 8}, 2, 1e9, 0.25),
        ({"minutes": 2.0}, 10**9, 30.0, 0.25),
        ({"tokens": 4096}, 2, 1e9, 0.25),  # 2 steps of 16 x 32 tokens
    ],
)
def test_progress_is_measured_in_what_the_budget_is_given_in(budget: dict[str, Any], step: int, seconds: float, expected: float) -> None:
    config = TrainConfig(batch_size=16, sequence_length=32, **budget)
    assert Budget.of(config).progress(step, seconds) == pytest.approx(expected)
    assert Budget.of(config).seconds_left(step, seconds) == pytest.approx(3 * seconds)
    assert Budget.of(config).seconds_left(0, 0.0) == math.inf


def test_a_token_budget_that_is_no_whole_number_of_steps_ends_after_the_step_that_reaches_it() -> None:
    budget = Budget.of(TrainConfig(batch_size=2, sequence_length=10, tokens=50))
    assert budget.progress(2, 0) < 1 == budget.progress(3, 0)
    assert Budget.of(TrainConfig(minutes=1)).progress(9, 66.0) == 1, "the step that the clock runs out in"


@given(SHARE, SHARE)
def test_mtp_costs_nothing_before_it_begins(begins: float, progress: float) -> None:
    assert (mtp_weight(MTPConfig(begins=begins), progress) == 0) == (progress < begins)
