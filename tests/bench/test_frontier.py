"""Ratios at equal loss: exact on power laws, never outside of what was run."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench.efficiency.frontier import best_ratio, bound, cost_at, figures, lower_hull, overlap, ratio_at

COSTS = (1.0, 4.0, 10.0)


def line(shift: float, slope: float = 0.3, costs: tuple[float, ...] = COSTS) -> list[tuple[float, float]]:
    """Loss falls by `slope` a decade; everything costs `shift` times as much as at shift 1."""
    return [(cost * shift, 3.0 - slope * math.log10(cost)) for cost in costs]


@given(st.floats(0.01, 100), st.floats(0.05, 2))
def test_a_curve_that_is_cheaper_everywhere_is_so_at_every_loss(shift: float, slope: float) -> None:
    ratio = best_ratio([line(shift, slope)] * 3, [line(1, slope)] * 3)
    assert ratio is not None
    assert ratio.value == pytest.approx(shift)
    assert ratio.low == pytest.approx(shift)
    assert ratio.loss == pytest.approx(3.0 - slope)


@given(st.floats(1.0, 10.0))
def test_interpolation_is_exact_where_the_loss_is_linear_in_the_logarithm(cost: float) -> None:
    assert cost_at(line(1), 3.0 - 0.3 * math.log10(cost)) == pytest.approx(cost)


def test_nothing_is_said_beyond_the_runs() -> None:
    assert cost_at(line(1), 3.01) is None
    assert cost_at(line(1), 2.69) is None
    better = [(cost, loss - 0.5) for cost, loss in line(1)]
    assert overlap([line(1), better]) is None
    assert best_ratio([line(1)], [better]) is None
    assert ratio_at([line(1)], [better], 2.6) is None
    assert bound([line(1)], [better]) == pytest.approx(10.0)
    assert bound([better], [line(1)]) is None
    assert bound([line(3)], [line(1)]) is None


def test_a_run_that_a_cheaper_one_beats_is_no_part_of_the_frontier() -> None:
    assert lower_hull([(4, 2.0), (1, 3.0), (8, 2.5), (16, 1.0)]) == [(1, 3.0), (4, 2.0), (16, 1.0)]


def noisy(random: Random, shift: float, spread: float) -> list[list[tuple[float, float]]]:
    """Three seeds of a line whose losses are off by chance, and whose costs are too, by 5%."""
    return [[(cost * math.exp(random.gauss(0, 0.05)), loss + random.gauss(0, spread)) for cost, loss in line(shift)] for _ in range(3)]


def test_the_interval_holds_the_ratio_nineteen_times_in_twenty() -> None:
    random = Random(0)
    held, widths = 0, []
    for _ in range(1000):
        ratio = ratio_at(noisy(random, 5.0, 0.01), noisy(random, 1.0, 0.005), 2.8)
        assert ratio is not None
        held += ratio.low <= 5.0 <= ratio.high
        widths.append(math.log(ratio.high / ratio.low))
    assert 940 <= held <= 990
    # Three seeds of one budget alone would be within a tenth of the usual width now and then.
    assert min(widths) > 0.3 * sum(widths) / len(widths)


def test_an_interval_needs_no_noise() -> None:
    ratio = ratio_at([line(4)] * 3, [line(1)] * 3, 2.8)
    assert ratio is not None
    assert ratio.low == pytest.approx(ratio.high) == pytest.approx(4.0)


def test_one_seed_has_no_interval() -> None:
    ratio = best_ratio([line(5)], [line(1)])
    assert ratio is not None
    assert (ratio.low, ratio.high, ratio.seeds) == (0.0, math.inf, 1)


DIVERGED = st.sampled_from((math.nan, math.inf, -math.inf))


@given(st.lists(st.tuples(st.floats(1, 1e6), DIVERGED), min_size=1, max_size=4), st.floats(0.01, 100))
def test_runs_that_diverged_reach_no_loss(diverged: list[tuple[float, float]], shift: float) -> None:
    one, other = line(shift), line(1)
    assert lower_hull(one + diverged) == lower_hull(one)
    assert lower_hull(diverged) == []
    assert overlap([one, diverged]) is None
    for first, second in ((one + diverged, other), (one, diverged + other)):
        assert best_ratio([first], [second]) == best_ratio([one], [other])
    assert best_ratio([one], [diverged]) is None


@given(st.lists(st.tuples(st.floats(1, 1e6), DIVERGED), min_size=1, max_size=4))
def test_no_bound_rests_on_runs_that_diverged(diverged: list[tuple[float, float]]) -> None:
    better = [(cost, loss - 0.5) for cost, loss in line(1)]
    assert bound([line(1)], [better + diverged]) is None, "not every run beats the other side"
    assert bound([line(1) + diverged], [better]) == bound([line(1)], [better])
    assert bound([diverged], [better]) is None


def test_the_spread_is_that_of_budgets_at_which_no_seed_diverged() -> None:
    random = Random(1)
    first, second = noisy(random, 5.0, 0.01), noisy(random, 1.0, 0.005)
    first[1][0] = (first[1][0][0], math.nan)
    ratio = ratio_at(first, second, 2.75)
    assert ratio is not None
    assert 0 < ratio.low < ratio.value < ratio.high < math.inf
    # Where every budget has lost a run, the ratio stays, without an interval.
    gaps = [[(cost, math.nan if i == seed else loss) for i, (cost, loss) in enumerate(line(5))] for seed in range(3)]
    alone = ratio_at(gaps, [line(1)] * 3, line(1)[1][1])
    assert alone is not None
    assert alone.value == pytest.approx(5)
    assert figures("ratio", alone)["ratio_interval"] is None
