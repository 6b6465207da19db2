"""Simulated pipeline schedules against published formulas, and what must hold for every schedule."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.plan.schedule import SCHEDULES, Pass, Schedule, build
from shoal.plan.timeline import StageCost, simulate

# F = I and F&B <= F + B: the case the published formulas are derived for
COSTS = [StageCost(1, 1, 1), StageCost(1, 1, 0.5), StageCost(2, 2, 1.5), StageCost(1, 1, 0.8, overlapped=2.4)]


@pytest.mark.parametrize("devices", [4, 8, 16])
@pytest.mark.parametrize("cost", COSTS)
def test_bubbles_and_activations_equal_the_formulas(devices: int, cost: StageCost) -> None:
    """DeepSeek-V3 (2412.19437), table 2."""
    forward, backward, weights = cost.forward, cost.backward, cost.weight_gradient
    microbatches = 3 * devices

    one = simulate(build("1f1b", devices, microbatches), cost)
    assert one.bubble == pytest.approx((devices - 1) * (forward + backward))
    assert max(map(one.peak_activations, range(devices))) == devices

    zero = simulate(build("zb1p", devices, microbatches), cost)
    assert zero.bubble == pytest.approx((devices - 1) * (forward + backward - 2 * weights))
    assert max(map(zero.peak_activations, range(devices))) == devices

    dual = simulate(build("dualpipe", devices, microbatches), cost)
    assert dual.bubble == pytest.approx((devices // 2 - 1) * (cost.pair + backward - 3 * weights))
    assert {dual.peak_activations(device) for device in range(devices)} == {devices + 1}

    half = simulate(build("dualpipev", devices // 2, microbatches), cost)
    assert half.schedule.stages == devices
    assert half.bubble == pytest.approx((devices // 2 - 1) * (cost.pair + backward - 3 * weights))
    assert {half.peak_activations(device) for device in range(devices // 2)} == {devices + 1}


@pytest.mark.parametrize("devices", [4, 8, 16])
@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_divides_the_bubble(devices: int, chunks: int) -> None:
    """2104.04473, section 2.2: the bubble of 1F1B divided by the number of stages per device."""
    whole = simulate(build("1f1b", devices, 2 * devices), StageCost(1, 1, 1))
    parts = simulate(build("interleaved", devices, 2 * devices, chunks), StageCost(1 / chunks, 1 / chunks, 1 / chunks))
    assert parts.bubble == pytest.approx(whole.bubble / chunks)
    assert parts.peak_activations(0) == devices * chunks + devices - 1


@pytest.mark.parametrize("devices", [4, 8, 16])
def test_zero_bubble_v_has_none_with_the_memory_of_1f1b(devices: int) -> None:
    timeline = simulate(build("zbv", devices, 2 * devices), StageCost(1, 1, 1))
    for device, row in enumerate(timeline.compute):  # nothing idles between its own first and last action (2401.10241, section 6)
        assert timeline.busy(device) == pytest.approx(row[-1].end - row[0].start)
    assert max(map(timeline.peak_activations, range(devices))) == 2 * devices  # of stages half as large


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    devices = 2 * draw(st.integers(1, 4))
    microbatches = devices * draw(st.integers(2, 5))
    return build(name, devices, microbatches)


@settings(max_examples=60)
@given(schedules(), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 2))
def test_every_schedule_does_all_work_once_and_in_order(
    schedule: Schedule, forward: float, inputs: float, weights: float, transfer: float
) -> None:
    timeline = simulate(schedule, StageCost(forward, inputs, weights), transfer)
    passes = Counter(p for row in schedule.rows for action in row for p in action)
    assert set(passes.values()) == {1}
    for stage in range(schedule.stages):
        for m in range(schedule.microbatches):
            assert passes[Pass("F", stage, m)] == 1
            split = passes[Pass("I", stage, m)], passes[Pass("W", stage, m)]
            assert split == (1, 1) if split[0] else passes[Pass("B", stage, m)] == 1
    for row in timeline.compute:
        assert all(a.end <= b.start for a, b in pairwise(row))
    work = schedule.microbatches * schedule.stages * (forward + inputs + weights)
    assert sum(timeline.busy(device) for device in range(schedule.devices)) == pytest.approx(work)
    arrivals = {p: e.end for e in timeline.transfers if e.kind == "receive" for p in e.passes}
    starts = {p: e.start for row in timeline.compute for e in row for p in e.passes}
    assert all(starts[p] >= arrival for p, arrival in arrivals.items())


def test_slowest_stage_sets_the_pace() -> None:
    even = simulate(build("1f1b", 4, 16), [StageCost(1, 1, 1)] * 4)
    uneven = simulate(build("1f1b", 4, 16), [StageCost(1, 1, 1)] * 3 + [StageCost(2, 2, 2)])
    assert uneven.makespan >= even.makespan + 15 * 3


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("gpipe", 4, 8), "1f1b"),
        (("dualpipe", 5, 20), "6"),
        (("dualpipe", 4, 9), "10"),
        (("dualpipe", 8, 4), "12 more"),
        (("interleaved", 4, 10), "use 8"),
        (("zbv", 4, 3), "5 more"),
    ],
)
def test_undefined_schedules_name_the_nearest_that_works(arguments: tuple[str, int, int], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        build(*arguments)
